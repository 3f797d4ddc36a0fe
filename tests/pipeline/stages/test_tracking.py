"""Tracking forgetting in a complete run: its numbers match evaluate's, it can stop rl, and it resumes."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
import torch
from helpers.recipes import fingerprints, tiny_recipe, write_prompts

from trl_rlaif.files import read_lines, read_state, write_state
from trl_rlaif.pipeline import tracking
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import parse_recipe

pytestmark = pytest.mark.slow

SETS = {"test": "test.jsonl", "forget": "forget.jsonl"}
RL = {"learning_rate": 3e-2, "total_episodes": 24}
ALONE = {"sample": None, "label": None, "reward": None, "report": None}
PENALTY = {"rewards": ["helpers.rewards:length_penalty"]}


def recipe(folder, model, **sections):
    write_prompts(folder / "forget.jsonl", 6, start=40)
    return tiny_recipe(folder, model, **sections)


def tracked(folder):
    """The rows of metrics.jsonl with forgetting metrics."""
    return [row for row in read_lines(folder / "metrics.jsonl") if any(k.startswith("forgetting/") for k in row)]


def loses(context, judge, description, section):
    """Replaces the judge with one that always prefers the initial policy."""
    return lambda prompts, policy, start: [0.0] * len(prompts)


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """A complete run with two sets, measured every four of six updates, and both kinds of rehearsal pairs."""
    base = tmp_path_factory.mktemp("tracked")
    rows = [{"prompt": f"what is {i}?", "completion": " a city"} for i in range(4)]
    (base / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    selector = {"selective_rehearsal": {"clusters": 2, "per_cluster": 2}}
    found = recipe(
        base, tiny_model, rl={**RL, "rehearsal": "own.jsonl", "selectors": [selector]},
        evaluate={"sets": SETS, "track_every": 4, "max_new_tokens": 8},
    )  # fmt: skip
    return run_recipe(found, installed_plugins(), base / "out")


def test_the_curve_begins_at_the_start_and_ends_at_what_evaluate_finds(finished):
    rows, results = tracked(finished), finished.results()
    assert [row["step"] for row in rows] == [0, 4, 6]
    assert all(row["time/forgetting"] > 0 for row in rows)
    for name, prompts in (("test", 4), ("forget", 6)):
        found, final = results["rl"]["forgetting"][name], results["evaluate"]["sets"][name]
        assert (found["prompts"], found["good"]) == (prompts, prompts // 2) and final["prompts"] == prompts
        first, last = ({k: row[f"forgetting/{name}/{k}"] for k in ("win_rate", "nll")} for row in (rows[0], rows[-1]))
        assert first["win_rate"] == 0.5 and first["nll"] == pytest.approx(final["nll_start"], rel=1e-5)
        assert last["win_rate"] == final["win_rate"] and last["nll"] == pytest.approx(final["nll_trained"], rel=1e-5)
        assert found == {"prompts": prompts, "good": prompts // 2, "win_rate_first": 0.5, "nll_first": first["nll"],
                         "win_rate_last": last["win_rate"], "nll_last": last["nll"]}  # fmt: skip
        assert final["win_rate"] != 0.5 or final["wins"] > 0  # the policy's answers differ
        assert abs(final["nll_trained"] - final["nll_start"]) > 1e-3


def test_the_report_shows_it(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    section = page[page.index('<h2 id="forgetting">') : page.index('<h2 id="judges">')]
    for shown in (
        "Win rate over the initial policy",
        "NLL of the initial policy's good answers",
        "NLL of rehearsed pairs",
    ):
        assert shown.replace("'", "&#39;") in section, shown
    assert section.count("<svg") == 4 and "10 prompts in 2 clusters" in section
    assert "fraction of the updates&#39; time" in section
    groups = re.findall(r'<td>([\w ]+)</td><td class="n">(\d+)</td><td class="n">(\S*)</td>', section)
    pairs = Counter(row["cluster"] for row in read_lines(finished / "rehearsal.jsonl"))
    assert pairs.keys() == {None, 0, 1}
    assert {name: int(n) for name, n, _ in groups} == {
        "given": pairs[None], "cluster 1": pairs[0], "cluster 2": pairs[1]
    }  # fmt: skip
    assert [bool(score) for name, _, score in groups] == [name != "given" for name, _, _ in groups]
    for name, values in finished.results()["evaluate"]["sets"].items():
        assert f'<td class="category">{name}</td><td class="n">{values["prompts"]}</td>' in section


def test_a_set_that_is_forgotten_ends_rl_and_says_why(tmp_path, tiny_model, monkeypatch, caplog):
    monkeypatch.setattr(tracking, "asking", loses)
    forgetful = recipe(
        tmp_path, tiny_model, **ALONE, rl={**RL, **PENALTY},
        evaluate={"sets": SETS, "track_every": 2, "stop_on_forgetting": 0.1},
    )  # fmt: skip
    folder = run_recipe(forgetful, installed_plugins(), tmp_path / "out", only=["rl"])
    results = folder.results()["rl"]
    rate = results["stopped"].pop("win_rate")
    assert results["stopped"] == {"set": "forget", "update": 2, "limit": 0.4} and rate < 0.4
    assert results["updates"] == 2 and [row["step"] for row in tracked(folder)] == [0, 2]
    assert "Stopped at update 2 of 6: on the set 'forget'" in caplog.text
    assert (folder / "policy" / "adapter_model.safetensors").exists() and folder.is_complete("rl")
    # If it is killed between the end of training and the end of the stage, nothing is left to train.
    marker = folder.state / "rl.json"
    write_state(marker, read_state(marker, "") | {"complete": False})
    run_recipe(forgetful, installed_plugins(), tmp_path / "out", only=["rl"])
    assert folder.results()["rl"]["stopped"] == {"set": "forget", "update": 2, "limit": 0.4, "win_rate": rate}
    assert [row["step"] for row in tracked(folder)] == [0, 2]


@pytest.mark.parametrize("killed_at", [1, 4])
def test_a_killed_run_resumes_with_the_numbers_of_a_whole_one(tmp_path, tiny_model, monkeypatch, killed_at):
    """Killed before or after the first checkpoint, which is written after two updates."""
    settings = {"rl": {**RL, **PENALTY, "save_steps": 2}, "evaluate": {"sets": SETS, "track_every": 1}}
    found = recipe(tmp_path, tiny_model, **ALONE, **settings)
    torch.manual_seed(1)  # for the new adapters
    whole = run_recipe(found, installed_plugins(), tmp_path / "whole", only=["rl"])
    from trl_rlaif.rl.ppo.trainer import PPOTrainer

    collect = PPOTrainer.collect

    def killed(self):
        if self.state.global_step == killed_at:
            raise KeyboardInterrupt
        return collect(self)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(PPOTrainer, "collect", killed)
        torch.manual_seed(1)
        run_recipe(found, installed_plugins(), tmp_path / "out", only=["rl"])
    torch.manual_seed(1 if killed_at < 2 else 99)
    folder = run_recipe(found, installed_plugins(), tmp_path / "out", only=["rl"], resume=True)
    timed = ("eps", "time/")
    ours, theirs = (
        [{k: v for k, v in row.items() if not k.startswith(timed)} for row in read_lines(f / "metrics.jsonl")]
        for f in (folder, whole)
    )
    assert ours == theirs and len(tracked(folder)) == 7
    assert folder.results()["rl"]["forgetting"] == whole.results()["rl"]["forgetting"]


def _steps(folder, model, **evaluate):
    """The updates at which a run with these settings measures, and the number of prompts per set."""
    found = recipe(folder, model, **ALONE, rl={**RL, **PENALTY}, evaluate=evaluate)
    run = run_recipe(found, installed_plugins(), folder / "out", only=["rl"])
    sizes = {name: s["prompts"] for name, s in run.results()["rl"].get("forgetting", {}).items()}
    return [row["step"] for row in tracked(run)], sizes


@pytest.mark.parametrize(
    ("evaluate", "steps", "sizes"),
    [
        ({"sets": SETS}, [0, 1, 2, 3, 4, 5, 6], {"test": 4, "forget": 6}),  # a tenth of six updates, at least one
        ({"sets": SETS, "track_every": 6, "track_prompts": 5}, [0, 6], {"test": 4, "forget": 5}),
        ({"sets": SETS, "track_every": 0}, [], {}),
        ({}, [], {}),
        ({"track_every": 3}, [0, 3, 6], {"test": 4}),
    ],
)
def test_what_is_measured_when(tmp_path, tiny_model, monkeypatch, evaluate, steps, sizes):
    monkeypatch.setattr(tracking, "asking", loses)
    assert _steps(tmp_path, tiny_model, **evaluate) == (steps, sizes)


# ---- Redone stages --------------------------------------------------------------------------------------


@pytest.fixture
def prints(tmp_path, tiny_model):
    """A function that returns the fingerprints of the tiny recipe with given keys of evaluate."""

    def prints(**evaluate):
        return fingerprints(recipe(tmp_path, tiny_model, evaluate={"sets": SETS, **evaluate}))

    return prints


def changed(before, after):
    return [stage for stage in before if before[stage] != after[stage]]


def test_what_is_only_tracked_makes_no_stage_anew(prints):
    plain = prints()
    assert changed(plain, prints(track_every=3, track_prompts=2)) == []
    assert changed(plain, prints(prompt="helpfulness", max_new_tokens=4)) == ["evaluate", "report"]
    assert changed(plain, prints(sets={"forget": "forget.jsonl"})) == ["evaluate", "report"]


def test_what_can_end_rl_makes_it_anew(prints, tmp_path):
    stopping = prints(stop_on_forgetting=0.2)
    assert changed(prints(), stopping) == ["rl", "evaluate", "report"]
    for change in ({"stop_on_forgetting": 0.1}, {"track_every": 3}, {"track_prompts": 2}, {"prompt": "helpfulness"},
                   {"max_new_tokens": 4}, {"judge": {"path": "another"}}):  # fmt: skip
        assert "rl" in changed(stopping, prints(**{"stop_on_forgetting": 0.2, **change})), change
    # Other sets and other settings of the final evaluation cannot.
    for change in ({"sets": {"forget": "forget.jsonl"}}, {"temperature": 1.0}):
        assert "rl" not in changed(stopping, prints(stop_on_forgetting=0.2, **change)), change
    moved = fingerprints(parse_recipe(tmp_path / "recipe.yaml", registry=installed_plugins().registry))
    (tmp_path / "forget.jsonl").write_text('{"prompt": "another"}\n')
    again = fingerprints(parse_recipe(tmp_path / "recipe.yaml", registry=installed_plugins().registry))
    assert "rl" in changed(moved, again)


def test_pairs_of_the_users_own_alone_are_shown_too(tiny_model, tmp_path):
    rows = [{"prompt": f"what is {i}?", "completion": " a city"} for i in range(4)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = recipe(tmp_path, tiny_model, rl={**RL, **PENALTY, "rehearsal": "own.jsonl"}, evaluate=None, **ALONE)
    folder = run_recipe(found, installed_plugins(), tmp_path / "out")
    assert [line["why"] for line in read_lines(folder / "rehearsal.jsonl")] == ["given"] * 4
    assert folder.results()["rl"]["rehearsal"]["pairs"] == 4


def test_a_stage_begins_with_the_same_adapters_whatever_was_drawn_before(tiny_model, tmp_path):
    """A run killed before its first checkpoint starts again; it must start with the same adapters."""
    found = recipe(tmp_path, tiny_model, rl={**RL, **PENALTY}, evaluate=None, **ALONE)
    policies = []
    for name in ("first", "second"):
        torch.rand(len(policies) + 1)
        folder = run_recipe(found, installed_plugins(), tmp_path / name)
        policies.append((folder / "policy" / "adapter_model.safetensors").read_bytes())
    assert policies[0] == policies[1]
