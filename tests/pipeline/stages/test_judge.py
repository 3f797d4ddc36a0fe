"""The judge stage on a tiny model: its training data, when the taught judge is used, and which judge is asked."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from helpers.recipes import fingerprints, run_cli, tiny_recipe, write_prompt_folder, write_recipe, write_rows
from helpers.teaching import TRAINED, judged_pairs
from peft import PeftModel
from scipy.stats import entropy
from transformers import AutoModelForCausalLM

from trl_rlaif import UserError
from trl_rlaif.files import read_lines
from trl_rlaif.labels.store import LabelStore
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.plugins import installed_plugins

NO_MORE = dict.fromkeys(("sample", "reward", "rl", "evaluate", "report"))


@pytest.fixture
def recipe(tiny_model, tmp_path):
    """A function that makes a recipe with given keys of its judge section."""
    write_prompt_folder(tmp_path / "prompt")
    rows = judged_pairs(24)
    for name, some in (("pairs.jsonl", rows[:8]), ("people.jsonl", rows[8:])):
        write_rows(tmp_path / name, some)

    def make(label=None, more=None, **section):
        sections = NO_MORE | {"data": {"prompts": None, "eval_prompts": None, "pairs": "pairs.jsonl"}} | (more or {})
        label = {"judge": "taught", "prompt": "prompt", "batch_tokens": 600, **(label or {})}
        judge = {"contrasts": [], "pairs": "people.jsonl", "eval_fraction": 0.25, **TRAINED, **section}
        return tiny_recipe(tmp_path, tiny_model, **sections, label=label, judge=judge)

    return make


def run(recipe, folder, **options):
    return run_recipe(recipe, installed_plugins(), folder, resume=True, **options)


def test_a_judge_is_taught_and_asked(recipe, tmp_path, tiny_model):
    folder = run(recipe(label={"compare": {"plain": {"judge": "same"}}}), tmp_path / "out")
    found = folder.results_of("judge")
    assert found["used"] and found["reason"] is None and found["gain"] > 2 * found["standard_error"]
    assert (found["taught"], found["held_out"]) == (12, 4)
    people = found["sources"]["people"]
    assert people == found["sources"]["all"] and people["held_out"] == 4
    assert people["after"]["agreement"]["rate"] == 1.0 and people["after"]["log_loss"] < people["before"]["log_loss"]
    assert people["after"]["position_bias"]["rate"] == 0.0

    lessons = read_lines(folder / "lessons.jsonl")
    assert Counter(row["held_out"] for row in lessons) == {False: 12, True: 4}
    held_out = {row["prompt"] for row in lessons if row["held_out"]}
    assert not held_out & {row["prompt"] for row in lessons if not row["held_out"]}

    # The labels come from the taught judge, those of the comparison from the plain one, and they are kept apart.
    comparison = folder.results_of("label")["comparison"]
    assert comparison["label"]["agreement"]["rate"] == 1.0 > comparison["plain"]["agreement"]["rate"]
    store = LabelStore(folder / "labels.jsonl")
    assert len({row["setup"] for row in read_lines(folder / "labels.jsonl")}) == 2 and not store.broken


def test_the_adapter_is_one_that_peft_loads(recipe, tmp_path, tiny_model):
    folder = run(recipe(), tmp_path / "out", only=["sample", "judge"])
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(folder / "judge"))
    assert sum("lora_B" in name and bool(x.any()) for name, x in loaded.named_parameters()) > 4


def test_a_model_of_its_own_is_taught_as_the_base_is(recipe, tmp_path, tiny_model):
    own = run(recipe(model={"path": tiny_model, "dtype": "float32"}), tmp_path / "own")
    same = run(recipe(), tmp_path / "same")
    for key in ("sources", "gain", "used", "best_step"):
        assert own.results_of("judge")[key] == same.results_of("judge")[key]
    labels = [{row["pair"]: row["p"] for row in read_lines(folder / "labels.jsonl")} for folder in (own, same)]
    assert labels[0] == labels[1] and len(labels[0]) == 8


def test_the_adapters_folder_is_a_judge_for_other_runs(recipe, tmp_path):
    taught = run(recipe(), tmp_path / "out")
    judge = {"path": str(taught / "judge"), "dtype": "float32"}
    other = run(recipe(label={"judge": judge}), tmp_path / "other")
    labels = [{row["pair"]: row["p"] for row in read_lines(folder / "labels.jsonl")} for folder in (taught, other)]
    assert labels[0].keys() == labels[1].keys() and len(labels[0]) == 8
    assert all(labels[1][pair] == pytest.approx(p, abs=1e-6) for pair, p in labels[0].items())


def test_what_does_not_help_is_not_used(recipe, tmp_path, capsys):
    folder = run(recipe(learning_rate=1e-9, label={"compare": {"plain": {"judge": "same"}}}), tmp_path / "out")
    found = folder.results_of("judge")
    assert not found["used"] and "standard error" in found["reason"]
    assert "is not used" in capsys.readouterr().err
    # One judge, one key: no question is asked twice.
    assert len({row["setup"] for row in read_lines(folder / "labels.jsonl")}) == 1


def test_contrasts_of_the_runs_own_responses(recipe, tmp_path):
    folder = run(recipe(contrasts=["looping", "cut_off"], max_contrasts=12, pairs=None), tmp_path / "out")
    found = folder.results_of("judge")
    assert set(found["sources"]) == {"all", "looping", "cut_off"}
    assert found["taught"] + found["held_out"] <= 12
    own = {row[key] for row in read_lines(folder / "pairs.jsonl") for key in ("response_1", "response_2")}
    lessons = read_lines(folder / "lessons.jsonl")
    assert all({row["response_1"], row["response_2"]} & own for row in lessons)
    prompts = [{row["prompt"] for row in lessons if row["held_out"] == side} for side in (True, False)]
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]


def test_responses_without_contrasts_end_no_run(recipe, tmp_path, capsys):
    folder = run(recipe(contrasts=["constraint"], pairs=None, eval_fraction=0.1), tmp_path / "out")
    found = folder.results_of("judge")
    assert not found["used"] and folder.results_of("label")["labeled"] == 8
    assert "is asked without it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stored", "taught", "names"),
    [
        ("distilled", "distilled", {"p"}),
        ("direct", "distilled", {"p"}),
        ("direct", "direct", {"p", "ratings_1", "ratings_2"}),
    ],
)
def test_another_judges_stored_labels(recipe, tmp_path, stored, taught, names):
    teacher = replace(recipe(label={"labeler": stored, "judge": "same"}), judge=None)
    labels = run(teacher, tmp_path / "teacher") / "labels.jsonl"
    section = {"pairs": None, "labels": str(labels.parent), "num_train_epochs": 1, "eval_fraction": 0.5}
    student = run(recipe(label={"labeler": taught}, **section), tmp_path / "student", only=["sample", "judge"])
    lessons = read_lines(student / "lessons.jsonl")
    assert len(lessons) == 8 and all(names == {"p", "ratings_1", "ratings_2"} & row.keys() for row in lessons)
    rows = [sorted([row[name] for name in sorted(names)] for row in of) for of in (lessons, read_lines(labels))]
    assert rows[0] == rows[1]
    found = student.results_of("judge")["sources"]
    assert found.keys() == {"all", "labels"}
    if stored == taught:  # before training, it answers what was stored
        held_out = [row for row in lessons if row["held_out"]]
        known = [[row["ratings_1"], row["ratings_2"]] if "ratings_1" in names else [[row["p"], 1 - row["p"]]]
                 for row in held_out]  # fmt: skip
        assert found["labels"]["before"]["log_loss"] == pytest.approx(entropy(known, axis=-1).mean(), abs=1e-6)


def test_a_finished_stage_is_redone_when_what_it_is_made_from_changes(recipe, tmp_path):
    before = fingerprints(recipe())
    assert fingerprints(recipe(label={"batch_tokens": 500})) == before
    for changed in ({"eval_fraction": 0.3}, {"learning_rate": 1e-3}, {"max_length": 300}):
        after = fingerprints(recipe(**changed))
        assert after["judge"] != before["judge"] and after["label"] != before["label"]
    people = tmp_path / "people.jsonl"
    rows = [json.loads(line) for line in people.read_text().splitlines()]
    rows[0]["human"] = 3 - rows[0]["human"]
    write_rows(people, rows)
    assert fingerprints(recipe())["judge"] != before["judge"]


@pytest.mark.parametrize(
    ("section", "label", "expected"),
    [
        ({"contrasts": [], "pairs": None}, {}, "nothing to learn from"),
        ({"labels": "nowhere"}, {}, "no folder"),
        ({"labels": "prompt"}, {}, "no labels.jsonl"),
        ({"eval_strategy": "no"}, {}, "judge.evaluations"),
        ({"model": {"backend": "openai", "path": "m"}}, {}, "'model.backend'"),
        ({}, {"labeler": {"distilled": {"thinking": True}}}, "without a rationale"),
    ],
)
def test_what_is_refused(recipe, tmp_path, monkeypatch, capsys, tiny_model, section, label, expected):
    judge = {"contrasts": [], "pairs": "people.jsonl", **section}
    data = {"prompts": None, "eval_prompts": None, "pairs": "pairs.jsonl"}
    recipe()  # writes the files
    path = write_recipe(
        tmp_path, tiny_model, **NO_MORE, data=data, judge=judge, label={"judge": "taught", "prompt": "prompt", **label}
    )
    code, said = run_cli(monkeypatch, capsys, "check", path)
    assert code == 2 and expected in said and "recipe.yaml:" in said


def test_taught_without_the_stage_is_refused(recipe, tmp_path, tiny_model):
    recipe()
    data = {"prompts": None, "eval_prompts": None, "pairs": "pairs.jsonl"}
    with pytest.raises(UserError, match="has no section 'judge' to teach it"):
        tiny_recipe(tmp_path, tiny_model, **NO_MORE, data=data, label={"judge": "taught", "prompt": "prompt"})
