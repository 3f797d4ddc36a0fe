"""`check` looks for the columns and prompt files that judges' templates and reward functions need."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers.recipes import run_cli, write_recipe
from helpers.tiny import save_tiny_model

from trl_rlaif.recipe.paths import recipes_dir


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def check(model, tmp_path, monkeypatch, capsys):
    """Exit code and message of `check` for a recipe with these sections; tests may damage the prompt 'judge'."""
    shutil.copytree(recipes_dir() / "prompts" / "general", tmp_path / "judge")

    def check(**sections):
        (tmp_path / "rewards.py").touch()
        return run_cli(monkeypatch, capsys, "check", write_recipe(tmp_path, model, **sections))

    return check


@pytest.mark.parametrize(
    ("sections", "part"),
    [
        ({"label": {"prompt": "judge"}}, "sample.jinja"),
        ({"evaluate": {"prompt": "judge"}}, "sample.jinja"),
        ({"evaluate": {"judges": {"second": {"prompt": "judge"}}}}, "sample.jinja"),
        ({"label": {"compare": {"second": {"prompt": "judge"}}}}, "sample.jinja"),
        ({"evaluate": {"harmless": "judge"}}, "rating.jinja"),
    ],
)
@pytest.mark.parametrize("text", ["{{ persona }}", "{% if context == 'x' %}{{ persona }}{% endif %}"])
def test_a_column_that_a_template_names_must_be_in_every_row(check, tmp_path, sections, part, text):
    path = tmp_path / "judge" / part
    path.write_text("{{ context }}\n" + text)
    held_out = "evaluate" in sections
    code, message = check(**sections)
    what = f"There is no column 'persona', which the template {part} of the prompt 'judge' names."
    assert code == 2 and f"{'test' if held_out else 'train'}.jsonl:1: {what}" in message
    rows = {name: (tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("train", "test")}
    own = tmp_path / "own"
    own.mkdir()
    for name, lines in rows.items():
        found = [json.loads(line) | {"persona": None if i == 2 else "a cook"} for i, line in enumerate(lines)]
        (own / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
        found[2]["persona"] = ""
        (own / f"{name}-good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    code, message = check(**sections, data={"prompts": "own/train.jsonl", "eval_prompts": "own/test.jsonl"})
    assert code == 2 and f"own/{'test' if held_out else 'train'}.jsonl:3: {what}" in message
    code, message = check(**sections, data={"prompts": "own/train-good.jsonl", "eval_prompts": "own/test-good.jsonl"})
    assert code == 0, message


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{{ contxt }}", "There is no column 'contxt', which the template sample.jinja of the prompt 'judge' names."),
        ("{{ level.high }}", "The template sample.jinja of the prompt 'judge' is wrong: UndefinedError: "),
    ],
)
def test_a_template_is_tried_on_every_row(check, tmp_path, text, what):
    check()
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    (tmp_path / "own").mkdir()
    levels = [{"level": {"high": 1} if i < 4 else 3} for i in range(len(rows))]
    lines = [json.dumps(row | level) + "\n" for row, level in zip(rows, levels, strict=True)]
    (tmp_path / "own" / "train.jsonl").write_text("".join(lines))
    (tmp_path / "judge" / "sample.jinja").write_text("{{ response_1 }} {{ response_2 }} " + text)
    code, message = check(label={"prompt": "judge"}, evaluate=None, data={"prompts": "own/train.jsonl"})
    assert code == 2 and what in message and f"train.jsonl:{1 if 'contxt' in text else 5}: " in message
    assert ("Did you mean 'context'?" in message) == ("contxt" in text)


def test_what_the_options_need_of_a_prompt_is_looked_for(check, tmp_path):
    (tmp_path / "judge" / "exemplars.jsonl").unlink(missing_ok=True)
    code, message = check(label={"prompt": "judge", "labeler": {"distilled": {"shots": 2}}})
    assert code == 2 and "has 0 exemplars, and 2 are asked for" in message and "recipe.yaml:" in message
    (tmp_path / "judge" / "thinking.txt").unlink()
    code, message = check(label={"prompt": "judge", "labeler": {"distilled": {"thinking": True}}})
    assert code == 2 and "has no file thinking.txt" in message
    (tmp_path / "judge" / "rubric.txt").unlink()
    for sections in ({"label": {"prompt": "judge", "labeler": "direct"}},
                     {"label": {"prompt": "judge"}, "rl": {"rewards": ["direct"]}}):  # fmt: skip
        code, message = check(**sections)
        assert code == 2 and "has no file rubric.txt" in message


def test_columns_of_data_on_the_hub_wait_for_the_stage(check, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "rewards.py").write_text("def reward(completions, answer, **columns):\n    return []\n")
    code, message = check(data={"prompts": "someone/somewhere"}, rl={"rewards": ["own/rewards.py:reward"]})
    assert code == 0, message


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("completions, answer, **columns", "train.jsonl:3: There is no column 'answer'"),
        ("completions, *, answer, **columns", "train.jsonl:3: There is no column 'answer'"),
        ("completions, solution, **columns", "train.jsonl:1: There is no column 'solution'"),
        ("completions", "has no parameter 'prompts'"),
        ("completions, answer=None, **columns", None),
        ("completions, level, **columns", None),
        ("prompts, completions, completion_ids, id, category, trainer_state, level", None),
    ],
)
def test_the_columns_that_a_reward_function_must_be_given(check, tmp_path, function, expected):
    check()  # writes the data
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row |= {"level": 1} | ({} if i == 2 else {"answer": "a"})
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own" / "rewards.py").write_text(f"def reward({function}):\n    return [0.0 for _ in completions]\n")
    code, message = check(data={"prompts": "own/train.jsonl"}, rl={"rewards": ["own/rewards.py:reward"]})
    assert code == (0 if expected is None else 2), message
    assert expected is None or expected in message
