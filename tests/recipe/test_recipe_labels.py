"""The keys of `label`: local judges and judges on servers, compared labelers, calibration and precision."""

import pytest
import yaml

from trl_rlaif.errors import Problem
from trl_rlaif.recipe import ComponentRef, JudgeSection, ServerJudgeSection, VLLMJudgeSection, parse_recipe
from trl_rlaif.recipe.sections import ComparedSection
from trl_rlaif.recipe.sections.judges import PriceSection
from trl_rlaif.recipe.sections.label import BudgetSection

HEAD = "model: {path: gpt2}\ndata: {prompts: prompts.jsonl}\nsample:\nlabel:\n"  # the next line is line 5

FULL = (
    HEAD
    + """\
  labeler: {distilled: {samples: 3}}
  judge: {backend: openai, path: org/with/slashes.gguf, base_url: http://localhost:8000/v1, votes: 5, timeout: 1e1}
  precision: high
  min_confidence: 6e-1
  calibration: pairs.jsonl
  compare:
    rated: {labeler: direct}
    other-judge:
      judge: {path: org/judge, quantization: nf4}
      prompt: own_prompt
    hosted: {judge: {backend: openai, path: gpt-4.1-mini}}
"""
)


def test_all_keys(parse, folder):
    label = parse(FULL).label
    assert isinstance(label.judge, ServerJudgeSection)
    assert (label.judge.path, label.judge.votes, label.judge.timeout) == ("org/with/slashes.gguf", 5, 10.0)
    assert (label.judge.api, label.judge.prefill, label.judge.top_logprobs) == ("chat", "auto", "auto")
    assert (label.precision, label.min_confidence) == ("high", 0.6)
    assert label.calibration == str(folder / "pairs.jsonl")
    assert list(label.compare) == ["rated", "other-judge", "hosted"]
    rated, other, hosted = label.compare.values()
    assert rated == ComparedSection(labeler=ComponentRef("direct"))
    assert rated.labeler.where == "recipe.yaml:11"
    assert other.judge == JudgeSection(path="org/judge", quantization="nf4")
    assert (other.labeler, other.prompt) == (None, str(folder / "own_prompt"))
    assert hosted.judge == ServerJudgeSection(backend="openai", path="gpt-4.1-mini")


def test_what_is_written_to_the_runs_folder_parses_to_the_same(parse, folder, registry):
    """Even if a compared labeler leaves out keys that it takes from the main one."""
    recipe = parse(FULL)
    resolved = recipe.to_dict()
    assert resolved["label"]["compare"]["hosted"]["labeler"] is None
    (folder / "again.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))
    again = parse_recipe(folder / "again.yaml", registry=registry)
    assert again.label == recipe.label and again.to_dict()["label"] == resolved["label"]


def test_defaults(parse):
    label = parse(HEAD).label
    assert (label.precision, label.min_confidence, label.calibration, label.compare) == ("auto", 0.5, None, {})
    assert parse(HEAD + "  judge: {backend: transformers, path: gpt2}\n").label.judge == JudgeSection(path="gpt2")
    engine = VLLMJudgeSection(backend="vllm", path="gpt2", max_model_len=99)
    assert parse(HEAD + "  judge: {backend: vllm, path: gpt2, max_model_len: 99}\n").label.judge == engine


@pytest.mark.parametrize(
    "model", [ComparedSection, ServerJudgeSection, JudgeSection, VLLMJudgeSection, BudgetSection, PriceSection]
)
def test_every_key_has_a_description(model):
    assert all(field.description for field in model.model_fields.values())


@pytest.mark.parametrize(
    ("line", "what", "fix"),
    [
        ("precision: hihg", "'precision' in section 'label' is \"hihg\".", "Did you mean 'high'?"),
        ("precision: fast", "'precision' in section 'label' is \"fast\".", "Write one of auto, highest, high, medium."),
        ("precision: 32", "'precision' in section 'label' is 32.", "Write one of auto, highest, high, medium."),
        ("min_confidence: 0.4", "'min_confidence' in section 'label' is 0.4.",
         "Write a number of at least 0.5 and at most 1."),
        ("min_confidence: 70%", "'min_confidence' in section 'label' is \"70%\".", None),
        ("calibration: pair.jsonl", "'calibration' in section 'label': there is no file or folder 'pair.jsonl'.",
         "Did you mean 'pairs.jsonl'?"),
        ("comparing: {}", "unknown key 'comparing' in section 'label'.", "Did you mean 'compare'?"),
    ],
)  # fmt: skip
def test_wrong_values(only, line, what, fix):
    problem = only(HEAD + f"  {line}\n")
    assert (problem.where, problem.what) == ("recipe.yaml:5", what)
    assert problem.fix == (fix or problem.fix)


class TestServerJudge:
    HEAD = HEAD + "  judge:\n    backend: openai\n"  # the next line is line 7

    @pytest.mark.parametrize("path", ["./no/such/folder", "w.gguf", "a/b/c", "~nobody-here/x", "gpt 4: the second"])
    def test_its_model_is_no_path(self, parse, folder, path):
        (folder / "w.gguf").touch()
        assert parse(self.HEAD + f"    path: '{path}'\n").label.judge.path == path

    def test_nor_is_it_in_evaluate_or_compare(self, parse):
        text = HEAD.replace("prompts: prompts", "eval_prompts: eval.jsonl, prompts: prompts")
        judge = "{judge: {backend: openai, path: ./x/y/z}}"
        recipe = parse(f"{text}  compare: {{a: {judge}}}\nrl: {{rewards: [direct]}}\nevaluate: {judge}\n")
        assert recipe.evaluate.judge.path == recipe.label.compare["a"].judge.path == "./x/y/z"

    def test_a_local_judges_path_is_looked_up(self, only):
        problem = only(HEAD + "  judge:\n    path: ./no/such/folder\n")
        assert problem.where == "recipe.yaml:6" and "no file or folder './no/such/folder'" in problem.what

    def test_missing_path(self, only):
        assert only(self.HEAD) == Problem("section 'label' lacks the key 'judge.path'.", "recipe.yaml:5", "Write text.")

    @pytest.mark.parametrize(
        ("line", "what", "fix"),
        [
            ("path: ''", "'judge.path' in section 'label' is \"\".", "Write text."),
            ("vote: 3", "unknown key 'judge.vote' in section 'label'.", "Did you mean 'votes'?"),
            ("quantization: nf4", "unknown key 'judge.quantization' in section 'label'.", None),
            ("api: chats", "'judge.api' in section 'label' is \"chats\".", "Did you mean 'chat'?"),
            ("votes: -1", "'judge.votes' in section 'label' is -1.", "Write a whole number of at least 0."),
            ("top_logprobs: 0", "'judge.top_logprobs' in section 'label' is 0.",
             "Write auto or a whole number of at least 1 and at most 1000."),
            ("timeout: 0", "'judge.timeout' in section 'label' is 0.", "Write a number above 0."),
            ("prefill: 'yes'", "'judge.prefill' in section 'label' is \"yes\".", "Write auto or true or false."),
        ],
    )  # fmt: skip
    def test_wrong_keys_and_values(self, only, line, what, fix):
        problem = only(self.HEAD + ("" if line.startswith("path") else "    path: x\n") + f"    {line}\n")
        assert problem.what == what
        assert problem.where == ("recipe.yaml:7" if line.startswith("path") else "recipe.yaml:8")
        assert problem.fix == (fix or problem.fix)

    @pytest.mark.parametrize(
        "address", ["localhost:8000/v1", "http://", "http://[", "http://a:b/v1", "ftp://a/v1", "http://a b"]
    )
    def test_an_address_to_which_nothing_can_be_sent(self, only, address):
        problem = only(self.HEAD + f"    path: x\n    base_url: '{address}'\n")
        assert problem.where == "recipe.yaml:8" and "such as http://localhost:8000/v1" in problem.fix

    def test_several_servers(self, parse, only):
        several = ["http://a:8000/v1", "http://b:8000/v1"]
        assert parse(self.HEAD + f"    path: x\n    base_url: {several}\n").label.judge.base_url == several
        for wrong, said in (
            ([], "Write"),
            (["http://a/v1", "b"], "such as http://localhost:8000/v1"),
            (["http://a/v1", "http://a/v1/"], "Name each server once."),
        ):
            problem = only(self.HEAD + f"    path: x\n    base_url: {wrong}\n")
            assert problem.where == "recipe.yaml:8" and said in problem.fix, problem

    def test_the_keys_of_the_other_form_are_not_offered(self, only):
        """A server's key on a local judge is not suggested as its own correction."""
        problem = only(HEAD + "  judge:\n    path: gpt2\n    base_url: http://localhost\n")
        assert problem == Problem(
            "unknown key 'judge.base_url' in section 'label'.",
            "recipe.yaml:7",
            "Known keys: backend, path, dtype, quantization, chat_template_kwargs.",
        )
        assert "dtype" not in only(self.HEAD + "    path: x\n    dtype: auto\n").fix

    @pytest.mark.parametrize(
        ("backend", "fix"),
        [("openal", "Did you mean 'openai'?"), ("sglang", "Write transformers or vllm or openai."), ("3", None)],
    )
    def test_wrong_backend(self, only, backend, fix):
        problem = only(HEAD + f"  judge:\n    path: gpt2\n    backend: {backend}\n")
        assert problem.where == "recipe.yaml:7" and problem.what.startswith("'judge.backend' in section 'label' is ")
        assert problem.fix == (fix or problem.fix)


class TestCompare:
    HEAD = HEAD + "  compare:\n    x:\n"  # the next line is line 7

    @pytest.mark.parametrize(
        ("written", "where", "what", "fix"),
        [
            ("labler: direct", 7, "unknown key 'compare.x.labler' in section 'label'.", "Did you mean 'labeler'?"),
            ("min_confidence: 0.6", 7, "unknown key 'compare.x.min_confidence' in section 'label'.",
             "Known keys: judge, prompt, labeler."),
            ("labeler: direkt", 7, "there is no labeler 'direkt'.", "Did you mean 'direct'?"),
            ("labeler: broken", 7, "The plugin acme 1.0 cannot be imported.", "Uninstall acme."),
            ("labeler: [direct]", 7, "'compare.x.labeler' in section 'label' is a list.", None),
            ("labeler:\n        distilled:\n          sampels: 2", 9,
             "unknown key 'sampels' in the options of labeler 'distilled'.", "Did you mean 'samples'?"),
            ("labeler:\n        distilled:\n          samples: 0", 9,
             "'samples' in the options of labeler 'distilled' is 0.", "Write a whole number of at least 1."),
            ("prompt: own_promt", 7,
             "'compare.x.prompt' in section 'label': "
             "there is no prompt 'own_promt', neither in the package nor as a folder.", "Did you mean 'own_prompt'?"),
            ("judge:\n        path: ./no/such", 8,
             "'compare.x.judge.path' in section 'label': there is no file or folder './no/such'.", None),
            ("judge:\n        backend: openai\n        path: x\n        vote: 1", 10,
             "unknown key 'compare.x.judge.vote' in section 'label'.", "Did you mean 'votes'?"),
            ("judge:\n        backend: openai", 7, "section 'label' lacks the key 'compare.x.judge.path'.", None),
            ("judge: sam", 7, "'compare.x.judge' in section 'label' is \"sam\".", "Did you mean 'same'?"),
        ],
    )  # fmt: skip
    def test_wrong_in_one_of_them(self, only, written, where, what, fix):
        problem = only(self.HEAD + f"      {written}\n")
        assert (problem.where, problem.what) == (f"recipe.yaml:{where}", what)
        assert problem.fix == (fix or problem.fix)

    def test_problems_of_several_are_reported_together(self, problems):
        found = problems(self.HEAD + "      labeler: direkt\n    y:\n      judge: {path: gpt2, dtyp: auto}\n")
        assert [problem.where for problem in found] == ["recipe.yaml:7", "recipe.yaml:9"]

    def test_without_any_key_there_is_nothing_to_compare(self, only):
        problem = only(self.HEAD)
        assert problem.what == "'compare.x' in section 'label' is empty (null)."
        assert problem.fix == "Write a mapping with some of the keys judge, prompt, labeler."

    @pytest.mark.parametrize(
        ("name", "fix"),
        [("label", "'label' is the main labeler's name."), ("a/b", "a letter or digit first."), ("'<b>'", "first.")],
    )
    def test_names(self, only, name, fix):
        problem = only(HEAD + f"  compare:\n    {name}: {{labeler: direct}}\n")
        name = name.strip("'")
        assert problem.where == "recipe.yaml:6"
        assert problem.what == f"the name '{name}' in section 'label' does not fit." and fix in problem.fix

    def test_not_a_mapping(self, only):
        assert only(HEAD + "  compare: [direct]\n").fix == "Write a mapping."


# ---- Variables for chat templates -------------------------------------------------------------------------


def test_variables_for_the_chat_templates_of_the_model_and_each_judge(parse):
    text = HEAD.replace("path: gpt2", "path: gpt2, chat_template_kwargs: {enable_thinking: true}")
    judge = "{path: gpt2, chat_template_kwargs: {reasoning_effort: low, builtin_tools: [a]}}"
    recipe = parse(
        f"{text}  judge: {judge}\n  compare: {{hosted: {{judge: {judge.replace('{', '{backend: openai, ', 1)}}}}}\n"
    )
    assert recipe.model.chat_template_kwargs == {"enable_thinking": True}
    for section in (recipe.label.judge, recipe.label.compare["hosted"].judge):
        assert section.chat_template_kwargs == {"reasoning_effort": "low", "builtin_tools": ["a"]}
        assert {section: 1}[section.model_copy(deep=True)] == 1  # hashable: a judge that is used twice is loaded once


def test_plain_text_has_no_chat_template(only):
    keys = "backend: openai, path: x, api: completions, chat_template_kwargs: {enable_thinking: false}"
    problem = only(HEAD + f"  judge: {{{keys}}}\n")
    assert problem.fix == "Plain text has no chat template: leave out chat_template_kwargs, or set api: chat."


class TestBudget:
    JUDGE = "  judge: {backend: openai, path: x, price: {input: 1e-1, output: 4}}\n"

    def test_all_keys(self, parse):
        label = parse(HEAD + self.JUDGE + "  budget: {tokens: 1000, cost: 5}\n").label
        assert (label.budget.tokens, label.budget.cost) == (1000, 5.0)
        assert (label.judge.price.input, label.judge.price.output) == (0.1, 4.0)

    @pytest.mark.parametrize(
        ("section", "said"),
        [
            ("  budget: {tokens: 10}\n", "Only judges on servers use a budget"),
            (JUDGE + "  budget: {}\n", "Give tokens or cost."),
            (JUDGE + "  budget: {tokens: 0}\n", "Write a whole number of at least 1"),
            (JUDGE + "  budget: {cost: 0}\n", "Write a number above 0"),
            ("  judge: {backend: openai, path: y}\n  budget: {cost: 1}\n", "the price of every judge: add it to y."),
            (
                JUDGE + "  compare: {a: {judge: {backend: openai, path: z}}}\n  budget: {cost: 1}\n",
                "needs the price of every judge: add it to z.",
            ),
        ],
    )  # fmt: skip
    def test_a_budget_that_cannot_be_kept(self, only, section, said):
        assert said in str(only(HEAD + section))
