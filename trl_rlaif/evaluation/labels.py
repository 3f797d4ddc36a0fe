"""Quality of a labeler's output: agreement, position bias, probability mass."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from scipy.stats import binomtest

from trl_rlaif.evaluation.intervals import bootstrap_mean, clusters_of, share_interval
from trl_rlaif.evaluation.rates import agreement_points

# A human choice as the probability that response_1 is preferred.
_AS_P = {1: 1.0, 2: 0.0, 0: 0.5}


def agreement(
    p: Sequence[float], human: Sequence[int | None], clusters: Sequence[Hashable] | None = None
) -> dict[str, Any] | None:
    """AI labeler alignment: fraction of pairs where the label's choice is the human's (Lee et al. 2023, 3.3).

    Args:
        p: N probabilities that response_1 is preferred.
        human: N choices: 1, 2, 0 for a tie or None for unknown.
        clusters: The cluster of each pair, N entries, such as its prompt; None: all independent.

    Returns:
        For the pairs with a choice of 1 or 2, as in the paper: ``rate``, ``interval`` (95%, ``share_interval``) and
        ``n``; a label of 0.5 counts half. ``ties``, the human ties, and ``rate_with_ties``, the same rate with each of
        them counting half too, whatever the label is. None without a choice of 1 or 2.
    """
    pairs = list(zip(p, human, strict=True))
    chosen = [i for i, (_, h) in enumerate(pairs) if h in (1, 2)]
    if not chosen:
        return None
    found = agreement_points(*zip(*(pairs[i] for i in chosen), strict=True))
    ties = sum(h == 0 for _, h in pairs)
    return {
        "rate": sum(found) / len(found),
        "interval": share_interval(found, clusters_of(clusters, chosen)),
        "n": len(found),
        "ties": ties,
        "rate_with_ties": (sum(found) + ties / 2) / (len(found) + ties),
    }


def length_preference(
    p: Sequence[float],
    human: Sequence[int | None],
    lengths: Sequence[tuple[int, int]],
    clusters: Sequence[Hashable] | None = None,
) -> dict[str, Any] | None:
    """How often labels and humans prefer the longer response, on the same pairs.

    Args:
        p: N probabilities that response_1 is preferred; 0.5 counts half.
        human: N choices: 1, 2, 0 for a tie, which counts half, or None for unknown, which is left out.
        lengths: N pairs of the lengths of response_1 and response_2; pairs of equal length are left out.
        clusters: As in ``agreement``.

    Returns:
        ``judge`` and ``people``, fractions in [0, 1]; ``interval`` (95%, bootstrap over the pairs) of ``judge`` -
        ``people``; ``n``. None without such pairs.
    """
    kept = [i for i, (a, b) in enumerate(lengths) if human[i] is not None and a != b]
    if not kept:
        return None
    longer = [1 if lengths[i][0] > lengths[i][1] else 2 for i in kept]
    judge = agreement_points([p[i] for i in kept], longer)
    people = agreement_points([_AS_P[human[i]] for i in kept], longer)
    gaps = [a - b for a, b in zip(judge, people, strict=True)]
    return {
        "judge": sum(judge) / len(kept),
        "people": sum(people) / len(kept),
        "interval": bootstrap_mean(gaps, clusters_of(clusters, kept)),
        "n": len(kept),
    }


def position_bias(
    p_12: Sequence[float], p_21: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> dict[str, Any] | None:
    """Fraction of pairs where the same position wins in both orders (Lee et al. 2023, section 2.1).

    Args:
        p_12, p_21: N probabilities that response_1 is preferred, shown first and shown second.
        clusters: As in ``agreement``.

    Returns:
        ``rate``, ``interval`` (95%, ``share_interval``), ``n``, and how often the ``first`` and the ``second`` position
        won both times; None without pairs.
    """
    n = len(p_12)
    if n == 0:
        return None
    first = [a > 0.5 > b for a, b in zip(p_12, p_21, strict=True)]
    second = [a < 0.5 < b for a, b in zip(p_12, p_21, strict=True)]
    biased = [float(one or other) for one, other in zip(first, second, strict=True)]
    return {
        "rate": sum(biased) / n,
        "interval": share_interval(biased, clusters),
        "n": n,
        "first": sum(first),
        "second": sum(second),
    }


def summarize_mass(masses: Sequence[float], low: float = 0.5) -> dict[str, Any] | None:
    """Mean, minimum and number of low masses; a low mass indicates that the judge misunderstood the prompt."""
    if not masses:
        return None
    return {"mean": sum(masses) / len(masses), "min": min(masses), "low": sum(m < low for m in masses)}


def compare_agreement(p: Sequence[float], other: Sequence[float], human: Sequence[int]) -> dict[str, Any] | None:
    """Whether two labelers agree with humans equally often, on the same pairs (exact McNemar test;
    the sign test if some pairs count half).

    Args:
        p, other: N probabilities each that response_1 is preferred.
        human: N choices, 1 or 2.

    Returns:
        ``difference`` of the agreement rates, a label of 0.5 counting half; ``better`` and ``worse``: pairs on which
        the first agrees more, or less, than the other; the two-sided ``p_value``; ``n``. None without pairs.
    """
    if not human:
        return None
    right = [agreement_points(xs, human) for xs in (p, other)]
    more = [a - b for a, b in zip(*right, strict=True)]
    better, worse = sum(x > 0 for x in more), sum(x < 0 for x in more)
    p_value = binomtest(better, better + worse).pvalue if better + worse else 1.0
    return {
        "difference": sum(more) / len(human),
        "better": better,
        "worse": worse,
        "p_value": float(p_value),
        "n": len(human),
    }
