"""The reward model's scores of held-out pairs: densities by category, calibration and a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trl_rlaif.report import plots
from trl_rlaif.report.figures import Figure, first_rows, present, reliability_figure
from trl_rlaif.report.formatting import count, label, number, scores, section
from trl_rlaif.report.run_data import Run, ScoredPair

MAX_RIDGES = 8
# With fewer scores, the hills of a kernel density would only show its kernel.
LEAST_FOR_DENSITY = 20
_GRID = 160
_BARS = 24
_NO_CATEGORY = "no category"


@dataclass(frozen=True)
class ScoreRow:
    """One category's results from results.json; ``before`` and ``after`` hold mean and std, None if unknown."""

    name: str
    pairs: float | None
    accuracy: float | None
    before: dict[str, float | None]
    after: dict[str, float | None]


def score_part(run: Run) -> dict[str, Any] | None:
    """Densities, reliability diagram, table and spread; None without reward_scores.jsonl."""
    if not run.scored:
        return None
    result = section(run.results, "reward")
    before, after = section(result, "scores"), section(result, "transformed")
    rows = _rows(before, after)
    return {
        "figures": _densities(run.scored) + _reliability(run.scored, _ece(result)),
        **first_rows(rows),
        "transformed": bool(after),
        "spread": _spread(number(before.get("relative_spread")), number(after.get("relative_spread"))),
    }


# ---- Densities ------------------------------------------------------------------------------------------


def _densities(scored: list[ScoredPair]) -> list[Figure]:
    """The scores by category, before the transforms and, if there are any, after them."""
    drawn = largest_categories(scored)
    before = {name: [value for pair in pairs for value in pair.before] for name, pairs in drawn.items()}
    after = {name: [value for pair in pairs for value in pair.after or ()] for name, pairs in drawn.items()}
    if not any(after.values()):
        return [_ridges("Scores", "Raw scores of the model.", before, 1)]
    wanted = "Rows at the same position mean that no category is scored higher than another."
    return [
        _ridges("Scores before the transforms", "Raw scores of the model.", before, 1),
        _ridges("Scores after the transforms", wanted, after, 0),
    ]


def _ridges(heading: str, caption: str, named: dict[str, list[float]], colour: int) -> Figure:
    named = {name: values for name, values in named.items() if values}
    every = [value for values in named.values() for value in values]
    ends = (min(every), max(every))
    rows = [(name, density(values, ends), sum(values) / len(values)) for name, values in named.items()]
    title = f"{heading} of {count(len(every) // 2, 'held-out pair')}, by category"
    caption += " All rows are scaled to the same height; dots are means."
    return Figure(heading, plots.ridges(rows, title, colour), caption, count(len(every), "score"))


def largest_categories(scored: list[ScoredPair]) -> dict[str, list[ScoredPair]]:
    """The pairs of at most ``MAX_RIDGES`` categories, the largest first; smaller ones are merged into the last."""
    found: dict[str, list[ScoredPair]] = {}
    for pair in scored:
        found.setdefault(pair.category or _NO_CATEGORY, []).append(pair)
    ordered = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    if len(ordered) <= MAX_RIDGES:
        return dict(ordered)
    named, rest = ordered[: MAX_RIDGES - 1], ordered[MAX_RIDGES - 1 :]
    joined = [pair for _, pairs in rest for pair in pairs]
    return dict(named) | {f"other ({len(rest)} categories)": joined}


def density(values: Sequence[float], ends: tuple[float, float]) -> list[tuple[float, float]]:
    """Density curve of the scores: nonnegative, and positive somewhere.

    Args:
        values: At least one finite score.
        ends: Smallest and largest score of the whole drawing, the range of a histogram.

    Returns:
        (score, density) in order: a Gaussian kernel density estimate with Scott's bandwidth (Scott 1992), or the
        outline of a histogram if the scores are few or all equal.
    """
    import numpy as np
    from scipy.stats import gaussian_kde

    low, high = min(values), max(values)
    if len(values) < LEAST_FOR_DENSITY or _same(low, high):
        return _outline(values, ends)
    kernel = gaussian_kde(values)
    reach = 3 * math.sqrt(float(kernel.covariance[0, 0]))
    grid = np.linspace(low - reach, high + reach, _GRID)
    return list(zip(grid.tolist(), kernel(grid).tolist(), strict=True))


def _outline(values: Sequence[float], ends: tuple[float, float]) -> list[tuple[float, float]]:
    import numpy as np

    low, high = ends
    if _same(low, high):
        margin = 0.5 * max(abs(low), abs(high), 1.0)
        low, high = low - margin, high + margin
    heights, edges = np.histogram(values, bins=_BARS, range=(low, high), density=True)
    corners = [(float(edges[0]), 0.0)]
    for height, left, right in zip(heights.tolist(), edges.tolist(), edges[1:].tolist(), strict=False):
        corners += [(left, height), (right, height)]
    return [*corners, (float(edges[-1]), 0.0)]


def _same(low: float, high: float) -> bool:
    return high - low < 1e-9 * max(abs(low), abs(high), 1.0)


# ---- Calibration ----------------------------------------------------------------------------------------


def reliability_bins(scored: list[ScoredPair]) -> tuple[list[tuple[float, float, int]], bool]:
    """Calibration bins of sigmoid(chosen - rejected), and whether the outcomes are people's choices.

    They are if people chose in any pair, and then only those pairs count; otherwise, outcomes are the soft labels.
    """
    from trl_rlaif.evaluation import calibration_bins

    # Clamped so that exp does not overflow.
    p = [1 / (1 + math.exp(-min(max(pair.before[0] - pair.before[1], -700.0), 700.0))) for pair in scored]
    people = [None if pair.human is None else float(pair.human) for pair in scored]
    asked = any(choice is not None for choice in people)
    return calibration_bins(p, people if asked else [pair.p for pair in scored]), asked


def _ece(result: dict[str, Any]) -> float | None:
    """ECE; None for older runs without ``ece_against``, which measured against the rounded label."""
    return number(result.get("ece")) if result.get("ece_against") else None


def _reliability(scored: list[ScoredPair], ece: float | None) -> list[Figure]:
    bins, asked = reliability_bins(scored)
    pairs = count(sum(n for _, _, n in bins), "held-out pair")
    whom = "people" if asked else "the labels"
    title = f"Agreement of the reward model with {whom}, by its confidence, on {pairs}"
    caption = "Confidence is sigmoid(chosen − rejected), or 1 minus that if it is below 0.5."
    if not asked:
        caption += " Without human choices, accuracy is the mean probability of the labels."
    return present(reliability_figure(bins, "Calibration of the reward model", title, caption, ece))


# ---- Numbers of results.json ----------------------------------------------------------------------------


def _rows(before: dict[str, Any], after: dict[str, Any]) -> list[ScoreRow]:
    """One row per category, the largest first."""
    from trl_rlaif.evaluation.categories import UNNAMED

    accuracy = section(before, "accuracy")
    rows = []
    for name, values in section(before, "categories").items():
        values, n = section(values), number(section(values).get("n"))
        rows.append(
            ScoreRow(
                name=_NO_CATEGORY if name == UNNAMED else label(name) or _NO_CATEGORY,
                # Every pair has two scores.
                pairs=None if n is None else n / 2,
                accuracy=number(accuracy.get(name)),
                before=_moments(values),
                after=_moments(section(after, "categories", name)),
            )
        )
    return sorted(rows, key=lambda row: (-(row.pairs or 0), row.name))


def _moments(values: dict[str, Any]) -> dict[str, float | None]:
    return {key: number(values.get(key)) for key in ("mean", "std")}


def _spread(before: float | None, after: float | None) -> str:
    if before is None:
        return ""
    shown = scores(before, *(() if after is None else (after,)))
    then = f" before the reward transforms, and {shown[1]} times after them" if after is not None else ""
    return (
        f"The standard deviation of the categories' mean scores is {shown[0]} times that of all scores{then} (relative "
        "spread; 0: no category is scored higher than another)."
    )
