"""Gradients that are not finite stop every trainer and leave the weights alone; cuDNN attention is off meanwhile."""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from bitsandbytes.optim import PagedAdamW8bit
from datasets import Dataset
from helpers.group_processes import NONE
from helpers.ppo import small_trainer
from helpers.recipes import tiny_recipe, write_recipe
from helpers.reward import small_config
from helpers.tiny import make_llama, make_scorer, make_tokenizer
from peft import LoraConfig
from transformers import TrainerCallback, TrainerState
from trl_rlaif_rehearsal.rejection import RejectionSampling

from trl_rlaif import RewardTrainer, RunError, cli
from trl_rlaif.models import safe_training
from trl_rlaif.models.safe_training import _GradientCheck, check_gradients, page_again
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.work.grpo_rloo import build_trainer
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.rl.rejection import RejectionTrainer
from trl_rlaif.states import load_state, save_state

pytestmark = pytest.mark.trl


@pytest.fixture
def passes(monkeypatch):
    """Makes the second backward pass give NaN, and records for each whether cuDNN attention was enabled."""
    seen, backward = [], Accelerator.backward

    def poisoned(self, loss, **kwargs):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        backward(self, loss * (float("nan") if len(seen) == 2 else 1.0), **kwargs)

    monkeypatch.setattr(Accelerator, "backward", poisoned)
    return seen


class Weights(TrainerCallback):
    """Records the trained weights after each step."""

    def __init__(self, model):
        self.model, self.steps = model, []

    def now(self):
        return {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}

    def on_step_end(self, *args, **kwargs):
        self.steps.append(self.now())


def _stops(train, trainer, weights, passes, update):
    trainer.add_callback(weights)
    weights.steps.append(weights.now())
    callbacks = list(trainer.callback_handler.callbacks)
    with pytest.raises(RunError, match=rf"stopped at update {update}: its gradients are not finite \(.* the first is"):
        train()
    assert passes == [False] * len(passes) and torch.backends.cuda.cudnn_sdp_enabled()
    assert trainer.callback_handler.callbacks == callbacks
    now = weights.now()
    assert now and all(value.isfinite().all() for value in now.values())
    for name, value in weights.steps[update - 1].items():
        assert torch.equal(value, now[name]), name


def test_ppo(tmp_path, passes):
    trainer = small_trainer(tmp_path)  # value and policy have separate backward passes
    _stops(trainer.train, trainer, Weights(trainer.model), passes, update=1)


def test_rejection_sampling(tmp_path, passes):
    selector = RejectionSampling(num_responses=2)
    trainer = small_trainer(tmp_path, trainer_kwargs={"data_selectors": [selector]}, gradient_accumulation_steps=2)
    _stops(RejectionTrainer.of(trainer, 2).train, trainer, Weights(trainer.shared.peft), passes, update=1)


def test_reward(tmp_path, passes):
    rows = [{"chosen_ids": [5, 6, 7, i], "rejected_ids": [5, 6, 8, i, 9], "p": 0.8} for i in range(10, 18)]
    trainer = RewardTrainer(
        model=make_scorer(),
        args=small_config(tmp_path, per_device_train_batch_size=4),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=4, task_type="SEQ_CLS", target_modules="all-linear", modules_to_save=["score"]),
    )
    _stops(trainer.train, trainer, Weights(trainer.model), passes, update=2)


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_rloo_and_grpo(tiny_model, tmp_path, passes, algorithm):
    options = {"algorithm": algorithm, "rewards": ["helpers.rewards:even_share"], "num_generations": 4}
    options |= {"per_device_train_batch_size": 8, "total_episodes": 48}
    recipe = tiny_recipe(tmp_path, tiny_model, rl=options, **NONE)
    trainer, _, _ = build_trainer(Context(recipe, RunFolder(tmp_path / "out"), installed_plugins()))
    _stops(trainer.train, trainer, Weights(trainer.model), passes, update=2)


def test_a_stage_ends_with_exit_code_1_and_without_a_model(tiny_model, tmp_path, passes, monkeypatch, capsys):
    rows = [{"prompt": f"what is {i}?", "completion": "a fox"} for i in range(8)]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = {"data": "sft.jsonl", "max_steps": 3, "per_device_train_batch_size": 2, "save_steps": 1}
    recipe = write_recipe(tmp_path, tiny_model, sft=section)
    monkeypatch.setattr(
        sys, "argv", ["trl-rlaif", "run", str(recipe), "--output", str(tmp_path / "out"), "--only", "sft"]
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1 and passes == [False, False]
    assert "stopped at update 2: its gradients are not finite" in capsys.readouterr().err
    folder = tmp_path / "out"
    assert not (folder / "sft").exists()
    assert [p.name for p in folder.rglob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(bad):
    model = make_llama(20)
    check_gradients(model, 1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    check_gradients(model, 1)
    name, parameter = list(model.named_parameters())[5]
    parameter.grad.view(-1)[3] = bad
    with pytest.raises(RunError, match=rf"update 7: .* \(1 of \d+ tensors, the first is {name}\)"):
        check_gradients(model, 7)


def test_weights_are_checked_where_gradients_are_kept_elsewhere():
    model = make_llama(20)
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(RunError, match="lm_head"):
        check_gradients(model, 1)


def test_the_overflows_of_fp16_are_its_scalers():
    model = torch.nn.Linear(1, 1)
    model.weight.grad, model.bias.grad = torch.full((1, 1), math.inf), torch.zeros(1)
    state, check = TrainerState(), _GradientCheck()
    check.on_pre_optimizer_step(SimpleNamespace(fp16=True), state, None, model=model)
    with pytest.raises(RunError):
        check.on_pre_optimizer_step(SimpleNamespace(fp16=False), state, None, model=model)


# ---- Paged optimizers -----------------------------------------------------------------------------------


class Paged(PagedAdamW8bit):
    """bitsandbytes' optimizer as on a GPU: large states are in paged memory, which a CPU does not have."""

    def get_state_buffer(self, p, dtype=torch.float32):
        buffer = torch.zeros_like(p, dtype=dtype)
        if p.numel() >= 1e5:
            buffer.is_paged = True
            self.page_mng.paged_tensors.append(buffer)
        return buffer

    def prefetch_state(self, p):
        pass


def _paged(optimizer):
    known = [id(buffer) for buffer in optimizer.page_mng.paged_tensors]
    return [id(state[name]) in known for state in optimizer.state.values() for name in ("state1", "state2")]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported")
def test_states_that_were_paged_are_paged_after_a_resumption(tmp_path):
    torch.manual_seed(0)
    start = [torch.randn(120_000), torch.randn(5000)]
    gradients = [[torch.randn_like(x) for x in start] for _ in range(3)]

    def step(optimizer, parameters, number):
        for parameter, gradient in zip(parameters, gradients[number], strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()

    whole = [torch.nn.Parameter(x.clone()) for x in start]
    first = Paged(whole)
    step(first, whole, 0)
    step(first, whole, 1)
    assert _paged(first) == [True, True, False, False]
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in whole]
    second = Paged(resumed)
    save_state(first.state_dict(), tmp_path / "optimizer.pt")
    second.load_state_dict(load_state(tmp_path / "optimizer.pt"))
    assert second.state[resumed[0]]["state1"].is_paged and _paged(second) == [False] * 4  # only the mark is kept
    page_again(SimpleNamespace(optimizer=second))  # as accelerate wraps it
    assert _paged(second) == [True, True, False, False]
    before = [id(value) for state in second.state.values() for value in state.values()]
    page_again(second)
    assert before == [id(value) for state in second.state.values() for value in state.values()]
    step(first, whole, 2)
    step(second, resumed, 2)
    assert all(map(torch.equal, whole, resumed))


def test_other_optimizers_are_left_alone():
    parameter = torch.nn.Parameter(torch.ones(120_000))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = dict(optimizer.state[parameter])
    page_again(optimizer)
    page_again(None)
    assert all(optimizer.state[parameter][name] is value for name, value in before.items())


def test_every_loop_pages_its_optimizers_states(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(safe_training, "page_again", seen.append)
    trainer = small_trainer(tmp_path)
    trainer.train()
    rows = [{"chosen_ids": [5, 6, 7, i], "rejected_ids": [5, 6, 8, i, 9], "p": 0.8} for i in range(10, 14)]
    args = small_config(tmp_path, per_device_train_batch_size=4, max_steps=1)
    reward = RewardTrainer(
        model=make_scorer(), args=args, train_dataset=Dataset.from_list(rows), processing_class=make_tokenizer()
    )
    reward.train()
    found = [getattr(optimizer, "optimizer", optimizer) for optimizer in seen]
    assert found == [getattr(t.optimizer, "optimizer", t.optimizer) for t in (trainer, reward)]
