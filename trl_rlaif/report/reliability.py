"""Whether a confidence is right as often as it says: the diagram of labels and of the reward model alike."""

from __future__ import annotations

from collections.abc import Iterable

from trl_rlaif.report import plots
from trl_rlaif.report.figures import Figure
from trl_rlaif.report.wording import score

_BINS = 10


def confidence_bins(answers: Iterable[tuple[float, float]]) -> list[tuple[float, float, int]]:
    """Mean confidence, share right and number of each bin that has any, in the order of confidence.

    Args:
        answers: Confidences in 0.5..1, each with 1 where the answer was right, 0 where it was wrong, 0.5 for a tie.
            The bins are those of ``calibration_error``: ten of equal width.
    """
    found: dict[int, list[tuple[float, float]]] = {}
    for confidence, right in answers:
        found.setdefault(min(int((confidence - 0.5) * 2 * _BINS), _BINS - 1), []).append((confidence, right))
    return [
        (sum(c for c, _ in answered) / len(answered), sum(r for _, r in answered) / len(answered), len(answered))
        for _, answered in sorted(found.items())
    ]


def reliability_figure(
    bins: list[tuple[float, float, int]], heading: str, title: str, caption: str, ece: float | None
) -> Figure | None:
    """The diagram of ``bins``, with Wilson intervals; None without any."""
    from trl_rlaif.measures import wilson

    if not bins:
        return None
    points = [(confidence, right, wilson(right * n, n), n) for confidence, right, n in bins]
    said = f"ECE {score(ece)}" if ece is not None else ""
    caption += (
        " Below the dashed line it is too sure, above it not sure enough. At the top the pairs of each bin; bars are "
        "95% intervals."
    )
    return Figure(heading, plots.reliability(points, f"{title}{f': {said}' if said else ''}"), caption, said)
