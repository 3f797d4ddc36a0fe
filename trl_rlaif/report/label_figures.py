"""The page's section on the labels."""

from __future__ import annotations

from typing import Any

from trl_rlaif.report import plots
from trl_rlaif.report.criteria import MAX_CRITERIA
from trl_rlaif.report.figures import Figure, reliability_figure, share
from trl_rlaif.report.formatting import count, label, number, section
from trl_rlaif.report.jury import jury_part
from trl_rlaif.report.label_data import Labels
from trl_rlaif.report.rankings import ranking_part
from trl_rlaif.report.run_data import Run
from trl_rlaif.report.summary import judge_was_asked, labeler_name


def label_part(run: Run) -> dict[str, Any]:
    """Confidences, winners, reliability, the label stage's metrics, and some labeled pairs."""
    labels, result = run.labels, section(run.results, "label")
    histogram = None
    if labels.confidences:
        sure = sum(value >= 0.9 for value in labels.confidences)
        title = f"Confidence of {len(labels.confidences):,} labels; {sure:,} have 0.9 or more"
        drawing = plots.confidence_histogram(labels.confidences, title)
        histogram = Figure(
            "Label confidence",
            drawing,
            "Labels near 0.5 give the reward model little to learn.",
            f"{sure:,} of {len(labels.confidences):,} at 0.9 or more",
        )
    bias, mass, agreement = (section(result, key) for key in ("position_bias", "mass", "agreement"))
    return {
        "by_judge": judge_was_asked(run) or not labels.total,
        "labeler": labeler_name(run),
        "histogram": histogram,
        "winners": labels.winners,
        "asked_twice": sum(labels.winners.values()),
        "ties": labels.ties,
        "bias": share(bias),
        "agreement": share(agreement),
        "mass": {key: number(mass.get(key)) for key in ("mean", "min", "low")},
        "confidence": number(result.get("mean_confidence")),
        "ece": number(result.get("ece")),
        "speed": number(result.get("pairs_per_second")),
        "usage": _usage(section(result, "usage")),
        "comparison": [_compared(name, values) for name, values in section(result, "comparison").items()],
        "ranking": ranking_part(run.rankings, run.results),
        "jury": jury_part(run.results),
        "calibration": _calibration(section(result, "calibration")),
        "reliability": _reliability(labels, number(result.get("ece"))),
        "criteria": labels.criteria[:MAX_CRITERIA],
        "more_criteria": max(0, len(labels.criteria) - MAX_CRITERIA),
        "pairs": labels.pairs,
        "confidences": len(labels.confidences),
    }


def _usage(values: dict[str, Any]) -> dict[str, Any] | None:
    """Token counts reported by servers, and their cost; None if no server was used."""
    read, written, uncounted = (number(values.get(key)) for key in ("input_tokens", "output_tokens", "uncounted"))
    if read is None or written is None:
        return None
    return {"read": read, "written": written, "cost": number(values.get("cost")), "uncounted": uncounted}


def _compared(name: Any, values: Any) -> dict[str, Any]:
    """One labeler's row in the table that compares labelers."""
    values = values if isinstance(values, dict) else {}
    against = section(values, "against_first")
    return {
        "name": label(name),
        "agreement": share(section(values, "agreement")),
        "bias": share(section(values, "position_bias")),
        "mass": number(section(values, "mass").get("mean")),
        "ece": number(values.get("ece")),
        "speed": number(values.get("pairs_per_second")),
        "difference": number(against.get("difference")),
        "p_value": number(against.get("p_value")),
    }


def _calibration(values: dict[str, Any]) -> dict[str, Any] | None:
    """Temperature, bias, and their cross-validated effect, or why they are not used; None without calibration."""
    if not values:
        return None
    held_out = section(values, "cross_validated")
    return {
        "temperature": number(values.get("temperature")),
        "bias": number(values.get("position_bias")),
        "pairs": number(values.get("pairs")),
        "unused": None if values.get("used", True) else label(values.get("reason"), 300),
        "ece": [number(section(held_out, when).get("ece")) for when in ("before", "after")],
        "agreement": [share(section(section(held_out, when), "agreement"))["rate"] for when in ("before", "after")],
    }


def _reliability(labels: Labels, ece: float | None) -> Figure | None:
    """How often people agree with the label, by its confidence; None without human choices."""
    from trl_rlaif.evaluation import calibration_bins

    bins = calibration_bins([p for p, _ in labels.answers], [float(human == 1) for _, human in labels.answers])
    title = f"Agreement of people with the label, by its confidence, on {count(len(labels.answers), 'pair')}"
    caption = "Confidence is the label's max(p, 1 − p); accuracy is measured against people's choices."
    return reliability_figure(bins, "Calibration of the labels", title, caption, ece)
