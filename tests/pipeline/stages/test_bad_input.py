"""Bad input: one clear message and exit code 2, or a counted, reported skip; never silence or a traceback."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers.recipes import run_cli, write_recipe
from transformers import AutoTokenizer

from trl_rlaif.files import read_lines

# Only the stages that read data: errors must be found there.
SHORT = {"reward": None, "rl": None, "evaluate": None, "report": None}


def _lines(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"prompt": "a"}', '{"prompt": '], "train.jsonl:2"),
        ([], "train.jsonl"),
        ([{"prompt": "a"}, {"text": "b"}], "train.jsonl:2"),
        ([{"prompt": "a"}, {"prompt": None}], "train.jsonl:2"),
        ([{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}], "train.jsonl:2"),
        ([{"prompt": "why " * 600}], "longer than the model's context"),
    ],
    ids=["invalid JSON", "empty", "no prompt", "null prompt", "mixed formats", "too long"],
)
def test_bad_prompts(tiny_model, tmp_path, monkeypatch, capsys, rows, message):
    recipe = write_recipe(tmp_path, tiny_model, **SHORT)
    _lines(tmp_path / "train.jsonl", *rows)
    code, stderr = run_cli(monkeypatch, capsys, "run", recipe, "--output", tmp_path / "out")
    assert code == 2
    assert message in stderr
    assert "Traceback" not in stderr


def test_null_and_empty_responses_are_counted(tiny_model, tmp_path, monkeypatch, capsys):
    sections = {**SHORT, "sample": None, "data": {"prompts": None, "pairs": "pairs.jsonl"}}
    _lines(
        tmp_path / "pairs.jsonl",
        {"prompt": "a?", "response_1": "yes", "response_2": "no"},
        {"prompt": "b?", "response_1": None, "response_2": "no"},
        {"prompt": "c?", "response_1": " ", "response_2": "no"},
        {"prompt": "d?", "response_1": "no", "response_2": "no"},
        {"prompt": "why " * 600, "response_1": "yes", "response_2": "no"},
    )
    recipe = write_recipe(tmp_path, tiny_model, **sections)
    code, stderr = run_cli(monkeypatch, capsys, "run", recipe, "--output", tmp_path / "out")
    assert code == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["sample"]["dropped"] == {"empty response": 2, "responses are identical": 1}
    assert results["label"]["skipped"] == {"longer than the judge's context": 1}
    assert "2 empty response" in stderr and "longer than the judge's context" in stderr
    assert [row["p"] is None for row in read_lines(tmp_path / "out" / "labels.jsonl")].count(True) == 1


def test_a_prompt_longer_than_the_context_is_counted(tiny_model, tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path, tiny_model, **SHORT)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"id": "long", "prompt": "why " * 600}) + "\n")
    code, stderr = run_cli(monkeypatch, capsys, "run", recipe, "--output", tmp_path / "out", "--only", "sample")
    assert code == 0
    assert "1 prompt longer than the context" in stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["sample"]["dropped"] == {"prompt longer than the context": 1}


def test_rows_that_the_trainer_drops_one_and_all_are_named(tiny_model, tmp_path, monkeypatch, capsys):
    _lines(tmp_path / "sft.jsonl", *({"prompt": f"what is {i}? " * 9, "completion": "a fox"} for i in range(4)))
    sections = dict.fromkeys(("sample", "label", "reward", "rl", "evaluate", "report"))
    recipe = write_recipe(tmp_path, tiny_model, **sections, sft={"data": "sft.jsonl", "max_length": 4, "max_steps": 1})
    code, stderr = run_cli(monkeypatch, capsys, "run", recipe, "--output", tmp_path / "out")
    assert code == 2 and "'sft' has no row left to train on" in stderr and "max_length" in stderr
    assert "recipe.yaml:" in stderr


def test_missing_file_and_wrong_key_are_reported_together(tiny_model, tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path, tiny_model)
    text = recipe.read_text().replace("train.jsonl", "trian.jsonl").replace("batch_tokens", "batch_token")
    recipe.write_text(text)
    code, stderr = run_cli(monkeypatch, capsys, "check", recipe)
    assert code == 2
    line = 1 + next(i for i, t in enumerate(text.splitlines()) if "trian" in t)
    assert f"recipe.yaml:{line}" in stderr and "train.jsonl" in stderr
    assert "batch_tokens" in stderr


def _broken_tokenizer(tiny_model, folder, change):
    shutil.copytree(tiny_model, folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return str(folder)


def test_a_tokenizer_without_padding_token_works(tiny_model, tmp_path, monkeypatch, capsys):
    model = _broken_tokenizer(tiny_model, tmp_path / "model", lambda c: c.pop("pad_token"))
    assert AutoTokenizer.from_pretrained(model).pad_token is None
    recipe = write_recipe(tmp_path, model, **SHORT)
    assert run_cli(monkeypatch, capsys, "run", recipe, "--output", tmp_path / "out")[0] == 0


def test_a_tokenizer_without_chat_template(tiny_model, tmp_path, monkeypatch, capsys):
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    recipe = write_recipe(tmp_path, str(tmp_path / "model"), **SHORT)
    # A base model takes text prompts as plain text ...
    assert run_cli(monkeypatch, capsys, "run", recipe, "--output", tmp_path / "out")[0] == 0
    # ... but it cannot take conversations.
    _lines(tmp_path / "train.jsonl", {"prompt": [{"role": "user", "content": "b"}]})
    code, stderr = run_cli(monkeypatch, capsys, "run", recipe, "--output", tmp_path / "out2")
    assert code == 2 and "chat template" in stderr


def test_an_unwritable_output_folder(tiny_model, tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path, tiny_model)
    (tmp_path / "file").write_text("")
    code, stderr = run_cli(monkeypatch, capsys, "run", recipe, "--output", tmp_path / "file" / "out")
    assert code == 2 and "cannot be written" in stderr


def test_nan_from_a_reward_function_keeps_what_was_done(tiny_model, tmp_path, monkeypatch, capsys):
    sections = {"sample": None, "label": None, "reward": None, "evaluate": None}
    recipe = write_recipe(tmp_path, tiny_model, **sections, rl={"rewards": ["helpers.rewards:not_a_number"]})
    code, stderr = run_cli(monkeypatch, capsys, "run", recipe, "--output", tmp_path / "out")
    assert code == 1  # the recipe is valid, the function is wrong
    assert "not_a_number" in stderr and "nan" in stderr
    assert (tmp_path / "out" / "checkpoints" / "rl" / "checkpoint-0" / "training.pt").exists()


def test_a_used_folder_asks_for_resume(tiny_model, tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path, tiny_model, **SHORT)
    arguments = ("run", recipe, "--output", tmp_path / "out", "--only", "sample")
    assert run_cli(monkeypatch, capsys, *arguments)[0] == 0
    code, stderr = run_cli(monkeypatch, capsys, "run", recipe, "--output", tmp_path / "out")
    assert code == 2 and "--resume" in stderr
    code, stderr = run_cli(monkeypatch, capsys, "run", recipe, "--output", tmp_path / "out", "--only", "sampel")
    assert code == 2 and "sampel" in stderr


def test_a_stage_whose_ground_is_missing(tiny_model, tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path, tiny_model)
    code, stderr = run_cli(monkeypatch, capsys, "run", recipe, "--output", tmp_path / "out", "--only", "reward")
    assert code == 2 and "depends on 'sample'" in stderr


def test_a_model_that_is_not_there(tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path, "no-org/no-model", **SHORT)
    code, stderr = run_cli(monkeypatch, capsys, "run", recipe, "--output", tmp_path / "out")
    assert code == 2 and "no-org/no-model" in stderr
