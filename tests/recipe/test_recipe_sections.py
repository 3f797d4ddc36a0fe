"""The sections of a recipe: defaults, types, ranges, components and TRL's fields."""

import datetime
from typing import Any

import pytest
import yaml

from trl_rlaif.errors import Problem
from trl_rlaif.recipe import SECTIONS, ComponentRef, JudgeSection, LoraSection, VLLMJudgeSection, parse_recipe

HEAD = "model: {path: gpt2}\ndata: {prompts: prompts.jsonl, eval_prompts: eval.jsonl}\n"

FULL = """\
run: {name: full, seed: 7}
model:
  path: org/some-model
  quantization: nf4
  lora: {r: 8, target_modules: [q_proj, v_proj]}
data:
  prompts: prompts.jsonl
  eval_prompts: org/prompts:test
sft:
  data: sft.jsonl
  learning_rate: 1e-5
  bf16: yes
sample: {temperature: 1e-1, num_responses: 2}
label:
  labeler: {distilled: {samples: 3}}
  judge: {path: org/judge, dtype: bfloat16}
  prompt: own_prompt
reward:
  transforms: [{advantage: {margin: 2}}, regulator]
  max_length: 256
rl:
  rewards: [reward, direct, my.rewards:brevity]
  selectors: [rehearsal]
  kl_coef: 0.1
  save_strategy: no
  max_prompt_length: 64
evaluate: {sets: {helpful: eval.jsonl}}
judge: {contrasts: [looping], model: {path: org/judge}, learning_rate: 1e-4}
rounds: {number: 2, reference: previous}
report:
"""


def test_full_recipe(parse, folder):
    recipe = parse(FULL)
    assert recipe.run.seed == 7
    assert recipe.model.lora == LoraSection(r=8, target_modules=["q_proj", "v_proj"])
    assert recipe.data.prompts == str(folder / "prompts.jsonl")
    assert recipe.data.eval_prompts == "org/prompts:test"
    assert recipe.sft.config == {"learning_rate": 1e-5, "bf16": True}
    assert recipe.sample.temperature == 0.1
    assert recipe.judge.model == JudgeSection(path="org/judge") and recipe.judge.config == {"learning_rate": 1e-4}
    assert recipe.label.labeler == ComponentRef("distilled", {"samples": 3})
    assert recipe.label.labeler.where == "recipe.yaml:15"
    assert recipe.label.judge == JudgeSection(path="org/judge", dtype="bfloat16")
    assert recipe.label.prompt == str(folder / "own_prompt")
    assert [ref.name for ref in recipe.reward.transforms] == ["advantage", "regulator"]
    assert recipe.reward.transforms[0].options == {"margin": 2.0, "bands": []}
    assert recipe.reward.config == {"max_length": 256}
    assert recipe.rl.rewards == ["reward", "direct", "my.rewards:brevity"]
    assert recipe.rl.config == {"kl_coef": 0.1, "save_strategy": "no", "max_prompt_length": 64}
    assert recipe.evaluate.sets == {"helpful": str(folder / "eval.jsonl")}
    assert recipe.report is not None


def test_to_dict_parses_to_the_same(parse, folder, registry):
    recipe = parse(FULL)
    resolved = recipe.to_dict()
    (folder / "sub").mkdir()
    path = folder / "sub" / "again.yaml"
    path.write_text(yaml.safe_dump(resolved, sort_keys=False))
    again = parse_recipe(path, registry=registry)
    assert again == recipe
    assert again.to_dict() == resolved
    assert list(resolved) == list(SECTIONS)
    assert resolved["rl"]["kl_coef"] == 0.1


def test_defaults(parse):
    recipe = parse(HEAD + "sample:\nlabel:\nreport:\n", name="my first (1).yaml")
    assert (recipe.run.name, recipe.run.seed) == ("my-first-1-", 42)
    assert recipe.model.lora == LoraSection()
    assert (recipe.sample.num_responses, recipe.sample.redraws, recipe.sample.seed) == (2, 3, None)
    assert recipe.label.labeler == ComponentRef("distilled", {"samples": 1})
    assert (recipe.label.judge, recipe.label.prompt) == ("same", "general")
    assert recipe.report is not None
    assert recipe.sft is recipe.reward is recipe.rl is recipe.evaluate is None
    assert "rl" not in recipe.to_dict()


def test_every_key_has_a_description():
    models = [*SECTIONS.values(), LoraSection, JudgeSection, VLLMJudgeSection]
    missing = [(m.__name__, n) for m in models for n, f in m.model_fields.items() if not f.description]
    assert not missing


def test_five_problems_are_all_reported_in_order(problems):
    found = problems(
        """\
modell: {path: gpt2}
data: {prompts: prompts.jsonl}
sample:
  temprature: 0.7
  num_responses: 1
label:
  labeler: destilled
reward:
  max_length: long
"""
    )
    assert [(p.where, p.what, p.fix) for p in found] == [
        ("recipe.yaml:1", "unknown section 'modell'.", "Did you mean 'model'?"),
        ("recipe.yaml:1", "the section 'model' is missing.", "Add 'model:' with its keys."),
        ("recipe.yaml:4", "unknown key 'temprature' in section 'sample'.", "Did you mean 'temperature'?"),
        ("recipe.yaml:5", "'num_responses' in section 'sample' is 1.", "Write a whole number of at least 2."),
        ("recipe.yaml:7", "there is no labeler 'destilled'.", "Did you mean 'distilled'?"),
        ("recipe.yaml:9", "'max_length' in section 'reward' is \"long\".", "Write a whole number or null."),
    ]


WHOLE = "Write a whole number of at least 1."
WRONG = [
    ("batch_size: yes", "true", WHOLE),
    ("batch_size: 'yes'", '"yes"', WHOLE),
    ("batch_size: '3'", '"3"', WHOLE),
    ("batch_size: 3.7", "3.7", WHOLE),
    ("batch_size: 3.0", "3.0", WHOLE),
    ("batch_size:", "empty (null)", WHOLE),
    ("batch_size: [1]", "a list", WHOLE),
    ("batch_size: 0", "0", WHOLE),
    ("redraws: -1", "-1", "Write a whole number of at least 0."),
    ("temperature: 0", "0", "Write a number above 0."),
    ("temperature: true", "true", "Write a number above 0."),
    ("temperature: warm", '"warm"', "Write a number above 0."),
    ("temperature: .nan", "nan", "Write a number above 0."),
    ("top_p: 1.5", "1.5", "Write a number above 0 and at most 1."),
    ("seed: -1", "-1", "Write a whole number of at least 0 and at most 2147483647 or null."),
]


@pytest.mark.parametrize(("line", "value", "fix"), WRONG)
def test_wrong_values_in_sample(only, line, value, fix):
    key = line.split(":")[0]
    problem = only(HEAD + f"sample:\n  {line}\n")
    assert problem.where == "recipe.yaml:4"
    assert problem.what == f"'{key}' in section 'sample' is {value}."
    assert problem.fix == fix


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        ("run: {seed: 2147483648}", "'seed' in section 'run' is 2147483648.", "at most 2147483647."),
        ("run: {name: ../up}", "'name' in section 'run' is \"../up\".", "a letter or digit first."),
        ("run: {name: no}", "'name' in section 'run' is false.", "in quotes if it is meant as text."),
        ("run: {name: 2026-10-01}", "'name' in section 'run' is 2026-10-01 (a date).", "meant as text."),
        ("sample: 3", "section 'sample' is a single value, not a mapping.", "below it, indented."),
        ("sample: [a]", "section 'sample' is a list, not a mapping.", "below it, indented."),
        ("sample: {7: 1}", "unknown key '7' in section 'sample'.", "num_responses, temperature"),
        ("report: {title: x}", "unknown key 'title' in section 'report'.", "Known keys: none."),
        ("7: {}", "unknown section '7'.", "Known sections: run, model"),
        ("label: {judge: other}", "'judge' in section 'label' is \"other\".", "Write one of same, taught or a mapping"),
        ("label: {judge: {dtype: auto}}", "section 'label' lacks the key 'judge.path'.", "Write text."),
        ("label: {judge: {path: gpt2, dtyp: auto}}", "unknown key 'judge.dtyp' in", "mean 'dtype'?"),
        ("sft: {}", "section 'sft' lacks the key 'data'.", "Write text."),
        ("sft: {data: ''}", "'data' in section 'sft' is \"\".", "Write text."),
        ("rl: {rewards: []}", "'rewards' in section 'rl' is an empty list.", "each entry text or a mapping."),
        (
            "rl: {algorithm: sarsa, rewards: [direct]}",
            "'algorithm' in section 'rl' is \"sarsa\".",
            "Write one of ppo, reinforce, rloo, grpo, rejection_sampling, dpo.",
        ),
        (
            "rl: {rewards: direct}",
            "'rewards' in section 'rl' is \"direct\".",
            "Write a list, each entry text or a mapping.",
        ),
        ("rl: {rewards: [direct, 3]}", "'rewards.1' in section 'rl' is 3.", "Write text or a mapping."),
    ],
)
def test_wrong_sections_and_nested_keys(problems, text, what, fix):
    head = HEAD.replace("}\n", ", pairs: pairs.jsonl}\n") if "label" in text else HEAD
    head = head.replace("gpt2, pairs: pairs.jsonl", "gpt2")
    found = problems(f"{head}{text}\n" + ("" if text.startswith(("sample", "report")) else "report:\n"))
    assert len(found) == 1, found
    assert found[0].where == "recipe.yaml:3"
    assert found[0].what.startswith(what)
    assert fix in found[0].fix


def test_lora_is_checked(problems):
    found = problems("model:\n  path: gpt2\n  lora:\n    rang: 8\n    dropout: 1\ndata:\nreport:\n")
    assert found == [
        Problem(
            "unknown key 'lora.rang' in section 'model'.",
            "recipe.yaml:4",
            "Known keys: r, alpha, dropout, target_modules.",
        ),
        Problem("'lora.dropout' in section 'model' is 1.", "recipe.yaml:5",
                "Write a number of at least 0 and below 1."),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "key", "shown"),
    [("[a, 3]", "lora.target_modules.1", "3"), ("3", "lora.target_modules", "3"), ("''", "lora.target_modules", '""')],
)
def test_each_wrong_entry_is_reported_once(only, value, key, shown):
    problem = only(f"model: {{path: gpt2, lora: {{target_modules: {value}}}}}\ndata:\nreport:\n")
    assert problem.what == f"'{key}' in section 'model' is {shown}."


class TestComponents:
    HEAD = HEAD + "sample:\nlabel:\nreward:\n  transforms:\n"

    @pytest.mark.parametrize("written", ["advantage", "advantage:", "{advantage: {}}"])
    def test_three_ways_to_pick_without_options(self, parse, written):
        recipe = parse(self.HEAD + f"    - {written}\n")
        assert recipe.reward.transforms == [ComponentRef("advantage", {"margin": 1.0, "bands": []})]

    @pytest.mark.parametrize(
        ("written", "what", "fix"),
        [
            ("advantge", "there is no reward transform 'advantge'.", "Did you mean 'advantage'?"),
            ("xyz", "there is no reward transform 'xyz'.", "Installed: advantage, regulator."),
            ("advantage: {margn: 2}",
             "unknown key 'margn' in the options of reward transform 'advantage'.", "Did you mean 'margin'?"),
            ("advantage: {margin: 0}",
             "'margin' in the options of reward transform 'advantage' is 0.", "Write a number above 0."),
            ("advantage: {margin: x}",
             "'margin' in the options of reward transform 'advantage' is \"x\".", "Write a number above 0."),
            ("advantage: {bands: [2, 1]}",
             "'bands' in the options of reward transform 'advantage' is a list.", "Bands must rise."),
            ("advantage: {bands: [2, x]}",
             "'bands.1' in the options of reward transform 'advantage' is \"x\".", "Write a number."),
            ("advantage: 3", "the options of reward transform 'advantage' are not a mapping.", None),
            ("3", "'transforms.0' in section 'reward' is 3.", None),
            ("{}", "'transforms.0' in section 'reward' is an empty mapping.", None),
        ],
    )  # fmt: skip
    def test_wrong_components(self, only, written, what, fix):
        problem = only(self.HEAD + f"    - {written}\n")
        assert (problem.where, problem.what) == ("recipe.yaml:7", what)
        assert problem.fix == (fix or problem.fix)

    def test_option_has_its_own_line(self, only):
        assert only(self.HEAD + "    - advantage:\n        margin: 2\n        margn: 3\n").where == "recipe.yaml:9"

    def test_option_that_is_not_indented(self, only):
        problem = only(self.HEAD + "    - advantage:\n      margin: 2\n")
        assert problem.what == "'transforms.0' in section 'reward' holds 2 keys, and should name one reward transform."
        assert "indented below the name" in problem.fix

    def test_not_a_list(self, only):
        problem = only(HEAD + "rl:\n  rewards: [direct]\n  selectors: rehearsal\n")
        assert problem.where == "recipe.yaml:5"
        assert problem.fix == "Write a list of data selectors, for example [name]."

    def test_broken_plugin_is_named(self, only):
        problem = only(HEAD + "sample:\nlabel:\n  labeler: broken\n")
        assert problem == Problem("The plugin acme 1.0 cannot be imported.", "recipe.yaml:5", "Uninstall acme.")


class TestTrlFields:
    HEAD = HEAD + "rl:\n  rewards: [direct]\n"

    @pytest.mark.parametrize(
        ("line", "value"),
        [
            ("learning_rate: 1e-5", 1e-5),
            ("learning_rate: 1", 1.0),
            ("per_device_train_batch_size: 2", 2),
            ("bf16: null", None),
            ("report_to: [tensorboard]", ["tensorboard"]),
            ("report_to: none", "none"),
            ("lr_scheduler_type: cosine", "cosine"),
            ("eval_strategy: no", "no"),
            ("eval_strategy: 'no'", "no"),
            ("stop_token: eos", "eos"),
            ("lr_scheduler_kwargs: {power: 2}", {"power": 2}),
            ("run_name: hello", "hello"),
            ("push_to_hub: true", True),
        ],
    )
    def test_right_values(self, parse, line, value):
        config = parse(self.HEAD + f"  {line}\n").rl.config
        key = line.split(":")[0]
        assert config == {key: value}
        assert type(config[key]) is type(value)

    @pytest.mark.parametrize(
        ("line", "what", "fix"),
        [
            ("kl_ceof: 0.1", "unknown key 'kl_ceof' in section 'rl'.", "Did you mean 'kl_coef'?"),
            ("reward: [x]", "unknown key 'reward' in section 'rl'.", "Did you mean 'rewards'?"),
            ("config: {}", "unknown key 'config' in section 'rl'.", None),
            ("zzzz: 1", "unknown key 'zzzz' in section 'rl'.",
             "Known keys: algorithm, rewards, labelers, transforms, selectors, rehearsal, "
             "and the fields of PPOConfig."),
            ("kl_coef: much", "'kl_coef' in section 'rl' is \"much\".", "Write a number."),
            ("kl_coef: true", "'kl_coef' in section 'rl' is true.", "Write a number."),
            ("kl_coef:", "'kl_coef' in section 'rl' is empty (null).", "Write a number."),
            ("num_ppo_epochs: 3.7", "'num_ppo_epochs' in section 'rl' is 3.7.", "Write a whole number."),
            ("num_ppo_epochs: yes", "'num_ppo_epochs' in section 'rl' is true.", "Write a whole number."),
            ("bf16: 'yes'", "'bf16' in section 'rl' is \"yes\".", "Write true or false or null."),
            ("kl_estimator: k2", "'kl_estimator' in section 'rl' is \"k2\".", "Write one of k1, k3."),
            ("save_strategy: never", "'save_strategy' in section 'rl' is \"never\".",
             "Write one of no, steps, epoch, best."),
            ("output_dir: out", "'output_dir' cannot be set in section 'rl'.",
             "Remove it: the run's folder is chosen with --output."),
            ("logging_dir: out", "'logging_dir' cannot be set in section 'rl'.", None),
            ("seed: 3", "'seed' cannot be set in section 'rl'.", "Remove it: set run.seed."),
            ("data_seed: 3", "'data_seed' cannot be set in section 'rl'.", "Remove it: set run.seed."),
            ("sft_model_path: x", "'sft_model_path' cannot be set in section 'rl'.", None),
            ("mini_batch_size: 4", "'mini_batch_size' cannot be set in section 'rl'.", None),
        ],
    )  # fmt: skip
    def test_wrong_keys_and_values(self, only, line, what, fix):
        problem = only(self.HEAD + f"  {line}\n")
        assert (problem.where, problem.what) == ("recipe.yaml:5", what)
        assert problem.fix == (fix or problem.fix)

    def test_type_that_cannot_be_handled_is_let_through(self):
        from trl_rlaif.recipe.trl_fields import convert

        class Strange:
            pass

        assert convert(Strange | None, {"a": 1}) == {"a": 1}
        assert convert(Any, datetime.date(2026, 1, 1)) == datetime.date(2026, 1, 1)
