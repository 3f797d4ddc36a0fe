"""A comparison of several variants on a tiny model: shared stages, round-robin judging, and resuming."""

from __future__ import annotations

import itertools
import os

import pytest
import yaml
from helpers.recipes import write_recipe

from trl_rlaif import RunError, UserError
from trl_rlaif.data import Pair
from trl_rlaif.evaluation import win_rate
from trl_rlaif.experiments import run_comparison
from trl_rlaif.experiments.pairwise import read_answers
from trl_rlaif.files import read_lines
from trl_rlaif.labels.store import pair_key
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import parse_recipe

pytestmark = pytest.mark.slow

VARIANTS = [
    "plain",
    {"advantage": {"reward": {"transforms": ["advantage"]}, "rl": {"transforms": ["distribution_regulator"]}}},
    {"dpo": {"reward": None, "rl": {"algorithm": "dpo"}}},
]


@pytest.fixture(scope="module")
def recipe(tiny_model, tmp_path_factory):
    base = tmp_path_factory.mktemp("comparison")
    path = write_recipe(base, tiny_model, rl={"total_episodes": 8, "learning_rate": 3e-2},
                        label={"labeler": {"distilled": {"orders": "12"}}})  # fmt: skip
    path.write_text(path.read_text() + yaml.safe_dump({"compare": VARIANTS}))
    return parse_recipe(path, registry=installed_plugins().registry)


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    return run_comparison(recipe, installed_plugins(), tmp_path_factory.mktemp("out"), command="trl-rlaif run it")


def rows(folder, name):
    return read_lines(folder / "variants" / name / "samples.jsonl")


def test_what_arms_share_is_made_once(finished):
    plain, advantage, dpo = (RunFolder(finished / "variants" / name) for name in ("plain", "advantage", "dpo"))
    for other in (advantage, dpo):
        assert (other / "labels.jsonl").read_bytes() == (plain / "labels.jsonl").read_bytes()
        assert other.results()["label"] == plain.results()["label"]  # the same duration, so it was not run again
        assert (other / "preferences" / "dataset_info.json").exists()
    assert advantage.results()["reward"]["seconds"] != plain.results()["reward"]["seconds"]
    assert not (dpo / "reward").exists()
    logged = read_lines(advantage / "metrics.jsonl")
    assert {row["stage"] for row in logged} == {"reward", "rl"}


def test_the_tables_follow_from_the_judgments(finished):
    found = finished.results()["compare"]["sets"]["test"]
    names = ["start", "plain", "advantage", "dpo"]
    assert list(found["overall"]) == names and found["prompts"] == 4
    texts = {"start": [row["start"] for row in rows(finished, "plain")]}
    texts |= {name: [row["trained"] for row in rows(finished, name)] for name in names[1:]}
    labels = read_lines(finished / "labels.jsonl")
    prompts = [row["prompt"] for row in rows(finished, "plain")]
    # Both orders, unlike the variants' labels here: in one order, a position-biased judge would decide everything.
    assert all(row["p_12"] is not None and row["p_21"] is not None for row in labels)
    by_key = {row["pair"]: row["p"] for row in labels}
    assert len(by_key) == len(labels)
    for one, other in itertools.combinations(names, 2):
        p = [
            0.5 if a == b else by_key[pair_key(Pair("", prompt, a, b))]
            for prompt, a, b in zip(prompts, texts[one], texts[other], strict=True)
        ]
        expected = win_rate(p)
        assert found["pairs"][one][other] == expected | {"interval": list(expected["interval"]), "unjudged": 0}
    assert found["contestants"]["start"]["length_controlled"] is None
    assert (finished / "report.html").exists()


def test_a_killed_run_asks_for_what_is_missing_only(recipe, finished):
    path, before = finished / "labels.jsonl", finished.results()["compare"]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]) + lines[-2][:10])
    times = {
        name: os.stat(finished / "variants" / name / "policy").st_mtime_ns for name in ("plain", "advantage", "dpo")
    }
    (finished / "variants").rename(finished / "arms")  # its name in an earlier version
    run_comparison(recipe, installed_plugins(), finished.path, resume=True)
    after = finished.results()["compare"]
    assert after["sets"] == before["sets"] and len(read_lines(path)) == len(lines)
    assert times == {name: os.stat(finished / "variants" / name / "policy").st_mtime_ns for name in times}


def test_a_used_folder_is_refused(recipe, finished):
    with pytest.raises(UserError, match="already contains a run"):
        run_comparison(recipe, installed_plugins(), finished.path)


def test_arms_that_answered_other_prompts_are_refused(finished, tmp_path):
    runs = {name: RunFolder(tmp_path / name) for name in ("a", "b")}
    for index, run in enumerate(runs.values()):
        lines = (finished / "variants" / "plain" / "samples.jsonl").read_text().splitlines(keepends=True)
        (run / "samples.jsonl").write_text("".join(lines[index:]))
    with pytest.raises(RunError, match="did not answer the same prompts"):
        read_answers(runs)
