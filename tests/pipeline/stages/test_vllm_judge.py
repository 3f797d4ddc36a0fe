"""Judges with backend: vllm in recipes, with a fake engine: their labels match those of transformers."""

from __future__ import annotations

import sys

import pytest
from helpers import fake_vllm
from helpers.labeling import LABEL_ALONE, label_stage, results, stopping
from helpers.recipes import tiny_recipe, write_prompt_folder, write_rows
from helpers.teaching import TRAINED, judged_pairs

from trl_rlaif.errors import UserError
from trl_rlaif.files import read_lines
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.plugins import installed_plugins

WITHIN = 1e-5  # for probabilities: float64 against float32


@pytest.fixture
def vllm(monkeypatch):
    return fake_vllm.install(monkeypatch)


@pytest.fixture
def label(tiny_model, tmp_path, vllm):
    return label_stage(tiny_model, tmp_path)


@pytest.fixture
def judge(tiny_model):
    return {"backend": "vllm", "path": tiny_model, "dtype": "float32"}


def labels(folder):
    return {row["id"]: row for row in read_lines(folder / "labels.jsonl")}


def assert_alike(ours, theirs, within=WITHIN):
    ours, theirs = labels(ours), labels(theirs)
    assert ours.keys() == theirs.keys()
    for id, row in ours.items():
        assert row["p"] == pytest.approx(theirs[id]["p"], abs=within)
        assert row["setup"] != theirs[id]["setup"]  # in bfloat16 they differ by more than rounding


@pytest.mark.parametrize("labeler", ["distilled", "direct"])
def test_labels_are_those_of_transformers(label, judge, vllm, labeler):
    plain = label("plain", labeler=labeler, judge={"path": judge["path"], "dtype": "float32"})
    assert not vllm.started
    folder = label(labeler=labeler, judge=judge | {"max_model_len": 500, "enforce_eager": True})
    assert_alike(folder, plain)
    (engine,) = vllm.started
    assert (engine.options["max_model_len"], engine.options["gpu_memory_utilization"]) == (500, 0.9)


def test_a_run_that_was_killed_asks_no_label_again_and_a_knob_redoes_nothing(label, judge, vllm, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("trl_rlaif.judging.vllm.BATCH_TOKENS", 1)
        stopping(patch, at=5)
        with pytest.raises(KeyboardInterrupt):
            label(judge=judge)
        asked = len(vllm.started[0].calls)
        folder = label(judge=judge)
    assert asked == 5 and len(vllm.started[1].calls) == 12 - 5
    before = (folder / "labels.jsonl").read_bytes()
    label(judge=judge | {"gpu_memory_utilization": 0.5, "tensor_parallel_size": 2})
    assert len(vllm.started) == 2 and (folder / "labels.jsonl").read_bytes() == before
    assert results(folder)["made"] == 12 and not (folder / "superseded").exists()


def test_a_judge_is_taught_by_transformers_and_asked_in_the_engine(tiny_model, tmp_path, judge, vllm):
    write_prompt_folder(tmp_path / "prompt")
    for name, rows in (("pairs.jsonl", judged_pairs(24)[:8]), ("people.jsonl", judged_pairs(24)[8:])):
        write_rows(tmp_path / name, rows)

    def run(name, model, asked="taught"):
        data = {"prompts": None, "eval_prompts": None, "pairs": "pairs.jsonl"}
        taught = {"contrasts": [], "pairs": "people.jsonl", "eval_fraction": 0.25, **TRAINED, "model": model}
        section = {"judge": taught} if model else {}
        recipe = tiny_recipe(
            tmp_path, tiny_model, **LABEL_ALONE, data=data, label={"judge": asked, "prompt": "prompt"}, **section
        )
        return run_recipe(recipe, installed_plugins(), tmp_path / name)

    plain = run("plain", {"path": tiny_model, "dtype": "float32"})
    taught = run("taught", judge)
    (engine,) = vllm.started
    assert taught.results_of("judge")["used"] and engine.adapted is not None
    assert_alike(taught, plain, 1e-4)
    # Its folder can be a judge in other runs.
    assert_alike(run("other", None, judge | {"path": str(taught / "judge")}), plain, 1e-4)
    assert vllm.started[1].options["model"] == engine.options["model"] and vllm.started[1].adapted is not None


def test_what_it_cannot_do_is_refused(label, judge, monkeypatch):
    with pytest.raises(UserError, match="recipe.yaml:.*quantization.*nf4"):
        label(judge=judge | {"quantization": "nf4"})
    with pytest.raises(UserError, match="gpu_memory_utilization"):
        label(judge=judge | {"gpu_memory_utilization": 1.2})
    monkeypatch.setattr("trl_rlaif.pipeline.judges.distributed.processes", lambda: 2)
    with pytest.raises(UserError, match="in a single process.*tensor_parallel_size"):
        label(judge=judge)


def test_without_vllm_nothing_is_begun(label, judge, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr("trl_rlaif.pipeline.machine._is_installed", lambda package: package != "vllm")
    with pytest.raises(UserError, match=r"needs the package vllm.*'trl-rlaif\[vllm\]'"):
        label(judge=judge)
    assert not (tmp_path / "out" / "pairs.jsonl").exists()
