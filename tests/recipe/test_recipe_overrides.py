"""``--set key.path=value``."""

import pytest

from trl_rlaif.errors import Problem
from trl_rlaif.pipeline.inputs import written

TEXT = """\
model: {path: gpt2}
data: {prompts: prompts.jsonl}
sample: {batch_size: 4}
label:
reward:
  transforms: [{advantage: {margin: 2.0}}, regulator]
"""


def test_values_are_yaml(parse):
    recipe = parse(
        TEXT,
        "sample.batch_size=8",
        "sample.temperature=1e-5",
        "sample.seed=null",
        "model.lora.target_modules=[a, b]",
        "reward.bf16=true",
        "run.name='3'",
    )
    assert (recipe.sample.batch_size, recipe.sample.temperature, recipe.sample.seed) == (8, 1e-5, None)
    assert recipe.model.lora.target_modules == ["a", "b"]
    assert recipe.reward.config == {"bf16": True}
    assert recipe.run.name == "3"
    assert recipe.line(("sample", "batch_size")) == "--set sample.batch_size=8"
    assert recipe.line(("sample",)) == "recipe.yaml:3"


def test_list_index(parse):
    recipe = parse(TEXT, "reward.transforms.0.advantage.margin=3", "reward.transforms.1=advantage")
    assert [ref.options["margin"] for ref in recipe.reward.transforms] == [3.0, 1.0]
    assert recipe.reward.transforms[1].where == "--set reward.transforms.1=advantage"


def test_sections_are_created_and_removed(parse):
    recipe = parse(TEXT, "report={}", "reward=null", "evaluate.batch_size=2", "rl.rewards=[direct]",
                   "evaluate.sets.a=eval.jsonl")  # fmt: skip
    assert recipe.report is not None
    assert recipe.reward is None
    assert recipe.evaluate.batch_size == 2
    assert recipe.rl.rewards == ["direct"]


def test_later_one_wins_and_old_lines_are_forgotten(only, parse):
    assert parse(TEXT, "run.seed=1", "run.seed=2").run.seed == 2
    override = "reward.transforms=[{advantage: {margin: 0}}]"
    assert only(TEXT, override).where == f"--set {override}"


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("reward.transforms=[{advantage: {margin: 3.0}}]", TEXT.replace("[{advantage: {margin: 2.0}}, regulator]",
                                                                        "[{advantage: {margin: 3.0}}]")),
        ("sample={batch_size: 8, top_p: 0.9}", TEXT.replace("batch_size: 4", "batch_size: 8, top_p: 0.9")),
        ("model.lora={r: 4}", TEXT.replace("gpt2", "gpt2, lora: {r: 4}")),
    ],
)  # fmt: skip
def test_what_a_stage_is_redone_for_has_the_keys_inside_a_value(parse, override, text):
    assert written(parse(TEXT, override)) == written(parse(text)) != written(parse(TEXT))


def test_removing_a_required_section(only):
    assert only(TEXT, "model=null").what == "the section 'model' is missing."


@pytest.mark.parametrize(
    ("override", "what", "fix"),
    [
        ("run.seed", "this is not key.path=value.", "Write for example --set sample.temperature=0.9."),
        ("=3", "this is not key.path=value.", None),
        ("run.=3", "this is not key.path=value.", None),
        ("run..seed=3", "this is not key.path=value.", None),
        ("run.seed=", "the value is missing.", "Write null, '' or {} if it is meant to be empty."),
        ("run.name=[a", "this is not valid YAML:", None),
        ("run.name=!!python/name:os.system ''", "the YAML tag '!!python/name:os.system' is", None),
        ("run.name=\x07", "this line contains a character that YAML does not allow.", None),
        ("model.path.x=3", "'model.path' is a single value and has no keys.", "Set 'model.path' as a whole."),
        ("reward.transforms.2=advantage", "'2' is not an index into 'reward.transforms', a list of 2.",
         "Write an index from 0 to 1."),
        ("reward.transforms.-1=advantage", "'-1' is not an index into 'reward.transforms', a list of 2.", None),
        ("reward.transforms.x.y=1", "'x' is not an index into 'reward.transforms', a list of 2.", None),
        ("smaple.batch_size=4", "unknown section 'smaple'.", "Did you mean 'sample'?"),
        ("sample.bach_size=4", "unknown key 'bach_size' in section 'sample'.", "Did you mean 'batch_size'?"),
        ("sample.batch_size=yes", "'batch_size' in section 'sample' is true.", None),
        ("reward.transforms.0.advantage.margn=4",
         "unknown key 'margn' in the options of reward transform 'advantage'.", "Did you mean 'margin'?"),
        ("data.prompts=prompt.jsonl", "'prompts' in section 'data': there is no file or folder",
         "Did you mean 'prompts.jsonl'?"),
    ],
)  # fmt: skip
def test_wrong_overrides(only, override, what, fix):
    problem = only(TEXT, override)
    assert problem.where == f"--set {override}"
    assert problem.what.startswith(what)
    assert problem.fix == (fix or problem.fix)


def test_problems_of_the_file_come_first(problems):
    found = problems(TEXT + "  max_length: x\n", "run.seed", "run.seed=x")
    assert [p.where for p in found] == ["recipe.yaml:7", "--set run.seed", "--set run.seed=x"]
    assert found[1] == Problem(
        "this is not key.path=value.", "--set run.seed", "Write for example --set sample.temperature=0.9."
    )
