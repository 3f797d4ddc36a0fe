"""A recipe that trains by rejection sampling, from reward to report, on a tiny model."""

from __future__ import annotations

import pytest
import yaml
from helpers.recipes import tiny_recipe, write_recipe
from helpers.tiny import save_tiny_model
from safetensors.torch import load_file

from trl_rlaif import UserError
from trl_rlaif.files import read_lines
from trl_rlaif.memory import plan_memory
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.pipeline.work.ppo import build_trainer
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import packaged_recipes, parse_recipe
from trl_rlaif.rl.rejection import RejectionTrainer

pytestmark = [pytest.mark.trl, pytest.mark.slow]

RL = {
    "algorithm": "rejection_sampling",
    "rewards": ["reward", "helpers.rewards:length_penalty"],
    "selectors": [{"rejection_sampling": {"num_responses": 3, "quantile": [0.2, 0.4]}}],
    "total_episodes": None,  # otherwise it would set the number of iterations
    "num_train_epochs": 3,
}


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    base = tmp_path_factory.mktemp("rejection")
    recipe = tiny_recipe(base, tiny_model, rl=RL)
    return recipe, run_recipe(recipe, installed_plugins(), base / "out")


def test_the_results_are_as_those_of_ppo(finished):
    _, folder = finished
    numbers = folder.results()["rl"]
    rows = [row for row in read_lines(folder / "metrics.jsonl") if row["stage"] == "rl"]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert (numbers["updates"], numbers["episodes"], numbers["prompts"]) == (3, 3 * 30, 10)
    assert numbers["score_first"] == rows[0]["objective/scores"]
    assert (numbers["score_last"], numbers["kl_last"]) == (rows[2]["objective/scores"], rows[2]["objective/kl"])
    names = {"rejection/accepted", "rejection/threshold", "rejection/score", "rollout/length", "loss/sft"}
    assert names <= set(rows[0])
    assert all(row["rejection/score"] > row["objective/scores"] for row in rows)
    test = folder.results()["evaluate"]["sets"]["test"]
    assert test["reward_gain"] is not None and 0 <= test["win_rate"] <= 1
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "rejection/accepted" in page and "Mean score of the responses" in page


def test_what_was_accepted_last_lies_in_the_folder(finished):
    _, folder = finished
    lines = read_lines(folder / "rehearsal.jsonl")
    assert 0 < len(lines) <= 10 and all("the best of 3 to its prompt" in line["why"] for line in lines)
    assert len({str(line["prompt"]) for line in lines}) == len(lines)


def test_a_run_that_was_killed_goes_on_after_its_last_whole_iteration(finished, tiny_model, tmp_path, monkeypatch):
    recipe, whole = finished
    select = RejectionTrainer.select

    def killed(self):
        if self.loop.state.global_step == 2:
            raise KeyboardInterrupt
        return select(self)

    monkeypatch.setattr(RejectionTrainer, "select", killed)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, installed_plugins(), tmp_path / "out")
    monkeypatch.undo()
    drawn = []
    monkeypatch.setattr(RejectionTrainer, "select", lambda self: (drawn.append(1), select(self))[1])
    folder = run_recipe(recipe, installed_plugins(), tmp_path / "out", resume=True)
    assert drawn == [1]  # only the third iteration
    ours, theirs = (load_file(f / "policy" / "adapter_model.safetensors") for f in (folder, whole))
    assert all((ours[k] == theirs[k]).all() for k in theirs)
    ours, theirs = ([r for r in read_lines(f / "metrics.jsonl") if r["stage"] == "rl"] for f in (folder, whole))
    untimed = [[{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows] for rows in (ours, theirs)]
    assert untimed[0] == untimed[1]


def test_the_same_recipe_runs_with_ppo_which_rehearses_what_is_accepted(tiny_model, tmp_path):
    rl = {"algorithm": "ppo", "rewards": ["helpers.rewards:length_penalty"], "total_episodes": 8}
    recipe = tiny_recipe(tmp_path, tiny_model, rl={**RL, **rl}, sample=None, label=None, reward=None, evaluate=None)
    folder = run_recipe(recipe, installed_plugins(), tmp_path / "out")
    assert folder.results()["rl"]["rehearsal"]["pairs"] == len(read_lines(folder / "rehearsal.jsonl")) > 0


def test_it_learns_no_value_adapter(finished):
    recipe, folder = finished
    trainer, _ = build_trainer(Context(recipe, folder, installed_plugins()))
    assert "value" not in trainer.shared.peft.peft_config


def test_nothing_accepted_is_a_users_error(tiny_model, tmp_path):
    rl = {"rewards": ["helpers.rewards:length_penalty"], "selectors": [{"rejection_sampling": {"threshold": 1.0}}]}
    recipe = tiny_recipe(tmp_path, tiny_model, rl={**RL, **rl}, sample=None, label=None, reward=None, evaluate=None)
    with pytest.raises(UserError, match="Nothing was accepted in iteration 1: of 40 responses"):
        run_recipe(recipe, installed_plugins(), tmp_path / "out")
    assert (tmp_path / "out" / "checkpoints" / "rl" / "checkpoint-0").is_dir()


@pytest.mark.parametrize("selectors", [None, [], {}])
def test_a_recipe_without_a_selector_is_refused(tiny_model, tmp_path, selectors):
    path = write_recipe(tmp_path, tiny_model, rl=RL)
    sections = yaml.safe_load(path.read_text())
    sections["rl"].pop("selectors")
    if selectors is not None:
        sections["rl"]["selectors"] = selectors
    path.write_text(yaml.safe_dump(sections))
    with pytest.raises(UserError, match="needs a selector in rl.selectors"):
        parse_recipe(path, registry=installed_plugins().registry)


def test_falling_thresholds_are_refused_where_they_are_written(tiny_model, tmp_path):
    path = write_recipe(tmp_path, tiny_model, rl={**RL, "selectors": [{"rejection_sampling": {"threshold": [2, 1]}}]})
    with pytest.raises(UserError, match="'threshold' in the options of .*rejection_sampling.*increasing numbers"):
        parse_recipe(path, registry=installed_plugins().registry)


def test_the_memory_is_planned(finished):
    plan = plan_memory(finished[0])
    assert any(stage == "rl" for stage, _ in plan.phases())


@pytest.mark.parametrize("changes", [(), ("rl.algorithm=ppo", "rl.selectors=[]")])
def test_the_packaged_recipe_asks_for_as_many_responses_either_way(changes):
    path = packaged_recipes()["rejection_sampling"]
    recipe = parse_recipe(path, overrides=changes, registry=installed_plugins().registry)
    rl = recipe.rl
    assert (rl.algorithm, len(rl.selectors)) == (("ppo", 0) if changes else ("rejection_sampling", 1))
    pool = rl.config["selection_prompts"] * 4
    batch = rl.config["per_device_train_batch_size"] * rl.config["gradient_accumulation_steps"]
    assert rl.config["total_episodes"] % pool == rl.config["total_episodes"] % batch == 0
    if not changes:
        assert rl.selectors[0].options["num_responses"] == 4


def test_on_a_base_in_four_bits_the_adapter_keeps_its_precision(tmp_path):
    """TRL's trainer keeps an adapter that it creates on such a base in bfloat16."""
    model = save_tiny_model(tmp_path / "model", hidden_size=64)
    recipe = tiny_recipe(
        tmp_path, model, model={"quantization": "nf4"},
        rl={**RL, "rewards": ["helpers.rewards:length_penalty"], "num_train_epochs": 2, "learning_rate": 1e-2},
        sample=None, label=None, reward=None, evaluate=None, report=None,
    )  # fmt: skip
    folder = run_recipe(recipe, installed_plugins(), tmp_path / "out")
    weights = load_file(folder / "policy" / "adapter_model.safetensors")
    assert {str(w.dtype) for w in weights.values()} == {"torch.float32"}
    assert any(w.abs().max() > 0 for name, w in weights.items() if "lora_B" in name)
