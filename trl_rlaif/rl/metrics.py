"""The numbers of one PPO update."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from accelerate.utils import gather_object

from trl_rlaif.rl.reward_shaping import kl_per_token
from trl_rlaif.types import Responses, Rollout


@torch.no_grad()
def update_metrics(
    rollout: Rollout,
    scores: torch.Tensor,
    stats: dict[str, list[torch.Tensor]],
    weights: tuple[float, float],
    kl_estimator: str,
    gather: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, float]:
    """Means over all processes, under TRL's names, and lengths and scores by category.

    Args:
        rollout: The sampled responses.
        scores: (B,) float32, transformed; averaged over the responses that have a reward.
        stats: Scalars by name, averaged over each tensor and all processes.
        weights: Of the score and of the KL in the objective.
        kl_estimator: k1 or k3.
        gather: Joins a tensor of every process.
    """
    kl = kl_per_token(rollout.logprobs, rollout.ref_logprobs, kl_estimator).sum(1)
    numbers = {
        "objective/kl": kl,
        "objective/entropy": -rollout.logprobs.sum(1),
        "objective/non_score_reward": -weights[1] * kl,
        "rollout/length": rollout.lengths.float(),
        "rollout/ended": rollout.ended.float(),
    }
    metrics = {"rollout/distinct": distinct_responses(rollout)}
    metrics |= _means({name: gather(value.float()) for name, value in numbers.items()})
    if rollout.scored is not None:
        scores = scores.masked_fill(~rollout.scored, math.nan)
    of_scores = {"objective/rlhf_reward": weights[0] * scores - weights[1] * kl, "objective/scores": scores}
    metrics |= _means_of_known(of_scores, gather)
    gathered = {name: gather(torch.stack(values)) for name, values in stats.items()}
    metrics |= _means(gathered)
    ratio = gathered["val/ratio"].view(-1, len(stats["val/ratio"])).mean(0)
    # TRL's is NaN where there is only one.
    metrics["val/ratio_var"] = ratio.var().item() if ratio.numel() > 1 else 0.0
    return metrics | _by_category(rollout, scores)


def _means_of_known(
    numbers: dict[str, torch.Tensor], gather: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, float]:
    """Means over all processes of the entries that are not NaN; a name without any is left out."""
    means = _means({name: gather(values) for name, values in numbers.items()}, torch.nanmean)
    return {name: mean for name, mean in means.items() if not math.isnan(mean)}


def _means(
    numbers: dict[str, torch.Tensor], mean: Callable[[torch.Tensor], torch.Tensor] = torch.mean
) -> dict[str, float]:
    """Their means, with one device synchronization for all."""
    means = torch.stack([mean(values) for values in numbers.values()]).tolist()
    return dict(zip(numbers, means, strict=True))


def distinct_responses(responses: Responses) -> int:
    """Number of distinct responses, over all processes."""
    rows = zip(responses.response_ids.tolist(), responses.response_lengths, strict=True)
    return len(set(gather_object([tuple(ids[:length]) for ids, length in rows])))


def score_metrics(
    responses: Responses, scores: torch.Tensor, gather: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, float]:
    """Mean of (B,) scores over all processes, overall and by category.

    A response without a score is NaN.
    """
    metrics = _means_of_known({"objective/scores": scores, "rollout/ended": responses.ended.float()}, gather)
    metrics["rollout/distinct"] = distinct_responses(responses)
    return metrics | _by_category(responses, scores)


def category_spreads(categories: Sequence[str | None], steps: dict[str, list[float]]) -> dict[str, float]:
    """How far the categories' mean scores differ, over all processes, as ``spread/<step>``.

    Standard deviation of the categories' true means over that of all scores: near 0 if no category scores higher than
    another. The sampling variance of means over few scores is subtracted (one-way random effects).

    Args:
        categories: Of B responses.
        steps: B scores by name: raw, and after each reward transform.
    """
    if not steps:
        return {}
    categories, *found = zip(*gather_object(list(zip(categories, *steps.values(), strict=True))), strict=True)
    spreads = {f"spread/{name}": _spread(scores, categories) for name, scores in zip(steps, found, strict=True)}
    return {name: spread for name, spread in spreads.items() if spread is not None}


def _spread(scores: Sequence[float], categories: Sequence[str | None]) -> float | None:
    """None if the spread cannot be estimated: one category, or no category with two scores."""
    by: dict[str | None, list[float]] = defaultdict(list)
    for score, category in zip(scores, categories, strict=True):
        by[category].append(score)
    free, every = len(scores) - len(by), statistics.pvariance(scores)
    if len(by) < 2 or not free or not every:
        return None
    within = sum(len(v) * statistics.pvariance(v) for v in by.values()) / free
    chance = within * statistics.fmean(1 / len(v) for v in by.values())
    between = statistics.variance([statistics.fmean(v) for v in by.values()])
    return math.sqrt(max(between - chance, 0.0) / every)


def _by_category(responses: Responses, scores: torch.Tensor) -> dict[str, float]:
    """Mean score of each category, over all processes."""
    by_category = defaultdict(list)
    for category, score in gather_object(list(zip(responses.categories, scores.tolist(), strict=True))):
        if category is not None and not math.isnan(score):
            by_category[category].append(score)
    return {f"reward/{name}": sum(values) / len(values) for name, values in by_category.items()}
