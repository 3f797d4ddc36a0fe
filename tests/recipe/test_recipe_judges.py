"""The keys `judges` and `harmless` of `evaluate`."""

import pytest
import yaml

from trl_rlaif.errors import Problem
from trl_rlaif.recipe import JudgeSection, ServerJudgeSection, parse_recipe
from trl_rlaif.recipe.sections import EvaluateSection, FurtherJudgeSection

HEAD = (
    "model: {path: gpt2}\ndata: {prompts: prompts.jsonl, eval_prompts: eval.jsonl}\n"
    "rl: {rewards: [direct]}\nevaluate:\n"
)  # the next line is line 5

FULL = (
    HEAD
    + """\
  harmless: harmlessness
  judges:
    base: {judge: same}
    mine: {prompt: own_prompt}
    other: {judge: {path: org/judge, quantization: nf4}, prompt: helpfulness}
    hosted: {judge: {backend: openai, path: ./x/y/z}}
"""
)


def test_all_forms_of_judges(parse, folder):
    evaluate = parse(FULL).evaluate
    assert evaluate.harmless == "harmlessness"
    assert evaluate.judges == {
        "base": FurtherJudgeSection(judge="same"),
        "mine": FurtherJudgeSection(prompt=str(folder / "own_prompt")),
        "other": FurtherJudgeSection(judge=JudgeSection(path="org/judge", quantization="nf4"), prompt="helpfulness"),
        "hosted": FurtherJudgeSection(judge=ServerJudgeSection(backend="openai", path="./x/y/z")),
    }
    none = parse(HEAD).evaluate
    assert (none.judges, none.harmless) == ({}, None)


def test_what_is_written_to_the_runs_folder_parses_to_the_same(parse, folder, registry):
    recipe = parse(FULL)
    (folder / "again.yaml").write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False))
    assert parse_recipe(folder / "again.yaml", registry=registry).evaluate == recipe.evaluate


@pytest.mark.parametrize("model", [EvaluateSection, FurtherJudgeSection])
def test_every_key_has_a_description(model):
    assert all(field.description for field in model.model_fields.values())


@pytest.mark.parametrize(
    ("line", "what", "fix"),
    [
        ("judges: {judge: {prompt: general}}", "the name 'judge' in section 'evaluate' does not fit.",
         "'judge' is the main judge's name."),
        ("judges: {a/b: {prompt: general}}", "the name 'a/b' in section 'evaluate' does not fit.", None),
        ("judges: {a: {}}", "'judges.a' in section 'evaluate' is an empty mapping.",
         "Name its judge, its prompt or both: it would be the main judge."),
        ("judges: {a: {promt: x}}", "unknown key 'judges.a.promt' in section 'evaluate'.", "Did you mean 'prompt'?"),
        ("judges: {a: {judge: {path: ./no/such}}}",
         "'judges.a.judge.path' in section 'evaluate': there is no file or folder './no/such'.", None),
        ("judges: {a: {prompt: genral}}",
         "'judges.a.prompt' in section 'evaluate': there is no prompt 'genral', neither in the package nor as a "
         "folder.",
         "Did you mean 'general'?"),
        ("judges: {a: same}", "'judges.a' in section 'evaluate' is \"same\".", None),
        ("harmless: harmles",
         "'harmless' in section 'evaluate': there is no prompt 'harmles', neither in the package nor as a folder.",
         "Did you mean 'harmlessness'?"),
        ("harmless: own_prompt",
         "'harmless' in section 'evaluate': the prompt 'own_prompt' has no file rubric.txt, which ratings need.", None),
        ("harmless: true", "'harmless' in section 'evaluate' is true.", None),
    ],
)  # fmt: skip
def test_wrong_values(only, line, what, fix):
    problem = only(HEAD + f"  {line}\n")
    assert (problem.where, problem.what) == ("recipe.yaml:5", what)
    assert problem.fix == (fix or problem.fix)


def test_ratings_need_the_labeler_that_gives_them(folder, registry, monkeypatch, only):
    monkeypatch.setattr(registry, "names", lambda kind: ["distilled"] if kind == "labeler" else [])
    problem = only(HEAD.replace("direct", "m:f") + "  harmless: harmlessness\n")
    assert problem == Problem(
        "'harmless' in section 'evaluate': ratings come from the labeler 'direct', and none of that name is installed.",
        "recipe.yaml:5",
    )
