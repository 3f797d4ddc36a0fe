"""Chooses the figures of each section of the page, and their captions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trl_rlaif.report import plots
from trl_rlaif.report.drawing import Drawing
from trl_rlaif.report.formatting import interval, label, number, score, scores, section
from trl_rlaif.report.plots import Panel, Points
from trl_rlaif.report.run_data import Run, Sample, Series
from trl_rlaif.report.summary import Measure, reward_accuracy

MAX_CATEGORIES = 40
_DRAWN_CATEGORIES = 12
DRAWN_LINES = 12
_MAX_OTHER_METRICS = 60

# Metric, heading, caption, and the smallest change that is more than rounding. The most important come first.
_RL_PANELS = (
    ("objective/scores", "Score", "Mean score of the responses; RL tries to raise it.", 0.0),
    ("objective/kl", "KL to the reference, in nats", "Distance of the policy from the reference.", 1e-5),
    (
        "rollout/length", "Response length, in tokens",
        "A drift may mean that the reward favors long or short responses.", 0.0,
    ),
    (
        "rewards/accuracies", "Implicit accuracy",
        "Fraction of pairs that the policy ranks as labeled; chance is 0.5.", 0.0,
    ),
    ("rewards/margins", "Implicit margin", "Implicit reward of chosen minus that of rejected responses.", 0.0),
    ("objective/rlhf_reward", "Score minus KL penalty", "The objective that PPO maximizes.", 0.0),
    (
        "objective/entropy", "Entropy",
        "Near zero, all responses to a prompt are nearly identical (mode collapse).", 0.0,
    ),
    ("loss/policy_avg", "Policy loss", "Noisy around zero is normal.", 1e-7),
    ("loss", "Loss", "Noisy around zero in GRPO and RLOO; elsewhere it should fall.", 1e-7),
    ("loss/value_avg", "Value loss", "Should fall and then stay low.", 0.0),
    ("policy/approxkl_avg", "KL of one update", "Spikes mean that the steps are too large.", 1e-6),
    ("policy/clipfrac_avg", "Clip fraction", "Fraction of tokens whose probability ratio was clipped.", 0.0),
    ("val/ratio", "Probability ratio", "New over old policy; should stay near 1.", 1e-4),
    ("lr", "Learning rate", "The schedule as run.", 0.0),
)  # fmt: skip
_FIRST_PANELS = 3
# TRL's names for metrics that PPO logs as well; GRPO and RLOO log KL and entropy per token.
_RENAMED = {"completions/mean_length": "rollout/length", "learning_rate": "lr"}
_PER_TOKEN = {"kl": "objective/kl", "entropy": "objective/entropy"}
_NOT_PANELS = {"episode", "epoch"}
# Drawn in the section on rehearsal and forgetting.
ELSEWHERE = ("forgetting/", "rehearsal/nll")
_NOT_MEANS = ("/std", "/var", "/count")


@dataclass(frozen=True)
class Figure:
    """A drawing with its heading, values and caption; ``rows`` holds these for each of several panels."""

    heading: str
    drawing: Drawing
    caption: str
    values: str = ""
    rows: Sequence[tuple[str, str, str]] = ()


@dataclass(frozen=True)
class CategoryRow:
    """Held-out metrics of one category; None if unknown."""

    name: str
    prompts: int
    before: float | None
    after: float | None
    win_rate: float | None


def sft_part(run: Run) -> list[Figure]:
    """Curves of supervised fine-tuning; empty if nothing was logged."""
    series = run.series.get("sft", {})
    names = {"loss": "training", "eval_loss": "held-out"}
    return present(curve(series, "SFT loss", "Should fall and level off.", names))


def reward_part(run: Run) -> dict[str, Any]:
    """Curves and held-out accuracy of the reward model."""
    series = run.series.get("reward", {})
    result = section(run.results, "reward")
    names = {"loss": "training", "eval_loss": "held-out"}
    accuracies = {"accuracy": "training", "eval_accuracy": "held-out"}
    return {
        "figures": present(
            curve(
                series,
                "Reward loss",
                "A rising held-out loss while the training loss falls means overfitting.",
                names,
            ),
            curve(series, "Ranking accuracy", "Fraction of pairs ranked as labeled; chance is 0.5.", accuracies),
        ),
        "accuracy": reward_accuracy(run),
        "pairs": number(result.get("eval_pairs")),
    }


def rl_part(run: Run) -> dict[str, Any]:
    """The most important curves of RL, the others in one figure, and first and last values of the remaining metrics."""
    series = rl_series(run)
    panels = [panel for panel in _RL_PANELS if panel[0] in series]
    first = [_score_over_kl(series)]
    for key, heading, caption, least in panels[:_FIRST_PANELS]:
        first.append(curve(series, heading, caption, {key: heading}, least=least))
    category_keys = [key for key in series if key.startswith("reward/") and not key.endswith(_NOT_MEANS)]
    if category_keys:
        names = {key: label(key.removeprefix("reward/").removesuffix("/mean"), 24) for key in category_keys}
        drawn = dict(list(names.items())[:DRAWN_LINES])
        caption = "No category should improve at the expense of another."
        if len(drawn) < len(names):
            caption += f" Shows the first {len(drawn)} of {len(names)} categories."
        first.append(curve(series, "Score by category", caption, drawn))
    more = [
        (heading, caption, [(heading, series[key])], least) for key, heading, caption, least in panels[_FIRST_PANELS:]
    ]
    shown = {key for key, *_ in _RL_PANELS} | set(category_keys) | _NOT_PANELS
    others = [key for key in series if key not in shown and not key.startswith(ELSEWHERE)]
    table = [
        (key, *scores(series[key][0][1], series[key][-1][1]), len(series[key]))
        for key in sorted(others)[:_MAX_OTHER_METRICS]
    ]
    left_out = max(len(others) - len(table), 0)
    return {
        "figures": present(*first),
        "more": stacked("More RL curves", more),
        "others": table,
        "left_out": left_out,
    }


def rl_series(run: Run) -> Series:
    """The metrics of the RL stage under PPO's names, KL and entropy per response."""
    series = {_RENAMED.get(key, key): points for key, points in run.series.get("rl", {}).items()}
    lengths = dict(series.get("rollout/length", []))
    for theirs, ours in _PER_TOKEN.items():
        found = [(step, value * lengths[step]) for step, value in series.get(theirs, []) if step in lengths]
        if found:
            series.setdefault(ours, found)
    return series


def overlaid(names: Sequence[str], runs: Sequence[Run]) -> Figure | None:
    """The RL curves of several runs, overlaid; None if none were logged."""
    series = [rl_series(run) for run in runs]
    panels = [
        (heading, caption, [(name, of.get(key, [])) for name, of in zip(names, series, strict=True)], least)
        for key, heading, caption, least in _RL_PANELS
        if any(key in of for of in series)
    ]
    return stacked("RL curves", panels)


def _score_over_kl(series: Series) -> Figure | None:
    """The score gained per nat of KL; None unless both were logged at two or more steps."""
    kl = dict(series.get("objective/kl", []))
    points = [(kl[step], score) for step, score in series.get("objective/scores", []) if step in kl]
    if len(points) < 2:
        return None
    (first_kl, last_kl), (first, last) = (scores(points[0][i], points[-1][i]) for i in (0, 1))
    said = f"score {first} → {last}, KL {first_kl} → {last_kl}"
    caption = (
        "The policy's path; earlier updates are fainter. Where it turns flat or falls, more KL brings no more score: "
        "raise rl.kl_coef, or stop there."
    )
    drawing = plots.score_over_kl(points, f"Score versus KL to the reference, from first to last update: {said}")
    return Figure("Score versus KL", drawing, caption, said)


def share(values: dict[str, Any]) -> dict[str, Any]:
    """A proportion from results.json: ``rate``, ``interval`` and ``n``, None if unknown."""
    rate, amount = number(values.get("rate")), number(values.get("n"))
    return {"rate": rate, "interval": interval(values.get("interval")), "n": amount}


def win_rates(
    rows: Sequence[tuple[str, Measure, Measure | None]], heading: str, title: str, caption: str, x_label: str
) -> Figure:
    """Rows (name, win rate, win rate at equal length) with their intervals; the title includes the win rates."""
    said = "; ".join(f"{name} {rate.text}" for name, rate, _ in rows)
    points = [
        (name, rate.value, rate.interval, even and even.value, even and even.interval) for name, rate, even in rows
    ]
    return Figure(heading, plots.win_rates(points, f"{title}: {said}", x_label), caption)


def first_rows(rows: list[Any]) -> dict[str, Any]:
    """The rows of a table that are shown, and the number left out."""
    return {"rows": rows[:MAX_CATEGORIES], "left_out": max(len(rows) - MAX_CATEGORIES, 0)}


def present(*figures: Figure | None) -> list[Figure]:
    """The figures that are not None."""
    return [figure for figure in figures if figure is not None]


def curve(
    series: Series,
    heading: str,
    caption: str,
    names: dict[str, str],
    *,
    level: float | None = None,
    least: float = 0.0,
) -> Figure | None:
    """One panel with the metrics in ``names`` (metric: name in the legend); None if none was logged.

    Args:
        level: A reference value.
        least: Values are rounded to this precision, so lines that change by less, which is rounding, are drawn flat.
    """
    found = [(name, series[key]) for key, name in names.items() if series.get(key)]
    if not found:
        return None
    panel, caption, values = _panel(heading, caption, found, least)
    said = f"{heading}, first and last logged value: {values}"
    # For more than two lines, the numbers would be unreadable; the drawing shows them.
    return Figure(heading, plots.curves([panel], said, level), caption, values if len(found) <= 2 else "")


def stacked(heading: str, panels: Sequence[tuple[str, str, list[tuple[str, Points]], float]]) -> Figure | None:
    """One figure of panels (heading, caption, lines, least change) over the same steps; None without panels."""
    if not panels:
        return None
    drawn = [_panel(*panel) for panel in panels]
    rows = [(panel.heading, values if len(panel.lines) <= 2 else "", caption) for panel, caption, values in drawn]
    said = ". ".join(f"{panel.heading}: {values}" for panel, _, values in drawn)
    title = f"{heading}, first and last logged value: {said}"
    return Figure(heading, plots.curves([panel for panel, *_ in drawn], title), "", rows=rows)


def _panel(heading: str, caption: str, lines: list[tuple[str, Points]], least: float) -> tuple[Panel, str, str]:
    """The lines as a panel, its caption, and the first and last value of each line."""
    if least:
        places = round(-math.log10(least))
        lines = [(name, [(step, round(value, places) + 0.0) for step, value in points]) for name, points in lines]
        seen = [value for _, points in lines for _, value in points]
        if len(seen) > 1 and max(seen) - min(seen) <= least:
            caption = "No change beyond rounding."
    changes = []
    for name, points in lines:
        if points:
            first, last = scores(points[0][1], points[-1][1])
            change = f"{first} → {last}" if len(points) > 1 else last
            changes.append(f"{name} {change}" if len(lines) > 1 else change)
    return Panel(heading, lines, least), caption, "; ".join(changes)


def reliability_figure(
    bins: list[tuple[float, float, int]], heading: str, title: str, caption: str, ece: float | None
) -> Figure | None:
    """Reliability diagram of ``calibration_bins``, with Wilson intervals; None without bins."""
    from trl_rlaif.evaluation import wilson

    if not bins:
        return None
    points = [(confidence, right, wilson(right * n, n), n) for confidence, right, n in bins]
    said = f"ECE {score(ece)}" if ece is not None else ""
    caption += (
        " Below the dashed line it is overconfident, above it underconfident. Numbers at the top: pairs per bin; bars "
        "are 95% intervals."
    )
    return Figure(heading, plots.reliability(points, f"{title}{f': {said}' if said else ''}"), caption, said)


def set_part(run: Run, name: str) -> dict[str, Any]:
    """Reward before and after training on one held-out set, by prompt and by category."""
    samples = [sample for sample in run.samples if sample.set == name]
    pairs = [
        (sample.reward_start, sample.reward_trained)
        for sample in samples
        if sample.reward_start is not None and sample.reward_trained is not None
    ]
    figures = _reward_figures(name, pairs) if pairs else []
    judged: dict[str, Any] = {}
    for key, values in section(run.results, "evaluate", "sets").items():
        if (label(key) or "held-out") == name:
            judged = section(values, "by_category")
    rows = _category_rows(samples, judged)
    drawn = [(row.name, row.before, row.after) for row in rows if row.before is not None and row.after is not None]
    if len(drawn) > 1:
        drawn = drawn[:_DRAWN_CATEGORIES]
        title = f"Mean reward of each category on {name}, before and after training"
        caption = "Means over this set's samples; largest categories first."
        figures.append(Figure("By category", plots.before_after(drawn, title), caption))
    return {"name": name, "figures": figures, **first_rows(rows)}


def _reward_figures(name: str, pairs: list[tuple[float, float]]) -> list[Figure]:
    better = sum(after > before for before, after in pairs)
    worse = sum(after < before for before, after in pairs)
    values = f"{better:,} up, {worse:,} down, {len(pairs) - better - worse:,} equal"
    scatter = plots.paired_scatter(pairs, f"Reward per prompt on {name}, initial versus trained policy: {values}")
    before, after = [x for x, _ in pairs], [y for _, y in pairs]
    both = plots.two_histograms(before, after, f"Distribution of the reward on {name}, initial and trained policy")
    return [
        Figure("Per prompt", scatter, "Above the dashed line, the reward rose.", values),
        Figure("Distribution", both, "The whole distribution should shift, not just a few outliers."),
    ]


def _category_rows(samples: list[Sample], judged: dict[str, Any]) -> list[CategoryRow]:
    rates = {label(key): section(value) for key, value in judged.items()}
    sizes = Counter(sample.category for sample in samples)
    rewards: dict[str, list[tuple[float, float]]] = {}
    for sample in samples:
        if sample.reward_start is not None and sample.reward_trained is not None:
            rewards.setdefault(sample.category, []).append((sample.reward_start, sample.reward_trained))
    rows = []
    for category in dict.fromkeys([*rates, *sizes]):
        found = rewards.get(category)
        prompts = sizes.get(category) or int(number(rates.get(category, {}).get("n")) or 0)
        rows.append(
            CategoryRow(
                category or "no category",
                prompts,
                sum(x for x, _ in found) / len(found) if found else None,
                sum(y for _, y in found) / len(found) if found else None,
                number(rates.get(category, {}).get("win_rate")),
            )
        )
    named = [row for row in rows if row.name != "no category"]
    return sorted(rows, key=lambda row: (-row.prompts, row.name)) if named else []
