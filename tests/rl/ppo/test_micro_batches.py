"""An optimizer step is the same however its minibatch is split into micro-batches and among processes."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import micro_batches
from helpers.micro_batches import CLIP, GAMMA, ROWS, VF_COEF, pairs, step
from helpers.processes import fork
from torch.nn.functional import cross_entropy

from trl_rlaif.models.shared_model import backbone


def _distance(found, expected):
    """The distance between two sets of gradients, relative to the second."""
    names = {name for name, gradient in expected.items() if gradient.any()}
    assert names == {name for name, gradient in found.items() if gradient.any()} and len(names) > 5
    squares = [sum(x.double().square().sum() for x in xs) for xs in (
        (found[n].double() - expected[n].double() for n in names), (expected[n] for n in names)
    )]  # fmt: skip
    return math.sqrt(squares[0] / squares[1])


def _written_out(seen, *, trunk, rehearse):
    """The gradients of PPO's loss over all tokens of the minibatch, in float64, each sequence by itself."""
    shared, rollout = seen["shared"], seen["rollout"]
    shared.zero_grad()
    policy = value = 0.0
    steps = [min(n + 1, rollout.response_ids.shape[1]) for n in seen["lengths"]]
    for row, n in enumerate(seen["lengths"]):
        prompt, response = rollout.prompt_ids[row][rollout.prompt_mask[row]], rollout.response_ids[row][:n]
        ids = torch.cat((prompt, response))[None]
        ratio = (_logprobs(shared, rollout, row) - rollout.logprobs[row, :n].double()).exp()
        advantage = seen["advantages"][row, :n].double()
        policy -= torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).sum()
        with shared.role("policy" if trunk else "value"):
            hidden = backbone(shared.model)(ids).last_hidden_state[0, len(prompt) - 1 :]
        found = shared.head("value", hidden)[: steps[row], 0]
        old, target = (seen[name][row, : steps[row]].double() for name in ("values", "returns"))
        near = old + (found - old).clamp(-CLIP, CLIP)
        value += 0.5 * torch.maximum((found - target) ** 2, (near - target) ** 2).sum()
    loss = policy / sum(seen["lengths"]) + VF_COEF * value / sum(steps)
    if rehearse:
        nll = 0.0
        for pair in pairs():
            with shared.role("policy"):
                logits = shared.model(torch.tensor([pair.prompt_ids + pair.response_ids])).logits[0]
            response = torch.tensor(pair.response_ids)
            nll += cross_entropy(logits[len(pair.prompt_ids) - 1 : -1], response, reduction="sum")
        loss = loss + GAMMA * nll / sum(len(pair.response_ids) for pair in pairs())
    loss.backward()
    return {n: p.grad for n, p in shared.named_parameters() if p.grad is not None}


def _step(folder, rows, trunk, **options):
    options |= {"value": "trunk"} if trunk else {}
    seen = step(folder, rows, **options)
    assert len(set(seen["lengths"])) >= 5 and max(seen["lengths"]) >= 5 * min(seen["lengths"])
    return seen | {"values": seen["rollout"].values}


def _logprobs(shared, rollout, row):
    """Log-probabilities of a response's tokens, in float64, from a forward pass of that sequence alone."""
    prompt, n = rollout.prompt_ids[row][rollout.prompt_mask[row]], rollout.lengths[row]
    response = rollout.response_ids[row][:n]
    with shared.role("policy"):
        logits = shared.model(torch.cat((prompt, response))[None]).logits[0, len(prompt) - 1 : -1]
    return (logits.double() / (0.7 + 1e-7)).log_softmax(-1).gather(1, response[:, None])[:, 0]


@pytest.mark.parametrize("trunk", [False, True], ids=["adapter", "trunk"])
@pytest.mark.parametrize("rehearse", [False, True], ids=["ppo", "rehearsal"])
def test_every_split_gives_the_gradients_of_the_whole_minibatch(tmp_path, trunk, rehearse):
    """8 x 1, 4 x 2, 2 x 4 and 1 x 8, and a split that is computed in parts."""
    whole = _step(tmp_path / "whole", ROWS, trunk, rehearse=rehearse)
    expected = _written_out(whole, trunk=trunk, rehearse=rehearse)
    assert _distance(whole["gradients"], expected) < 1e-6
    assert 0 < whole["logged"]["policy/clipfrac_avg"] < 1 and 0 < whole["logged"]["val/clipfrac_avg"] < 1
    for rows, options in ((4, {}), (2, {}), (1, {}), (2, {"micro_batch_tokens": 20})):
        seen = _step(tmp_path / f"{rows}{len(options)}", rows, trunk, rehearse=rehearse, **options)
        assert torch.equal(seen["rollout"].response_ids, whole["rollout"].response_ids)
        assert _distance(seen["gradients"], whole["gradients"]) < 1e-6, rows
        timed = ("eps", "time/")
        same = {name: value for name, value in whole["logged"].items() if not name.startswith(timed)}
        assert {name: seen["logged"][name] for name in same} == pytest.approx(same, rel=1e-5, abs=1e-6)


def test_trls_means_are_others(tmp_path):
    """With TRL's reduction, the gradient depends on the split, which our default avoids."""
    options = {"loss_reduction": "micro_batch"}
    whole, split = (_step(tmp_path / str(rows), rows, False, **options) for rows in (ROWS, 1))
    assert _distance(whole["gradients"], _written_out(whole, trunk=False, rehearse=False)) < 1e-6
    assert _distance(split["gradients"], whole["gradients"]) > 0.1


def test_two_processes_take_the_step_of_one(tmp_path):
    results = fork(micro_batches.__file__, tmp_path)
    for trunk in (False, True):
        whole = _step(tmp_path / f"one{trunk}", ROWS, trunk, rehearse=True)
        for rows in (4, 2, 1):
            both = [result[rows, trunk] for result in results]
            assert sorted(both[0]["lengths"] + both[1]["lengths"]) == sorted(whole["lengths"])
            assert sum(both[0]["lengths"]) != sum(both[1]["lengths"])
            for seen in both:
                assert _distance(seen["gradients"], whole["gradients"]) < 1e-6
                for name in ("loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "policy/entropy_avg",
                             "policy/clipfrac_avg", "val/clipfrac_avg", "val/ratio", "rehearsal/nll"):  # fmt: skip
                    assert seen["logged"][name] == pytest.approx(whole["logged"][name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("reduction", ["minibatch", "micro_batch"])
@pytest.mark.parametrize("rows", [ROWS, 1])
def test_an_update_ends_at_the_limit_per_token(tmp_path, rows, reduction):
    """It ends before the third epoch if the first step moved the policy too far; half of all positions are padding."""
    options = {"num_ppo_epochs": 3, "learning_rate": 1e-2, "loss_reduction": reduction}
    seen = _step(tmp_path / "free", rows, False, **options)
    rollout, moved, tokens = seen["rollout"], 0.0, sum(seen["lengths"])
    assert tokens < 0.6 * rollout.response_ids.numel() and seen["logged"]["policy/epochs"] == 3
    for row, n in enumerate(seen["lengths"]):
        moved += (
            0.5 * (_logprobs(seen["moved"], rollout, row) - rollout.logprobs[row, :n]).square().sum().item() / tokens
        )
    for factor, epochs in ((0.999, 2), (1.001, 3)):
        found = _step(tmp_path / f"{factor}", rows, False, max_update_kl=factor * moved, **options)
        assert found["logged"]["policy/epochs"] == epochs, (factor, moved)
