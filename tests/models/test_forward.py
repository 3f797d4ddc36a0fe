"""The loop's forward and backward passes: padding, splitting into parts and a shared trunk change no number."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from helpers.tiny import make_llama
from peft import LoraConfig
from transformers import Gemma2Config, Gemma2ForCausalLM

from trl_rlaif import SharedBase
from trl_rlaif.models import forward
from trl_rlaif.models.forward import RolloutSlice
from trl_rlaif.models.kernels import is_plain
from trl_rlaif.models.kernels.fused_lora import fuse_lora
from trl_rlaif.models.role_models import SharedRoleModels
from trl_rlaif.models.shared_model import backbone
from trl_rlaif.rl.ppo import losses
from trl_rlaif.rl.ppo.update_step import MicroBatch, PPOStep, divisors_of, parts
from trl_rlaif.types import Rollout

TEMPERATURE, CLIP, VF_COEF = 0.7, 0.2, 0.3
PROMPTS, LENGTHS = (2, 5, 3, 1, 4, 5), (6, 0, 3, 1, 6, 2)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def _rollout(prompts=PROMPTS, lengths=LENGTHS, *, old=None) -> Rollout:
    """Random tokens, also after the ends of responses; old log-probabilities and values as given, or zero."""
    torch.manual_seed(1)
    rows, wide, long = len(prompts), max(prompts), max(1, *lengths)
    prompt_mask = torch.arange(wide) >= wide - torch.tensor(prompts)[:, None]
    zeros = torch.zeros(rows, long)
    return Rollout(
        prompt_ids=torch.randint(3, 60, (rows, wide)),
        prompt_mask=prompt_mask,
        response_ids=torch.randint(3, 60, (rows, long)),
        lengths=torch.tensor(lengths),
        ended=torch.zeros(rows, dtype=torch.bool),
        logprobs=zeros if old is None else old[0],
        ref_logprobs=zeros,
        values=zeros if old is None else old[1],
        prompts=[""] * rows,
        completions=[""] * rows,
    )


def _gemma2(vocab_size: int):
    """Caps its logits, and every other layer has a window of four tokens. (Its masks cannot be float64.)"""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 3.0}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=vocab_size, initializer_range=0.3, **sizes, **heads, **ids)).eval()


def _shared(*, trunk: bool = False, base=None, dtype: torch.dtype = torch.float64) -> SharedBase:
    base = base or make_llama(60)
    torch.manual_seed(2)
    shared = SharedBase(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    shared.add_value(trunk=trunk)
    torch.nn.init.normal_(shared.heads["value"].weight)
    return shared.to(dtype).eval()


def _alone(shared: SharedBase, part: str | None, rollout: Rollout, row: int):
    """Log-probabilities and entropies of an unpadded response, and hidden states from the last prompt token on."""
    prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
    response = rollout.response_ids[row][: rollout.lengths[row]]
    with shared.role(part):
        ids = torch.cat((prompt, response))[None]
        hidden, logits = backbone(shared.model)(ids).last_hidden_state[0], shared.model(ids).logits[0]
    logs = (logits.double() / TEMPERATURE).log_softmax(-1)[len(prompt) - 1 : -1]
    entropy = -(logs.exp() * logs).sum(-1)
    return logs.gather(1, response[:, None])[:, 0], entropy, hidden[len(prompt) - 1 :]


@torch.no_grad()
@pytest.mark.parametrize("base", [make_llama, _gemma2])
@pytest.mark.parametrize("part", ["policy", "reference"])
def test_logprobs_are_those_of_each_sequence_alone(base, part):
    shared, rollout = _shared(base=base(60), dtype=torch.float64 if base is make_llama else torch.float32), _rollout()
    assert is_plain(shared.model) == (base is make_llama)
    for rows in torch.tensor([0, 1, 2, 3, 4, 5]), torch.tensor([3, 2]), torch.tensor([1]):
        rollout_slice = RolloutSlice.of(rollout, rows)
        logprobs, entropy = forward.logprobs(SharedRoleModels(shared), part, rollout_slice, TEMPERATURE)
        assert logprobs.shape == entropy.shape == (len(rows), rollout_slice.width) and logprobs.dtype == torch.float32
        assert not logprobs[~rollout_slice.mask].any() and not entropy[~rollout_slice.mask].any()
        for found, row in zip(logprobs, rows.tolist(), strict=True):
            expected = _alone(shared, "policy" if part == "policy" else None, rollout, row)
            torch.testing.assert_close(found[: len(expected[0])].double(), expected[0], **CLOSE)
        if base is _gemma2:  # the fallback also gives entropies without gradients
            torch.testing.assert_close(entropy[-1][: len(expected[1])].double(), expected[1], **CLOSE)


@pytest.mark.parametrize(("trunk", "base"), [(False, make_llama), (True, make_llama), (True, _gemma2)])
def test_values_and_what_one_pass_gives_are_those_of_each_sequence_alone(trunk, base):
    shared = _shared(trunk=trunk, base=base(60), dtype=torch.float64 if base is make_llama else torch.float32)
    rollout = _rollout()
    role_models = SharedRoleModels(shared)
    assert role_models.one_trunk == trunk
    for rows in torch.tensor([5, 4, 3, 2, 1, 0]), torch.tensor([3, 2]), torch.tensor([1]):
        rollout_slice = RolloutSlice.of(rollout, rows)
        values = forward.values(role_models, rollout_slice)
        assert values.shape == (len(rows), rollout_slice.value_width) and values.dtype == torch.float32
        if trunk:
            logprobs, entropy, again = forward.policy_and_value(role_models, rollout_slice, TEMPERATURE)
            torch.testing.assert_close(again, values, rtol=0, atol=0)
        for i, row in enumerate(rows.tolist()):
            expected = _alone(shared, "policy" if trunk else "value", rollout, row)
            steps = rollout_slice.learned[1][i].sum()
            assert steps == min(LENGTHS[row] + 1, 6)
            torch.testing.assert_close(values[i, :steps], shared.head("value", expected[2])[:steps, 0].float(), **CLOSE)
            if trunk:
                torch.testing.assert_close(logprobs[i, : LENGTHS[row]].double(), expected[0], **CLOSE)
                torch.testing.assert_close(entropy[i, : LENGTHS[row]].double(), expected[1], **CLOSE)


@pytest.mark.parametrize(
    ("rows", "width", "value_width", "prompt"),
    [([0, 3], 6, 6, 2), ([2, 3], 3, 4, 3), ([1], 1, 2, 5), ([1, 5], 2, 3, 5)],
)
def test_a_passage_is_no_wider_than_its_rows(rows, width, value_width, prompt):
    rollout_slice = RolloutSlice.of(_rollout(), torch.tensor(rows))
    assert (rollout_slice.width, rollout_slice.value_width) == (width, value_width)
    assert rollout_slice.tokens.shape == rollout_slice.mask.shape == (len(rows), width)
    assert rollout_slice.mask.sum(1).tolist() == [LENGTHS[row] for row in rows]
    assert rollout_slice.learned[1].sum(1).tolist() == [min(LENGTHS[row] + 1, 6) for row in rows]
    whole, short = rollout_slice.inputs(last=True), rollout_slice.inputs(last=False)
    assert whole["input_ids"].shape == (len(rows), prompt + width)
    assert all(torch.equal(short[name], whole[name][:, :-1]) for name in whole)


def _micro_batch(rollout: Rollout, rows=None) -> MicroBatch:
    torch.manual_seed(4)
    advantages, returns = torch.randn(2, *rollout.response_ids.shape)
    rows = torch.arange(len(rollout.prompts)) if rows is None else rows
    [divisors] = divisors_of(rollout, [rows], Accelerator(cpu=True))
    return MicroBatch(rollout, advantages, returns, rows, divisors)


@pytest.mark.parametrize("tokens", [1, 7, 12, 20, 33, 1000])
def test_parts_hold_every_row_once_in_order_within_the_budget(tokens):
    torch.manual_seed(tokens)
    rollout = _rollout(torch.randint(1, 9, (20,)).tolist(), torch.randint(1, 9, (20,)).tolist())
    rows = torch.randperm(20)[:17]

    def size(part):
        return RolloutSlice.of(rollout, part).inputs(last=True)["input_ids"].numel()

    found = list(parts(rollout, rows, tokens))
    assert torch.equal(torch.cat(found), rows)
    assert all(size(part) <= tokens for part in found if len(part) > 1)
    for part, following in zip(found, found[1:], strict=False):  # as few parts as the order allows
        assert size(torch.cat((part, following[:1]))) > tokens
    assert torch.equal(next(parts(rollout, rows, None)), rows)


def _old(shared: SharedBase, prompts=PROMPTS, lengths=LENGTHS) -> Rollout:
    """A rollout of a policy close to the current one: some ratios and values are clipped."""
    rollout = _rollout(prompts, lengths)
    logprobs, values = torch.zeros(rollout.response_ids.shape), torch.zeros(rollout.response_ids.shape)
    rollout_slice = RolloutSlice.of(rollout, torch.arange(len(prompts)))
    with torch.no_grad():
        logprobs[:, : rollout_slice.width], _ = forward.logprobs(
            SharedRoleModels(shared), "policy", rollout_slice, TEMPERATURE
        )
        values[:, : rollout_slice.value_width] = forward.values(SharedRoleModels(shared), rollout_slice)
    old = [x + 0.3 * torch.randn(x.shape) for x in (logprobs, values)]
    return _rollout(prompts, lengths, old=[x * m for x, m in zip(old, rollout.masks(), strict=True)])


def _backward(
    shared: SharedBase, batch: MicroBatch, *, tokens: int | None = None, bf16: bool = False, pads: bool = True
):
    """Gradients by name, and statistics."""
    args = SimpleNamespace(bf16=bf16, micro_batch_tokens=tokens, vf_coef=VF_COEF, cliprange=CLIP, cliprange_value=CLIP)
    shared.zero_grad()
    stats = PPOStep(SharedRoleModels(shared), Accelerator(cpu=True), args, TEMPERATURE, pads).backward(batch)
    return {n: p.grad for n, p in shared.named_parameters() if p.grad is not None}, stats


def _assert_equal(found, expected, **tolerance):
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() and len(one) > 5
        for name in one:
            torch.testing.assert_close(one[name], other[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("trunk", [False, True])
@pytest.mark.parametrize("tokens", [1, 14, 20])
def test_parts_add_up_to_the_whole(trunk, tokens):
    shared = _shared(trunk=trunk)
    batch = _micro_batch(_old(shared, (2, 5, 3, 1, 4, 5), (6, 1, 3, 1, 6, 2)))
    assert len(list(parts(batch.rollout, batch.rows, tokens))) > 1
    whole = _backward(shared, batch)
    assert all(0 < whole[1][f"{name}/clipfrac_avg"] < 1 for name in ("policy", "val"))
    _assert_equal(_backward(shared, batch, tokens=tokens), whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("trunk", [False, True])
@pytest.mark.parametrize("tokens", [None, 12])
def test_prompts_of_equal_length_add_up_to_the_whole_and_are_never_padded(trunk, tokens, monkeypatch):
    shared, seen, inputs = _shared(trunk=trunk), [], RolloutSlice.inputs
    batch = _micro_batch(_old(shared))
    whole = _backward(shared, batch)
    monkeypatch.setattr(RolloutSlice, "inputs", lambda *a, **k: seen.append(inputs(*a, **k)) or seen[-1])
    _assert_equal(_backward(shared, batch, tokens=tokens, pads=False), whole, rtol=1e-5, atol=1e-7)
    assert len(seen) >= len(set(PROMPTS)) and all(found["attention_mask"][:, 0].all() for found in seen)


@pytest.mark.parametrize("trunk", [False, True])
@pytest.mark.parametrize("tokens", [1, 12])
def test_parts_with_empty_responses_add_up_too(trunk, tokens):
    shared = _shared(trunk=trunk)
    batch = _micro_batch(_old(shared, lengths=(6, 0, 3, 0, 6, 0)))
    _assert_equal(_backward(shared, batch, tokens=tokens), _backward(shared, batch), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("trunk", [False, True])
def test_empty_responses_alone_teach_the_value_only(trunk):
    """Their only step has a value and a return, but no token."""
    shared = _shared(trunk=trunk)
    gradients, stats = _backward(shared, _micro_batch(_old(shared, (2, 3), (0, 0))))
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert all(value.isfinite() for value in stats.values())
    assert gradients["heads.value.weight"].any()
    assert trunk or not any(gradient.any() for name, gradient in gradients.items() if ".policy." in name)


@pytest.mark.parametrize("trunk", [False, True])
def test_gradients_are_those_of_the_two_losses(trunk):
    """Against plain autograd through each sequence alone."""
    shared = _shared(trunk=trunk)
    batch = _micro_batch(_old(shared), rows := torch.tensor([5, 0, 3, 1]))
    rollout, masks = batch.rollout, [mask[rows] for mask in batch.rollout.masks()]
    logprobs, values = torch.zeros(masks[0].shape).double(), torch.zeros(masks[0].shape).double()
    for i, row in enumerate(rows.tolist()):
        logprobs[i, : LENGTHS[row]] = _alone(shared, "policy", rollout, row)[0]
        found = shared.head("value", _alone(shared, "policy" if trunk else "value", rollout, row)[2])[:, 0]
        values[i, : LENGTHS[row] + 1] = found[: values.shape[1]]
    p_loss, _ = losses.policy_loss(logprobs, rollout.logprobs[rows], batch.advantages[rows], masks[0], CLIP)
    v_loss, _ = losses.value_loss(values, rollout.values[rows], batch.returns[rows], masks[1], CLIP)
    shared.zero_grad()
    (p_loss + VF_COEF * v_loss).backward()
    expected = {n: p.grad for n, p in shared.named_parameters() if p.grad is not None}
    gradients, stats = _backward(shared, batch)
    _assert_equal([gradients], [expected], rtol=1e-5, atol=1e-6)
    assert stats["loss/policy_avg"].item() == pytest.approx(p_loss.item(), rel=1e-5)
    assert stats["loss/value_avg"].item() == pytest.approx(v_loss.item(), rel=1e-5)


@pytest.mark.parametrize("trunk", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_gradient_checkpointing_changes_no_gradient(trunk, bf16):
    shared = _shared(trunk=trunk, dtype=torch.float32).train()
    fuse_lora(shared.peft)
    batch = _micro_batch(_old(shared))
    plain = _backward(shared, batch, tokens=20, bf16=bf16)
    shared.peft.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert shared.model.is_gradient_checkpointing
    _assert_equal(_backward(shared, batch, tokens=20, bf16=bf16), plain, rtol=0, atol=0)
