"""Rehearsal: its gradient against a plain cross-entropy, its batches, its weight, and the user's own pairs."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from helpers.ppo import small_trainer
from helpers.tiny import make_llama, make_tokenizer
from peft import LoraConfig

from trl_rlaif import PPOConfig, RehearsalPair, SharedBase, UserError
from trl_rlaif.models.kernels.fused_lora import fuse_lora
from trl_rlaif.models.role_models import SharedRoleModels
from trl_rlaif.rl import rehearsal
from trl_rlaif.rl.ppo.update_step import PPOStep


def _pairs(count=7):
    torch.manual_seed(3)
    sizes = [(2 + i % 3, 1 + (2 * i) % 5) for i in range(count)]
    prompts, responses = ([torch.randint(3, 60, (n,)).tolist() for n in ns] for ns in zip(*sizes, strict=True))
    return [
        RehearsalPair("p", str(i), None, None, "test", prompt, response)
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]


@pytest.mark.parametrize("tokens", [None, 12])
def test_its_gradient_is_that_of_the_plain_loss_over_response_tokens_alone(tokens):
    shared = SharedBase(make_llama(60), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    shared.add_value()
    shared.double().eval()
    plain, pairs = copy.deepcopy(shared), _pairs()
    fuse_lora(shared.peft)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    args = SimpleNamespace(bf16=False, per_device_train_batch_size=3, micro_batch_tokens=tokens)
    objective = PPOStep(SharedRoleModels(shared), accelerator, args, temperature=0.7)
    nll = objective.rehearse(rehearsal.as_responses(pairs, torch.device("cpu")), coef=0.25)

    total, count = 0.0, 0
    with plain.role("policy"):
        for pair in pairs:
            logits = plain.model(torch.tensor([pair.prompt_ids + pair.response_ids])).logits[0]
            response = logits[len(pair.prompt_ids) - 1 : -1]
            total += torch.nn.functional.cross_entropy(response, torch.tensor(pair.response_ids), reduction="sum")
            count += len(pair.response_ids)
        (0.25 * total / count).backward()
    assert nll.item() == pytest.approx((total / count).item(), rel=1e-6)  # the NLL is summed in float32
    for (name, ours), theirs in zip(shared.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None or not ours.grad.any(), name
        else:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8, msg=name)
    assert any(p.grad is not None and p.grad.any() for p in plain.parameters())


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_an_optimizer_step_holds_it_once_however_many_micro_batches_it_has(tmp_path, micro_batches):
    """With PPO's own losses removed, the gradients of a step are those of rehearsal."""
    size = 4 // micro_batches
    trainer = small_trainer(
        tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=micro_batches, num_ppo_epochs=1,
        num_mini_batches=1, total_episodes=4, rehearsal_coef=2.0, rehearsal_batch_size=3, vf_coef=0.0,
        trainer_kwargs={"rehearsal_dataset": _given(["a fox", "a dog", "the lazy dog jumps"])},
    )  # fmt: skip
    trainer.compute_advantages = lambda rollout, rewards: (torch.zeros_like(rewards), rollout.values)
    before, gradients = copy.deepcopy(trainer.shared), []
    step = trainer.optimizer.step

    def observed():
        if trainer.accelerator.sync_gradients:
            gradients.append({n: p.grad.clone() for n, p in trainer.shared.named_parameters() if p.grad is not None})
        step()

    trainer.optimizer.step = observed
    trainer.train()
    assert len(gradients) == 1
    objective = PPOStep(SharedRoleModels(before), Accelerator(cpu=True), trainer.args, 1.0)
    objective.accelerator.gradient_accumulation_steps = 1
    pairs = rehearsal.as_responses(trainer.rehearsal.pairs, torch.device("cpu"))
    nll = objective.rehearse(pairs, coef=2.0)
    expected = {n: p.grad for n, p in before.named_parameters() if p.grad is not None}
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, expected.get(name, torch.zeros_like(gradient)), rtol=1e-4, atol=1e-6)
    logged = trainer.state.log_history[0]
    assert logged["rehearsal/nll"] == pytest.approx(nll.item(), rel=1e-5)
    assert (logged["rehearsal/coef"], logged["rehearsal/pairs"]) == (2.0, 3)
    assert 0 < logged["time/rehearsal"] < logged["time/update"]


def _given(completions):
    return Dataset.from_dict({"prompt": ["what is that?"] * len(completions), "completion": completions})


def test_a_pair_comes_once_in_a_pass_and_the_place_in_the_pass_is_kept():
    pool = rehearsal.Rehearsal(_pairs(7), SimpleNamespace())
    drawn = [pair.response for _ in range(7) for pair in pool.draw(3)]
    assert sorted(drawn[:7]) == sorted(drawn[7:14]) == sorted(drawn[14:]) == [str(i) for i in range(7)]
    assert drawn[:7] != drawn[7:14]
    pool.draw(2)
    other = rehearsal.Rehearsal(_pairs(7), SimpleNamespace())
    other.load_state_dict(pool.state_dict())
    assert other.draw(9) == pool.draw(9)


def test_what_is_selected_takes_the_place_of_what_was_and_the_users_pairs_stay():
    first, second, empty = _pairs(2), _pairs(5)[2:], RehearsalPair("p", "", 1.0, 0, "empty", [3], [])
    pool = rehearsal.Rehearsal(first, SimpleNamespace())
    pool.fill(_pairs(3))
    pool.fill([*second, empty])
    assert pool.pairs == [*first, *second]


def test_the_weight_over_a_run():
    def at(schedule):
        args = SimpleNamespace(rehearsal_coef=0.4, rehearsal_schedule=schedule)
        return [rehearsal.weight(args, progress) for progress in (0, 0.25, 0.5, 1)]

    assert at("constant") == [0.4] * 4
    assert at("linear") == pytest.approx([0.4, 0.3, 0.2, 0])
    assert at("cosine") == pytest.approx([0.4, 0.4 * (1 + 2**-0.5) / 2, 0.2, 0], abs=1e-12)


def test_pairs_of_the_users_own_are_encoded_as_ppo_sees_them():
    tokenizer = make_tokenizer()
    texts = rehearsal.given_pairs(_given(["a fox", "x" * 60]), tokenizer, max_length=40)
    assert [pair.response for pair in texts] == ["a fox"]  # the other one is too long
    [pair] = texts
    assert pair.prompt_ids == tokenizer("what is that?")["input_ids"]
    assert pair.response_ids == [*tokenizer("a fox", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    user, answer = [{"role": "user", "content": "what is that?"}], [{"role": "assistant", "content": "a fox"}]
    chat = Dataset.from_list([{"prompt": user, "completion": answer}])
    [pair] = rehearsal.given_pairs(chat, tokenizer, max_length=None)
    assert pair.prompt_ids == tokenizer.apply_chat_template(user, add_generation_prompt=True)["input_ids"]
    assert pair.response_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": ["a"], "answer": ["b"]}, "no column 'completion'; it has prompt, answer"),
        ({"prompt": ["a", "a"], "completion": ["b", ""]}, "Row 1 of the rehearsal dataset"),
        ({"prompt": ["a"], "completion": ["b" * 99]}, "longer than 40 tokens"),
    ],
)
def test_pairs_that_cannot_be_used_are_named(columns, message):
    with pytest.raises(UserError, match=message):
        rehearsal.given_pairs(Dataset.from_dict(columns), make_tokenizer(), max_length=40)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rehearsal_coef": -1.0}, "rehearsal_coef is -1.0"),
        ({"rehearsal_schedule": "wavy"}, "rehearsal_schedule is 'wavy'"),
        ({"rehearsal_batch_size": 0}, "rehearsal_batch_size is 0"),
        ({"selection_every": 0}, "selection_every is 0"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, setting, message):
    with pytest.raises(UserError, match=message):
        PPOConfig(str(tmp_path), bf16=False, use_cpu=True, **setting)
