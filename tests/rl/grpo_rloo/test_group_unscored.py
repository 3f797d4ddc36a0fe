"""RLOO and GRPO with rewards that are missing for some responses, or weighted, as in PPO."""

from __future__ import annotations

import pytest
import torch
from helpers.group_processes import NONE
from helpers.recipes import tiny_recipe
from trl_rlaif_direct import DirectLabeler

from trl_rlaif import UserError
from trl_rlaif.files import read_lines
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.pipeline.work.grpo_rloo import build_trainer
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.testing import ScriptedJudge

pytestmark = pytest.mark.trl

MISSING = (1, 6)


def _trainer(folder, model, algorithm, rewards=("helpers.rewards:even_share",), **options):
    plain = {"rewards": list(rewards), "num_generations": 4, "kl_coef": 0.5, "learning_rate": 1e-3}
    plain |= {"algorithm": algorithm, "per_device_train_batch_size": 8, "total_episodes": 48}
    recipe = tiny_recipe(folder, model, rl=plain | options, **NONE)
    trainer, _, _ = build_trainer(Context(recipe, RunFolder(folder / "out"), installed_plugins()))
    trainer.scorer.state = trainer.state
    return trainer


def _partly(function):
    def part(**given):
        return [None if i in MISSING else score for i, score in enumerate(function(**given))]

    return part


def _gradients(trainer, inputs):
    trainer.model.zero_grad()
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_a_response_without_a_reward_has_no_gradient_and_no_part_in_the_baseline(tiny_model, tmp_path, algorithm):
    trainer = _trainer(tmp_path, tiny_model, algorithm)
    trainer.scorer.rewards.functions = [_partly(trainer.scorer.rewards.functions[0])]
    with torch.no_grad():  # away from the reference, so that its KL has a gradient
        generator = torch.Generator().manual_seed(0)
        for name, p in trainer.model.named_parameters():
            if "lora_B" in name and p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [row for row in trainer.train_dataset.select(range(2)) for _ in range(4)]
    inputs = trainer._generate_and_score_completions(rows)
    advantages = inputs["advantages"].double().view(2, 4)
    rewards = torch.tensor(list(trainer._logs["rewards"]["score"])[-8:], dtype=torch.float64)
    assert rewards.isnan().nonzero()[:, 0].tolist() == list(MISSING)
    if algorithm == "grpo":
        for i, of_group in enumerate(rewards.view(2, 4)):
            known = of_group[~of_group.isnan()]
            wanted = ((of_group - known.mean()) / (known.std() + 1e-4)).nan_to_num(0)
            torch.testing.assert_close(advantages[i], wanted, rtol=1e-4, atol=1e-5)
    assert (advantages.view(-1)[list(MISSING)] == 0).all()
    whole = _gradients(trainer, inputs)
    assert max(g.abs().max() for g in whole.values()) > 1e-4
    # The gradient does not depend on those two responses.
    others = inputs["completion_ids"].clone()
    others[list(MISSING)] = (others[list(MISSING)] + 7) % 300
    for name, gradient in _gradients(trainer, inputs | {"completion_ids": others}).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-5, atol=1e-6)


@pytest.fixture
def judged(monkeypatch):
    """The labeler `direct` with a judge that fails the calls for which ``fails`` is true."""
    state = {"calls": 0, "fails": lambda number: number % 50 == 0}

    class Dropping(DirectLabeler):
        def __call__(self, prompts, completions, **columns):
            self.judge = ScriptedJudge(self.rule)
            return super().__call__(prompts, completions, **columns)

        def rule(self, context, response):
            state["calls"] += 1
            if state["fails"](state["calls"]):
                return "the connection was dropped"
            return [float(len(response) % 7 == i) for i in range(10)]

    registered = installed_plugins().registry.find("labeler", "direct")
    monkeypatch.setitem(vars(registered), "component", Dropping)
    return state


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "grpo"])
def test_a_run_finishes_with_a_judge_that_drops_one_call_in_fifty(tiny_model, tmp_path, judged, algorithm):
    rl = {"algorithm": algorithm, "rewards": ["direct"], "total_episodes": 104, "per_device_train_batch_size": 8}
    rl |= {"save_steps": 100} | ({} if algorithm == "ppo" else {"num_generations": 4})
    folder = run_recipe(tiny_recipe(tmp_path, tiny_model, rl=rl, **NONE), installed_plugins(), tmp_path / "out")
    results, rows = folder.results()["rl"], read_lines(folder / "metrics.jsonl")
    assert judged["calls"] == 104 and results["unscored"] == 2 and results["updates"] == 13
    shares = [row["rollout/unscored"] for row in rows if "rollout/unscored" in row]
    assert sum(shares) == pytest.approx(2 / 8) and results["rewards"]["direct"]["weight"] == 1


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_too_many_stop_the_run_with_a_checkpoint_and_it_resumes(tiny_model, tmp_path, judged, algorithm):
    judged["fails"] = lambda number: number > 16
    rl = {"algorithm": algorithm, "rewards": ["direct"], "total_episodes": 64, "per_device_train_batch_size": 8}
    rl |= {"save_strategy": "no", "num_generations": 4}
    recipe = tiny_recipe(tmp_path, tiny_model, rl=rl, **NONE)
    with pytest.raises(UserError, match="16 of the last 32 responses.*'direct' failed for 16: the connection"):
        run_recipe(recipe, installed_plugins(), tmp_path / "out")
    assert list((tmp_path / "out").rglob("checkpoint-4/trl_rlaif.pt"))
    judged["fails"] = lambda number: False
    folder = run_recipe(recipe, installed_plugins(), tmp_path / "out", resume=True)
    results = folder.results()["rl"]
    assert results["updates"] == 8 and results["unscored"] == 16


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_weights_of_a_recipe_are_those_of_the_rewards(tiny_model, tmp_path, algorithm):
    rewards = [{"helpers.rewards:length_penalty": 2.0}, "helpers.rewards:even_share"]
    rl = {"algorithm": algorithm, "rewards": rewards, "total_episodes": 8} | (
        {} if algorithm == "ppo" else {"num_generations": 4}
    )
    folder = run_recipe(tiny_recipe(tmp_path, tiny_model, rl=rl, **NONE), installed_plugins(), tmp_path / "out")
    for row in read_lines(folder / "metrics.jsonl"):
        if "objective/scores" in row:
            wanted = 2 * row["score/length_penalty"] + row["score/even_share"]
            assert row["objective/scores"] == pytest.approx(wanted, abs=1e-6)
            assert row["rewards/length_penalty/weight"] == 2
    found = folder.results()["rl"]["rewards"]
    assert {name: one["weight"] for name, one in found.items()} == {"length_penalty": 2, "even_share": 1}
