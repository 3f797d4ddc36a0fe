"""Exports: folders, model cards, pushes and refusals. HF_ENDPOINT sends the pushes to a local server."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml
from helpers.hub import fake_hub
from helpers.recipes import run_cli
from helpers.trained import add_trained, make_run
from huggingface_hub import ModelCard
from peft import PeftConfig
from transformers import AutoModelForSequenceClassification

from trl_rlaif import UserError
from trl_rlaif.export import ExportOptions, export_model
from trl_rlaif.files import to_json

RESULTS = {
    "label": {"pairs": 12, "labeled": 10, "judge": "org/judge", "mean_confidence": 0.8,
              "position_bias": {"rate": 0.5, "interval": [0.3, 0.7], "n": 10}},
    "reward": {"accuracy": 0.75, "accuracy_interval": [0.61, 0.86], "eval_pairs": 40, "ece": 0.1234},
    "judge": {"used": True, "sources": {"people": {
        "held_out": 9, "before": {"agreement": {"rate": 0.5, "interval": [0.3, 0.7]}},
        "after": {"agreement": {"rate": 0.8, "interval": [0.6, 0.9]}}}}},
    "evaluate": {"judge": "org/judge", "sets": {"test": {
        "prompts": 50, "win_rate": 0.66, "interval": [0.52, 0.78], "wins": 33, "ties": 0, "losses": 17,
        "reward_gain": {"mean": 0.5, "interval": [0.25, 0.75]}}}},
}  # fmt: skip


@pytest.fixture
def run(tiny_model, tmp_path):
    """A run with a trained policy and reward model, and results."""
    run = make_run(tmp_path, tiny_model, data={"eval_prompts": "org/prompts:test"}, evaluate={"sets": {}})
    for what in ("policy", "reward"):
        add_trained(run, what)
    (run / "results.json").write_text(to_json(RESULTS))
    return run


# ---- Folders --------------------------------------------------------------------------------------------


def test_an_adapter_is_what_the_run_wrote(run, monkeypatch, capsys, tmp_path):
    (run / "policy" / "transform_x.pt").touch()
    code, _ = run_cli(monkeypatch, capsys, "export", run.path, "--what", "policy", "--base", "org/base")
    folder = run / "exports" / "policy"
    assert code == 0
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in (run / "policy").iterdir()} - {"transform_x.pt"} | {"README.md"}
    for name in names - {"README.md", "adapter_config.json"}:
        assert (folder / name).read_bytes() == (run / "policy" / name).read_bytes()
    was, now = (PeftConfig.from_pretrained(place).to_dict() for place in (run / "policy", folder))
    assert now == was | {"base_model_name_or_path": "org/base"}


def test_a_folder_in_use_is_left_alone(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(UserError, match="mine: This path already exists"):
        export_model(run.path, "policy", ExportOptions(output=tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_what_there_is_not_is_refused(run, tiny_model, tmp_path):
    with pytest.raises(UserError, match="no recipe.yaml"):
        export_model(tmp_path / "nowhere", "policy")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(UserError, match="The stage 'judge', which trains the judge, is not part of this run"):
        export_model(run.path, "judge")
    run.begin("rl", "again")
    with pytest.raises(UserError, match="The stage 'rl', which trains the policy, has not completed"):
        export_model(run.path, "policy")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text()) | {"compare": [{"a": {}}]}
    (run / "variants" / "a").mkdir(parents=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match="Name one of them: .*variants/a"):
        export_model(run.path, "reward")


def test_a_damaged_adapter_does_not_travel(run):
    from trl_rlaif.pipeline import digests
    from trl_rlaif.pipeline.stages import STAGES

    digests.complete(run, STAGES["rl"], "made by a test")
    path = run / "policy" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with pytest.raises(UserError, match="not what the stage 'rl' wrote"):
        export_model(run.path, "policy")


def test_a_judge_is_exported_and_one_that_does_not_help_says_so(tiny_model, tmp_path):
    teaching = {"contrasts": ["cut_off"], "model": {"path": tiny_model, "chat_template_kwargs": {"tone": "dry"}}}
    run = add_trained(make_run(tmp_path, tiny_model, judge=teaching), "judge")
    results = RESULTS["judge"]
    (run / "results.json").write_text(to_json({"judge": results}))
    text = (export_model(run.path, "judge").folder / "README.md").read_text()
    assert (
        "Agreement on 9 held-out pairs of the source people: 50.0% (30.0% to 70.0%) before it was taught, 80.0%" in text
    )
    assert "`{'tone': 'dry'}`" in text and "did not help" not in text
    (run / "results.json").write_text(to_json({"judge": results | {"used": False}}))
    text = (export_model(run.path, "judge", ExportOptions(output=tmp_path / "new")).folder / "README.md").read_text()
    assert "it did not help on held-out pairs" in text


# ---- Cards ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "merge", "library", "pipeline", "relation"),
    [
        ("policy", False, "peft", "text-generation", "adapter"),
        ("policy", True, "transformers", "text-generation", "finetune"),
        ("reward", True, "transformers", "text-classification", "finetune"),
    ],
)
def test_the_card_says_what_the_run_found(run, what, merge, library, pipeline, relation):
    folder = export_model(run.path, what, ExportOptions(merge=merge, base="org/base")).folder
    card = ModelCard.load(folder / "README.md")
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.base_model) == (library, pipeline, "org/base")
    assert data.to_dict()["base_model_relation"] == relation and data.license is None
    assert data.datasets == ["org/prompts"]
    assert ("ppo" if what == "policy" else "reward-model") in data.tags
    for line in (
        "- prompts: train.jsonl\n- held-out prompts: org/prompts:test",
        "- judge of the labels: org/judge\n- judge of the win rates: org/judge",
        "| test | win rate over the initial policy | 66.0% | 52.0% to 78.0% | preferred over the initial policy |",
        "| test | mean reward, change | +0.500 | +0.250 to +0.750 | increased |",
        "| held-out pairs | reward model's accuracy | 75.0% | 61.0% to 86.0% | better than chance |",
        "The judge is position-biased: in 50.0% of the pairs,",
        "The same judge gave the labels and the win rate",
    ):
        assert line in card.text, line


# ---- The Hub --------------------------------------------------------------------------------------------


def test_a_model_is_pushed_and_replaced(run, tmp_path, monkeypatch, capsys):
    to = ("export", run.path, "--what", "reward", "--base", "org/base", "--to", "hub", "--repo")
    with fake_hub() as hub:
        command = [sys.executable, "-m", "trl_rlaif", *map(str, to), "rewards"]
        environment = {**os.environ, **hub.environment(tmp_path / "hf")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and f"reward: {hub.endpoint}/me/rewards" in done.stdout, done.stderr
        repo = hub.repos["me/rewards"]
        assert repo.private and repo.commits == ["tiny: reward"] and not (run / "exports").exists()
        adapter = (run / "reward" / "adapter_model.safetensors").read_bytes()
        assert repo.files["adapter_model.safetensors"] == adapter
        assert json.loads(repo.files["adapter_config.json"])["base_model_name_or_path"] == "org/base"

        # The user chooses a license and adds a file; then a merged model replaces the adapter.
        repo.files["README.md"] = repo.files["README.md"].replace(b"---\n", b"---\nlicense: mit\n", 1)
        repo.files["LICENSE"] = b"MIT"
        hub.join(monkeypatch, tmp_path / "hf")
        assert run_cli(monkeypatch, capsys, *to, "me/rewards", "--merge")[0] == 0
        assert {"model.safetensors", "config.json", "LICENSE", "README.md"} <= repo.files.keys()
        assert not any(name.startswith("adapter_") for name in repo.files)
        card = ModelCard(repo.files["README.md"].decode())
        assert card.data.license == "mit" and card.data.library_name == "transformers"
        found = AutoModelForSequenceClassification.from_pretrained("me/rewards", cache_dir=tmp_path / "hf")
        assert found.num_labels == 1 and len(repo.commits) == 2

        hub.join(monkeypatch, tmp_path / "hf", token="hf_wrong")
        code, said = run_cli(monkeypatch, capsys, *to, "other", "--public")
        assert code == 2 and "--repo other: The Hub refused: Invalid username or password" in said
        assert "hf auth login" in said and set(hub.repos) == {"me/rewards"}


def test_a_repository_is_public_if_asked(run, tmp_path, monkeypatch):
    with fake_hub() as hub:
        hub.join(monkeypatch, tmp_path / "hf")
        export_model(
            run.path, "policy", ExportOptions(repo="org/p", public=True, base="org/base", output=tmp_path / "new")
        )
        assert hub.repos["org/p"].private is False
        assert hub.repos["org/p"].files == {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}


def test_what_cannot_be_pushed_costs_nothing(run, monkeypatch, capsys):
    what = ("export", run.path, "--what", "policy")
    code, said = run_cli(monkeypatch, capsys, *what, "--to", "hub", "--repo", "me/x")
    assert code == 2 and "which others do not have" in said and "--base" in said
    code, said = run_cli(monkeypatch, capsys, *what, "--repo", "me/x")
    assert code == 2 and "--to hub and --repo belong together" in said
    hub = (*what, "--base", "org/base", "--to", "hub", "--repo")
    code, said = run_cli(monkeypatch, capsys, *hub, "no/such/name")
    assert code == 2 and "--repo no/such/name" in said and "Write user/model." in said
    code, said = run_cli(monkeypatch, capsys, *hub, "me/x")  # the tests are offline
    assert code == 1 and "The Hub cannot be reached" in said
    assert not (run / "exports").exists()
