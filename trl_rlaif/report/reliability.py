"""Whether a confidence is right as often as it says: the diagram of labels and of the reward model alike."""

from __future__ import annotations

from trl_rlaif.report import plots
from trl_rlaif.report.figures import Figure
from trl_rlaif.report.formatting import score


def reliability_figure(
    bins: list[tuple[float, float, int]], heading: str, title: str, caption: str, ece: float | None
) -> Figure | None:
    """The diagram of ``calibration_bins``, with Wilson intervals; None without any."""
    from trl_rlaif.evaluation import wilson

    if not bins:
        return None
    points = [(confidence, right, wilson(right * n, n), n) for confidence, right, n in bins]
    said = f"ECE {score(ece)}" if ece is not None else ""
    caption += (
        " Below the dashed line it is too sure, above it not sure enough. At the top the pairs of each bin; bars are "
        "95% intervals."
    )
    return Figure(heading, plots.reliability(points, f"{title}{f': {said}' if said else ''}"), caption, said)
