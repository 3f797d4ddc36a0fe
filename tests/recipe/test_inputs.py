"""All data of a recipe is read before anything is computed."""

import json

import pytest
from helpers.recipes import tiny_recipe, write_recipe
from stages.test_bad_input import run_cli

from trl_rlaif.errors import UserError
from trl_rlaif.recipe.inputs import check_data


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def test_good_data(tmp_path):
    check_data(tiny_recipe(tmp_path, "gpt2"))


def test_every_file_is_looked_at(tmp_path):
    sections = {
        "sft": {"data": write(tmp_path / "sft.jsonl", {"prompt": "a"})},
        "label": {"calibration": write(tmp_path / "judged.jsonl", {"prompt": "a", "response_1": 1, "response_2": "b"})},
        "rl": {"rehearsal": write(tmp_path / "own.jsonl", {"prompt": "a"})},
        "evaluate": {"sets": {"x": write(tmp_path / "x.jsonl", {"question": "a"}), "y": "x.jsonl"}},
    }
    recipe = tiny_recipe(tmp_path, "gpt2", **sections)
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(UserError) as caught:
        check_data(recipe)
    places = [problem.where.removeprefix(f"{tmp_path}/") for problem in caught.value.problems]
    assert places == ["sft.jsonl:1", "train.jsonl", "judged.jsonl:1", "own.jsonl", "x.jsonl:1"]


def test_what_no_stage_reads_is_left_alone(tmp_path):
    recipe = tiny_recipe(tmp_path, "gpt2", rl=None, evaluate=None)
    (tmp_path / "test.jsonl").write_text("")
    check_data(recipe)
    (tmp_path / "train.jsonl").unlink()  # a name that may be on the Hub
    check_data(recipe)


def test_the_command_line_checks_before_it_runs(tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path, "no-org/no-model")
    write(tmp_path / "test.jsonl", {"prompt": "a"}, {"prompt": 3})
    for arguments in (("check", recipe), ("run", recipe, "--output", tmp_path / "out")):
        code, stderr = run_cli(monkeypatch, capsys, *arguments)
        assert code == 2 and f"{tmp_path / 'test.jsonl'}:2: 'prompt' is a number" in stderr
    assert not (tmp_path / "out").exists()
