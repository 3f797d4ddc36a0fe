"""What judges' templates and reward functions need of the data and of a prompt's folder is looked for by `check`."""

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
    """Exit code and message of `check`, for a recipe with these sections; the prompt 'judge' may be damaged."""
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
def test_a_template_that_names_another_column_is_refused_with_its_line(check, tmp_path, sections, part, text):
    path = tmp_path / "judge" / part
    path.write_text("{{ context }}\n" + text)
    code, message = check(**sections)
    assert code == 2 and f"{path}:2: The template {part} of" in message
    assert "there is no 'persona'. Templates are given context" in message


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
        ("completions", "does not take 'prompts'"),
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
