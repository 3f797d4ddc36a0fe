"""How far training has moved a policy: what it forgot, its KL to the reference, the length of its responses."""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Sequence
from typing import Any

from trl_rlaif.evaluation.intervals import bootstrap_mean, bootstrap_ratio, share_interval, wilson


def summarize_curve(
    points: Sequence[tuple[int, float | None, float | None]], *, prompts: int | None = None
) -> dict[str, Any]:
    """What was lost on a forget set between the first and the last measurement, and at worst.

    Args:
        points: (step, win rate against the start, NLL of the start's good answers in nats a token) in any order; None
            for a number that is missing.
        prompts: How many the win rates are of; None leaves out their intervals.

    Returns:
        ``win_rate`` and ``nll``, each None without numbers, else ``first``, ``last`` and ``worst`` with their steps
        ``first_step``, ``last_step``, ``worst_step`` (of equal ones the earliest), and ``lost`` and ``lost_at_worst``
        since the first, both positive where something was forgotten: a fall of the win rate, a rise of the NLL. With
        ``prompts`` the win rate has ``last_interval`` and ``worst_interval`` (95%, Wilson, which is wide where many
        comparisons are ties); the latter is widened for having been picked from all measurements (Bonferroni). Before
        the first update the win rate is 0.5 by definition: an interval below 0.5 says that something was surely lost.
    """
    ordered = sorted(points, key=lambda point: point[0])
    rates = [(step, rate) for step, rate, _ in ordered if rate is not None]
    nlls = [(step, nll) for step, _, nll in ordered if nll is not None]
    found = {"win_rate": _curve(rates, falling=True), "nll": _curve(nlls, falling=False)}
    if prompts is not None and rates:
        curve = found["win_rate"]
        curve["last_interval"] = wilson(curve["last"] * prompts, prompts)
        curve["worst_interval"] = wilson(curve["worst"] * prompts, prompts, 1 - 0.05 / len(rates))
    return found


def _curve(points: list[tuple[int, float]], *, falling: bool) -> dict[str, Any] | None:
    """One number over the steps; ``falling`` says that a lower one is worse."""
    if not points:
        return None
    sign = 1 if falling else -1
    (first_step, first), (last_step, last) = points[0], points[-1]
    worst_step, worst = min(points, key=lambda point: sign * point[1])
    return {
        "first": first,
        "first_step": first_step,
        "last": last,
        "last_step": last_step,
        "worst": worst,
        "worst_step": worst_step,
        "lost": sign * (first - last),
        "lost_at_worst": sign * (first - worst),
    }


def summarize_kl(kl: Sequence[float], tokens: Sequence[int], *, seed: int = 0) -> dict[str, Any] | None:
    """Estimated KL(policy || reference) of a response and of a token.

    Args:
        kl: N responses' sums of the log-ratios of their tokens, drawn from the policy, in nats (k1, unbiased; a single
            one may be negative; ``ppo.advantages.kl_per_token`` gives them and others).
        tokens: N numbers of response tokens.
        seed: Of the bootstrap.

    Returns:
        ``per_response``: ``mean`` and ``interval``; ``per_token``: ``mean``, all nats over all tokens, and
        ``interval``; both 95%, bootstrap over the responses, for the tokens of one are not independent; ``n``. None
        without a token.
    """
    if len(kl) != len(tokens):
        raise ValueError(f"{len(kl)} KLs and {len(tokens)} numbers of tokens")
    if not sum(tokens):
        return None
    return {
        "per_response": {"mean": statistics.fmean(kl), "interval": bootstrap_mean(kl, seed=seed)},
        "per_token": {"mean": sum(kl) / sum(tokens), "interval": bootstrap_ratio(kl, tokens, seed=seed)},
        "n": len(kl),
    }


def compare_lengths(
    lengths: Sequence[float],
    other_lengths: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Length of A's responses beside that of B's to the same prompts: what a win rate may owe to length.

    Args:
        lengths, other_lengths: N lengths of A's and of B's responses, in characters or tokens alike.
        clusters: What each prompt depends on, N entries, such as its text; None: on nothing.
        seed: Of the bootstrap.

    Returns:
        ``mean`` and ``other_mean`` with ``interval`` and ``other_interval``; ``ratio`` of the means with
        ``ratio_interval`` (all 95%, bootstrap over the prompts); ``longer``, the share of prompts on which A is longer,
        half for equal lengths, with ``longer_interval`` (95%, ``share_interval``); ``n``. The ratio is None if all
        of B's responses are empty. None without prompts.
    """
    pairs = list(zip(lengths, other_lengths, strict=True))
    if not pairs:
        return None
    n, longer = len(pairs), [(a > b) + (a == b) / 2 for a, b in pairs]
    total, other = sum(lengths), sum(other_lengths)
    return {
        "mean": total / n,
        "interval": bootstrap_mean(lengths, clusters, seed=seed),
        "other_mean": other / n,
        "other_interval": bootstrap_mean(other_lengths, clusters, seed=seed),
        "ratio": total / other if other else None,
        "ratio_interval": bootstrap_ratio(lengths, other_lengths, clusters, seed=seed),
        "longer": sum(longer) / n,
        "longer_interval": share_interval(longer, clusters),
        "n": n,
    }
