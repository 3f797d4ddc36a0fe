"""Scores between the steps of a trainer, and pools joined from batches."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState

from trl_rlaif.rl.scoring import RewardPipeline, Scores
from trl_rlaif.testing import make_rollout


def _pipeline(functions, **options):
    settings = {"reward_weights": None, "reward_normalization": "none", "max_failed": 1.0, "reward_timeout": None}
    shaping = {"whiten_scores": False, "score_clip": None, "missing_eos_penalty": None, "length_penalty": 0.0}
    state = PartialState()
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1, gather=lambda x: x, state=state)
    reader = SimpleNamespace(stop_ids=(2,))
    return RewardPipeline(functions, [], None, SimpleNamespace(**settings | shaping | options), reader, accelerator)


def _lengths(prompts, completions, completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]


def test_arithmetic_acts_on_the_total_alone():
    parts = {"a": torch.tensor([1.0, 2.0])}
    scores = 0.5 * Scores(torch.tensor([1.0, float("nan")]), raw=parts, parts=parts) + 1
    assert scores.total[0] == 1.5 and scores.parts is parts and scores.raw is parts
    assert scores.scored.tolist() == [True, False]


def test_a_pool_is_normalized_as_a_whole():
    pipeline, rollouts = _pipeline([_lengths], reward_normalization="batch"), [make_rollout(4), make_rollout(3)]
    before = pipeline.sum.state_dict()
    found = pipeline.joined([pipeline.score(rollout) for rollout in rollouts], before)
    lengths = torch.cat([rollout.lengths for rollout in rollouts]).float()
    wanted = (lengths - lengths.mean()) / lengths.std()
    torch.testing.assert_close(found.total, wanted, rtol=1e-5, atol=1e-6)
    assert pipeline.take_metrics(found)["score/_lengths"] == pytest.approx(lengths.mean().item())  # counted once


def test_what_an_override_returns_needs_no_parts():
    pipeline, rollout = _pipeline([_lengths], score_clip=1.0), make_rollout(3)
    found = pipeline.transform(Scores.of(torch.tensor([5.0, -0.5, float("nan")])), rollout, rollout.kl())
    assert found.total[:2].tolist() == [1.0, -0.5] and found.scored.tolist() == [True, True, False]


def test_arithmetic_keeps_what_transforms_read():
    total, parts = torch.tensor([1.0, -2.0]), {"a": torch.tensor([1.0, -2.0])}
    scores = Scores(total, parts=parts)
    for found, expected in (
        (scores - 1, total - 1), (1 - scores, 1 - total), (-scores, -total), (scores / 2, total / 2),
        (2 * scores, 2 * total), (scores.with_total(total.clamp(-1, 1)), total.clamp(-1, 1)),
    ):  # fmt: skip
        assert torch.equal(found.total, expected) and found.parts is parts
