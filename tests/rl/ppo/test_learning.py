"""PPO finds a known optimum, the KL penalty holds it back, and only the right parameters learn."""

from __future__ import annotations

import pytest
import torch
from helpers.ppo_task import WORDS, make_policy, make_trainer
from helpers.tiny import make_scorer
from peft import LoraConfig, get_peft_model

from trl_rlaif.models.shared_model import SharedBase

COEFFICIENTS = [0.0, 0.1, 1.0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Thirty updates at each KL coefficient: the metrics of every update, by coefficient."""
    histories = {}
    for kl_coef in COEFFICIENTS:
        trainer = make_trainer(
            tmp_path_factory.mktemp("run"),
            prompts=32,
            per_device_train_batch_size=32,
            total_episodes=30 * 32,
            num_ppo_epochs=2,
            learning_rate=1e-2,
            lr_scheduler_type="linear",
            kl_coef=kl_coef,
        )
        trainer.train()
        histories[kl_coef] = trainer.state.log_history
    return histories


def _at_the_end(history: list[dict[str, float]], name: str) -> float:
    """Mean over the last five updates: 640 sampled tokens."""
    return sum(entry[name] for entry in history[-5:]) / 5


def test_ppo_reaches_the_known_optimum(runs):
    history = runs[0.0]
    assert history[0]["objective/scores"] < 0.2  # by chance one word in twelve
    assert all(entry["rollout/length"] == 4 for entry in history)
    assert _at_the_end(history, "objective/scores") >= 0.95


def test_a_high_kl_coefficient_keeps_the_policy_where_it_began(runs):
    history = runs[1.0]
    assert _at_the_end(history, "objective/scores") == pytest.approx(history[0]["objective/scores"], abs=0.08)
    assert max(entry["objective/kl"] for entry in history) < 2.5  # nats per response; 30 without a penalty
    assert _at_the_end(history, "objective/kl") < 0.8
    # It stays because of the penalty, not because nothing is learned.
    assert any(abs(entry["objective/kl"]) > 0.1 for entry in history)


def test_kl_and_reward_fall_as_the_coefficient_rises(runs):
    kl = [_at_the_end(runs[c], "objective/kl") for c in COEFFICIENTS]
    scores = [_at_the_end(runs[c], "objective/scores") for c in COEFFICIENTS]
    assert kl[0] > 2 * kl[1] > 4 * kl[2] > 0
    assert scores[0] > 2 * scores[1] > 4 * scores[2]


def _save_adapter(model: torch.nn.Module, folder: object, **options: object) -> str:
    """Save an adapter with random weights; with ``init_lora_weights=True``, it would equal the base."""
    torch.manual_seed(5)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **options)
    get_peft_model(model, config).save_pretrained(folder)
    return str(folder)


def _all_roles(tmp_path) -> SharedBase:
    """A policy that starts from an adapter, which is also the reference, and a reward adapter."""
    start = _save_adapter(make_policy(), tmp_path / "start", task_type="CAUSAL_LM")
    scorer = make_scorer(len(WORDS), hidden_size=64)
    reward = _save_adapter(scorer, tmp_path / "reward", task_type="SEQ_CLS", modules_to_save=["score"])
    shared = SharedBase(make_policy(), start, reference=start)
    shared.add_reward(reward)
    return shared


def _learns(name: str) -> bool:
    return ".policy." in name or ".value." in name or name == "heads.value.weight"


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_only_policy_value_and_value_head_learn_when_every_role_is_there(tmp_path, gradient_checkpointing):
    trainer = make_trainer(
        tmp_path / "run",
        prompts=8,
        model=_all_roles(tmp_path),
        per_device_train_batch_size=8,
        total_episodes=24,
        learning_rate=1e-2,
        gradient_checkpointing=gradient_checkpointing,
    )
    shared = trainer.shared
    parts = ("base_layer", ".policy.", ".value.", ".reward.", ".reference.", "heads.value", "heads.reward")
    assert all(any(part in name for name, _ in shared.named_parameters()) for part in parts)
    received: set[str] = set()
    for name, parameter in shared.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda grad, n=name: received.add(n) if grad.any() else None)
    before = {n: t.detach().clone() for n, t in shared.state_dict(keep_vars=True).items()}
    trainer.train()
    after = shared.state_dict(keep_vars=True)
    changed = {n for n, t in after.items() if not torch.equal(t, before[n])}
    expected = {n for n, _ in shared.named_parameters() if _learns(n)}
    assert received == expected
    assert changed == expected
    assert all(p.grad is None for n, p in shared.named_parameters() if not _learns(n))
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for n, p in shared.named_parameters() if _learns(n)}
