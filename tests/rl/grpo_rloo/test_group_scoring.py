"""In RLOO and GRPO, reward transforms get the true KL, without dropout, at TRL's own temperature."""

from __future__ import annotations

import zlib

import pytest
import torch
from helpers.group_processes import NONE
from helpers.recipes import tiny_recipe
from trl_rlaif_regulator import DistributionRegulator

from trl_rlaif import RewardTransform
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.work.grpo_rloo import build_trainer
from trl_rlaif.plugins import installed_plugins

pytestmark = pytest.mark.trl


class Looking(RewardTransform):
    """Records the batches that it gets."""

    needs_kl = True

    def __init__(self):
        super().__init__()
        self.batches = []

    def transform(self, scores, batch):
        self.batches.append(batch)
        return scores


class NotLooking(Looking):
    needs_kl = False


def _trainer(folder, path, algorithm, transform, **sections):
    rl = {"algorithm": algorithm, "rewards": ["helpers.rewards:even_share"], "num_generations": 2, "save_steps": 100}
    sections = {"rl": rl | sections.pop("rl", {})} | NONE | sections
    recipe = tiny_recipe(folder, path, **sections)
    trainer, _, _ = build_trainer(Context(recipe, RunFolder(folder / "out"), installed_plugins()))
    trainer.scorer.rewards.transforms = [transform]
    return trainer


def _move(trainer, seed=0):
    """Move the policy far from its reference."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in trainer.scorer.shared.peft.named_parameters():
        if ".policy." in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def _plain(trainer, rollout, row, role, temperature):
    """(n,) float64 log-probabilities of a row's response: one forward pass, without padding or cache."""
    shared = trainer.scorer.shared
    shared.peft.double().eval()
    prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
    response = rollout.response_ids[row][: rollout.lengths[row]]
    with torch.no_grad(), shared.role(shared.reference if role == "reference" else role):
        logits = shared.model(torch.cat((prompt, response))[None]).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, response[:, None])[:, 0]


@pytest.mark.parametrize(("algorithm", "temperature"), [("grpo", None), ("rloo", 0.8)])
def test_a_transform_that_needs_it_gets_the_kl_of_plain_forward_passes(tiny_model, tmp_path, algorithm, temperature):
    looking = Looking()
    written = {} if temperature is None else {"temperature": temperature}
    model = {"lora": {"r": 4, "alpha": 8, "dropout": 0.4}}
    trainer = _trainer(tmp_path, tiny_model, algorithm, looking, rl=written | {"max_steps": 1}, model=model)
    assert trainer.scorer.args.temperature == trainer.args.temperature == (temperature or 1.0)
    _move(trainer)
    trainer.args.learning_rate = 0.0
    rollouts, score = [], trainer.scorer.rewards.score
    trainer.scorer.rewards.score = lambda rollout, **more: rollouts.append(rollout) or score(rollout, **more)
    trainer.train()
    assert trainer.model.training  # TRL's trainer continues in training mode
    [batch], [rollout] = looking.batches, rollouts
    plain = [
        (_plain(trainer, rollout, row, "policy", trainer.args.temperature)
         - _plain(trainer, rollout, row, "reference", trainer.args.temperature)).sum().item()
        for row in range(len(rollout.prompts))
    ]  # fmt: skip
    assert max(map(abs, plain)) > 0.1
    assert batch.kl.tolist() == pytest.approx(plain, abs=2e-4)


def test_without_such_a_transform_nothing_is_computed_and_nothing_looks_like_a_kl_of_zero(tiny_model, tmp_path):
    looking = NotLooking()
    trainer = _trainer(tmp_path, tiny_model, "grpo", looking, rl={"max_steps": 1})
    trainer.scorer.generator.kl = None
    trainer.train()
    [batch] = looking.batches
    assert batch.kl.isnan().all()


def _rising(prompts, completions, trainer_state, **columns):
    """Scores that rise with the steps on prompts of category a, regardless of the responses."""
    noise = [zlib.crc32(str(completion).encode()) % 1000 / 1000 for completion in completions]
    drift = trainer_state.global_step / 5
    return [n + drift * (c == "a") for n, c in zip(noise, columns["category"], strict=True)]


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_a_planted_drift_raises_an_alarm_in_its_category(tiny_model, tmp_path, algorithm, monkeypatch):
    monkeypatch.setattr("trl_rlaif_regulator.drift.FEWEST", 8)  # a short run
    rl = {"max_steps": 24, "learning_rate": 0.0, "beta": 0.0, "per_device_train_batch_size": 8, "response_length": 4}
    trainer = _trainer(tmp_path, tiny_model, algorithm, DistributionRegulator(kl_budget=0.05), rl=rl)
    trainer.scorer.rewards.functions = [_rising]
    _move(trainer)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "regulator/a/drift" in row]
    assert len(rows) == 24
    assert [any(row[f"regulator/{name}/drift"] for row in rows) for name in ("a", "b")] == [True, False]
