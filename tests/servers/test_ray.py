"""Labeling with Ray Data on a single-machine cluster; skipped if Ray is not installed."""

from __future__ import annotations

import pytest
from helpers.labeling import LABEL_ALONE, make_pairs
from helpers.recipes import tiny_recipe, write_rows
from helpers.server import scripted_server

from trl_rlaif.errors import UserError
from trl_rlaif.files import read_lines
from trl_rlaif.labels.ray import label_with_ray
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.plugins import installed_plugins

# Ray triggers its own warnings.
pytestmark = [pytest.mark.servers, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False)
    yield ray
    ray.shutdown()


@pytest.fixture
def recipe(tiny_model, tmp_path):
    def recipe(pairs, **label):
        write_rows(tmp_path / "pairs.jsonl", pairs)
        data = {"prompts": None, "eval_prompts": None, "pairs": "pairs.jsonl"}
        return tiny_recipe(tmp_path, tiny_model, data=data, **LABEL_ALONE, label=label)

    return recipe


def test_two_actors_label_what_a_run_would(cluster, recipe, tmp_path):
    made = recipe(make_pairs(9))
    online = run_recipe(made, installed_plugins(), tmp_path / "online").path / "labels.jsonl"
    folder = run_recipe(made, installed_plugins(), tmp_path / "out", only=["sample"]).path
    # Three labels already exist, from a killed run or from another machine.
    kept = b"".join(online.read_bytes().splitlines(keepends=True)[:3])
    (folder / "labels.jsonl").write_bytes(kept)
    assert label_with_ray(made, folder, workers=2, batch_size=2, num_cpus=0.5) == 6
    assert (folder / "labels.jsonl").read_bytes().startswith(kept)
    ours, theirs = ({row["id"]: row for row in read_lines(file)} for file in (folder / "labels.jsonl", online))
    assert ours.keys() == theirs.keys() and len(ours) == 9
    for id, row in ours.items():
        assert row["p"] == pytest.approx(theirs[id]["p"], abs=1e-5)
    assert run_recipe(made, installed_plugins(), folder, resume=True).results()["label"]["made"] == 0


def test_a_server_is_asked_and_what_it_refuses_is_told(cluster, recipe, tmp_path, only_local_servers):
    with scripted_server() as server:
        asked = {"backend": "openai", "path": "scripted", "prefill": False, "base_url": server.base_url}
        made = recipe(make_pairs(5), judge=asked)
        online = run_recipe(made, installed_plugins(), tmp_path / "online").path / "labels.jsonl"
        folder = run_recipe(made, installed_plugins(), tmp_path / "out", only=["sample"]).path
        assert label_with_ray(made, folder, workers=1, batch_size=2) == 5
        found = (folder / "labels.jsonl").read_bytes().splitlines()
        assert sorted(found) == sorted(online.read_bytes().splitlines())
        forbidden = recipe([row | {"response_1": "[[fault=401]]"} for row in make_pairs(2)], judge=asked)
        folder = run_recipe(forbidden, installed_plugins(), tmp_path / "forbidden", only=["sample"]).path
        with pytest.raises(UserError, match="401|key"):
            label_with_ray(forbidden, folder)
