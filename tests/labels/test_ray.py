"""Labeling with Ray Data, without Ray itself (see tests/servers/test_ray.py): workers' answers and stored labels."""

from __future__ import annotations

import sys

import pytest
from helpers.labeling import LABEL_ALONE, make_pairs, mapped_in_turn, stopping
from helpers.recipes import tiny_recipe, write_rows
from helpers.server import scripted_server

from trl_rlaif.errors import RunError, UserError
from trl_rlaif.files import read_lines
from trl_rlaif.judging.usage import BudgetUsedUp
from trl_rlaif.labels import ray as by_ray
from trl_rlaif.labels.ray import label_with_ray
from trl_rlaif.pipeline.judges import Judges
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.plugins import installed_plugins

PAIRS = [row | {"response_1": "good " * i + "fox"} for i, row in enumerate(make_pairs(9))]


@pytest.fixture(scope="module")
def server():
    with scripted_server() as one:
        yield one


@pytest.fixture(autouse=True)
def mapped(monkeypatch, server, only_local_servers):
    """Runs the workers in turn in this process; returns a list with one entry per loaded judge."""
    server.forget()
    loaded = []

    def load(self, *arguments):
        loaded.append(arguments)
        return load_judge(self, *arguments)

    load_judge = Judges.load
    monkeypatch.setattr(by_ray, "_mapped", mapped_in_turn)
    monkeypatch.setattr(Judges, "load", load)
    return loaded


@pytest.fixture
def recipe(tiny_model, tmp_path, server):
    """Makes a recipe for these pairs, with keys of the section label; by default, its judge is on a server."""

    def recipe(pairs=PAIRS, judge=(), **label):
        write_rows(tmp_path / "pairs.jsonl", pairs)
        asked = {"backend": "openai", "path": "scripted", "prefill": False, "base_url": server.base_url}
        label = {"judge": asked | dict(judge) if judge != "same" else "same", **label}
        data = {"prompts": None, "eval_prompts": None, "pairs": "pairs.jsonl"}
        return tiny_recipe(tmp_path, tiny_model, data=data, **LABEL_ALONE, label=label)

    return recipe


def sampled(recipe, folder):
    return run_recipe(recipe, installed_plugins(), folder, only=["sample"]).path


def lines(folder):
    """The store's lines, sorted, as their order is not guaranteed."""
    return sorted((folder / "labels.jsonl").read_bytes().splitlines())


def test_labels_are_those_of_a_run_byte_for_byte(recipe, tmp_path, mapped, server):
    write_rows(tmp_path / "judged.jsonl", make_pairs(20, human=(1, 2, 1)))  # with the ids of the run's own pairs
    made = recipe(compare={"rated": {"labeler": "direct"}}, calibration="judged.jsonl")
    online = run_recipe(made, installed_plugins(), tmp_path / "online")
    folder = sampled(made, tmp_path / "out")
    del mapped[:]
    assert label_with_ray(made, folder, workers=2, batch_size=5) == 9 + 9 + 20
    assert lines(folder) == lines(online.path) and len(mapped) == 2 * 3  # for both labelers and the judged pairs
    server.forget()
    done = run_recipe(made, installed_plugins(), folder, resume=True).results()["label"]
    whole = online.results()["label"]
    assert not server.requests and (done["made"], done["labeled"]) == (0, 9)
    for same in ("agreement", "calibration", "position_bias", "skipped"):
        assert done[same] == whole[same]
    assert {k: v for k, v in done["usage"].items()} == whole["usage"] and done["usage"]["input_tokens"] > 0


def test_a_judge_in_the_workers_process_differs_by_the_last_digits(recipe, tmp_path, mapped):
    made = recipe(judge="same", batch_tokens=600)
    online = run_recipe(made, installed_plugins(), tmp_path / "online")
    folder = sampled(made, tmp_path / "out")
    label_with_ray(made, folder, workers=1, batch_size=4)
    ours, theirs = ({row["id"]: row for row in read_lines(f / "labels.jsonl")} for f in (folder, online.path))
    assert ours.keys() == theirs.keys() and len(ours) == 9
    for id, row in ours.items():
        assert row["p"] == pytest.approx(theirs[id]["p"], abs=1e-5)
        assert (row["setup"], row["pair"]) == (theirs[id]["setup"], theirs[id]["pair"])


def test_after_a_kill_what_was_answered_is_not_asked_again(recipe, tmp_path, monkeypatch, server):
    made = recipe()
    folder = sampled(made, tmp_path / "out")
    with monkeypatch.context() as patch:
        stopping(patch, at=5)
        with pytest.raises(KeyboardInterrupt):
            label_with_ray(made, folder, batch_size=4)
    before = (folder / "labels.jsonl").read_bytes()
    assert len(before.splitlines()) == 5
    server.forget()
    assert label_with_ray(made, folder, batch_size=4) == 4 and len(server.requests) == 2 * 4
    assert (folder / "labels.jsonl").read_bytes().startswith(before)
    assert label_with_ray(made, folder) == 0 and len(server.requests) == 2 * 4


def test_an_error_of_a_worker_is_told_as_the_runs_own_and_labels_before_it_stay(recipe, tmp_path, server):
    pairs = [*PAIRS[:4], PAIRS[4] | {"response_1": "[[fault=401]]"}, *PAIRS[5:]]
    made = recipe(pairs, {"concurrency": 1})
    folder = sampled(made, tmp_path / "out")
    with pytest.raises((RunError, UserError), match="401|key"):
        label_with_ray(made, folder, batch_size=3)
    assert {row["id"] for row in read_lines(folder / "labels.jsonl")} >= {"p6", "p7", "p8", "p3"}
    assert len(lines(folder)) < 9


def test_a_budget_is_for_all_workers_together(recipe, tmp_path, server):
    price = {"input": 1.0, "output": 1.0}
    whole = run_recipe(recipe(judge={"price": price}), installed_plugins(), tmp_path / "all").results()["label"][
        "usage"
    ]
    tokens = whole["input_tokens"] + whole["output_tokens"]
    made = recipe(judge={"price": price}, budget={"tokens": tokens // 2})
    folder = sampled(made, tmp_path / "out")
    with pytest.raises(BudgetUsedUp, match=rf"of {tokens // 2:,}"):
        label_with_ray(made, folder, batch_size=2, workers=2)
    kept = len(lines(folder))
    assert 3 < kept < 9
    with pytest.raises(BudgetUsedUp):  # nothing more is asked
        label_with_ray(made, folder)
    assert len(lines(folder)) == kept
    more = recipe(judge={"price": price}, budget={"tokens": tokens})
    assert label_with_ray(more, folder) == 9 - kept
    done = run_recipe(more, installed_plugins(), folder, resume=True).results()["label"]
    assert done["usage"] == pytest.approx(whole)


def test_what_cannot_be_divided_or_is_not_there_is_refused(recipe, tmp_path, monkeypatch):
    made = recipe()
    with pytest.raises(UserError, match="no pairs yet.*--only sample"):
        label_with_ray(made, tmp_path / "new")
    with pytest.raises(UserError, match="tournament.*trl-rlaif run"):
        label_with_ray(recipe(ranking={"method": "tournament"}), tmp_path / "new")


def test_without_ray_the_extra_is_named(recipe, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "ray.data", None)
    made = recipe()
    folder = sampled(made, tmp_path / "out")
    with pytest.raises(UserError, match=r"pip install 'trl-rlaif\[ray\]'"):
        label_with_ray(made, folder)
