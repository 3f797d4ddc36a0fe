"""The kinds of plots: each makes a drawing from numbers, deterministically."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from trl_rlaif.report.drawing import COLOURS, INK, Drawing, draw_plot

Points = Sequence[tuple[float, float]]
Ends = tuple[float, float]


class Panel(NamedTuple):
    """Lines ``(name, [(step, value), ...])`` on a y axis that spans at least ten times ``least``."""

    heading: str
    lines: Sequence[tuple[str, Points]]
    least: float = 0.0


_MAX_POINTS = 800
_MAX_WAY = 60
_SMOOTH_FROM = 40
_MARKERS = ("o", "s", "^", "D", "v", "P")
_MAX_NUMBERED = 36
_STACKED = 1.0  # height of a stacked panel, in inches
# In characters: the legend's width, and the space for a line and a gap next to each name.
_LEGEND_WIDTH, _LEGEND_GAP = 48, 5
_DASHED: dict[str, Any] = {"color": INK, "linewidth": 1.0, "linestyle": (0, (4, 3))}


def curves(panels: Sequence[Panel], title: str, level: float | None = None) -> Drawing:
    """Lines over steps, in stacked panels that share the x axis; a long noisy line also gets its running mean.

    Args:
        panels: All with the same line names in the same order; a line may have no points in a panel.
        level: A reference value, drawn as a dashed line.
    """
    names = [_short(name) for name, _ in panels[0].lines]
    columns = _legend_columns(names)
    rows = -(-len(names) // columns) if len(names) > 1 else 0

    def draw(*stack: Any) -> None:
        for axes, panel in zip(stack, panels, strict=True):
            if level is not None:
                axes.axhline(level, **_DASHED)
            for index, (_, points) in enumerate(panel.lines):
                _line(axes, points, index, names[index])
            low, high = axes.get_ylim()
            if high - low < 10 * panel.least:
                middle = (low + high) / 2
                axes.set_ylim(middle - 5 * panel.least, middle + 5 * panel.least)
            if len(panels) > 1:
                axes.set_title(panel.heading, loc="left", fontsize=10, pad=3)
                axes.locator_params(axis="y", nbins=3)
                axes.yaxis.set_major_formatter("{x:.6g}")  # a power of ten above the axis would run into the heading
        stack[-1].set_xlabel("step")
        if rows:
            stack[0].figure.legend(*stack[0].get_legend_handles_labels(), loc="outside upper left", ncols=columns)

    height = 2.6 if len(panels) == 1 else 0.6 + _STACKED * len(panels)
    return draw_plot(draw, title, (4.4, height + 0.21 * max(rows - 2, 0)), len(panels))


def _line(axes: Any, points: Points, index: int, name: str) -> None:
    colour = COLOURS[index % len(COLOURS)]
    style = "-" if index < len(COLOURS) else "--"
    steps, values = _thin(points)
    marker = "o" if len(steps) <= 12 else ""
    if len(steps) >= _SMOOTH_FROM and _noisy(values):
        axes.plot(steps, values, color=colour, linewidth=1.0, alpha=0.35)
        values = _running_mean(values, max(len(values) // 20, 2))
    axes.plot(steps, values, style, color=colour, marker=marker, markersize=4, label=name)


def score_over_kl(points: Points, title: str) -> Drawing:
    """The path of ``(KL, score)`` in the order of the updates: faint at first, strong at last."""

    def draw(axes: Any) -> None:
        kl, scores = _thin(points, _MAX_WAY)
        axes.plot(kl, scores, color=COLOURS[0], linewidth=1.0, alpha=0.35)
        last = len(kl) - 1
        for place, point in enumerate(zip(kl, scores, strict=True)):
            strength = 0.2 + 0.8 * (place / max(last, 1))  # the parentheses keep the last one within 1
            axes.plot(*point, "o", color=COLOURS[0], alpha=strength, markersize=5, markeredgewidth=0)
        for place, name in ((0, "first"), (last, "last")):
            axes.annotate(name, (kl[place], scores[place]), (4, 4), textcoords="offset points", fontsize=9)
        axes.margins(0.1)
        axes.set(xlabel="KL to the reference, in nats", ylabel="score")

    return draw_plot(draw, title)


def win_rates(
    rows: Sequence[tuple[str, float, Ends | None, float | None, Ends | None]],
    title: str,
    x_label: str = "win rate over the initial policy",
) -> Drawing:
    """Rows ``(name, win rate, its interval, win rate at equal length, its interval)``, with a line at one half."""

    def draw(axes: Any) -> None:
        axes.axvline(0.5, **_DASHED)
        places = _rows(axes, [row[0] for row in rows])
        both = any(row[3] is not None for row in rows)
        looks = ((1, 0.12 if both else 0, COLOURS[0], "o", "win rate"), (3, -0.12, COLOURS[1], "s", "at equal length"))
        for column, shift, colour, marker, name in looks:
            found = [(place + shift, row[column], row[column + 1]) for place, row in zip(places, rows, strict=True)]
            found = [(place, rate, ends) for place, rate, ends in found if rate is not None]
            for place, _, ends in found:
                if ends:
                    axes.plot(ends, (place, place), color=colour, linewidth=2.0, alpha=0.45)
            if found:
                axes.plot([x for _, x, _ in found], [y for y, _, _ in found], marker, color=colour, label=name)
        axes.set(xlim=(0, 1), xlabel=x_label)
        if both:
            _legend(axes, 2)

    return draw_plot(draw, title, (4.4, 1.5 + 0.42 * len(rows)))


def by_round(named: Sequence[tuple[str, Sequence[tuple[int, float, Ends | None]]]], title: str, what: str) -> Drawing:
    """Proportions by round, ``(round, proportion, its interval)`` for each name, with a line at one half."""

    def draw(axes: Any) -> None:
        axes.axhline(0.5, **_DASHED)
        for index, (name, points) in enumerate(named):
            colour, shift = COLOURS[index % len(COLOURS)], 0.06 * index
            for number, _, ends in points:
                if ends:
                    axes.plot((number + shift,) * 2, ends, color=colour, linewidth=2.0, alpha=0.45)
            places, shares = [number + shift for number, *_ in points], [share for _, share, _ in points]
            axes.plot(places, shares, _MARKERS[index % len(_MARKERS)] + "-", color=colour, markersize=5, label=name)
        axes.set_xticks(sorted({number for _, points in named for number, *_ in points}))
        axes.set(ylim=(0, 1), xlabel="round", ylabel=what)
        _legend(axes, _legend_columns([name for name, _ in named]))

    return draw_plot(draw, title)


def named_points(points: Sequence[tuple[str, float, float]], title: str, labels: tuple[str, str]) -> Drawing:
    """Points ``(name, x, y)``, annotated with their names; ``labels`` are the axis labels."""

    def draw(axes: Any) -> None:
        axes.plot([x for _, x, _ in points], [y for *_, y in points], "o", color=COLOURS[0], markersize=5)
        for name, x, y in points:
            axes.annotate(_short(name), (x, y), (5, 3), textcoords="offset points", fontsize=9)
        axes.margins(0.18)
        axes.set(xlabel=labels[0], ylabel=labels[1])

    return draw_plot(draw, title, (4.4, 3.0))


def confidence_histogram(confidences: Sequence[float], title: str) -> Drawing:
    """Histogram of label confidence: counts of max(p, 1 - p) in ten bins from 0.5 to 1."""

    def draw(axes: Any) -> None:
        edges = [0.5 + 0.05 * index for index in range(10)] + [1.0]
        axes.hist(confidences, bins=edges, color=COLOURS[0], rwidth=0.9)
        axes.set_xlim(0.49, 1.01)
        axes.set_xlabel("confidence of the label, max(p, 1 − p)")
        _counts(axes, "pairs")

    return draw_plot(draw, title)


def paired_scatter(pairs: Points, title: str) -> Drawing:
    """Each prompt's reward before (x) and after (y) training; points above the diagonal improved."""

    def draw(axes: Any) -> None:
        before, after = [x for x, _ in pairs], [y for _, y in pairs]
        low, high = min(before + after), max(before + after)
        margin = (high - low) * 0.05 or 0.5
        ends = (low - margin, high + margin)
        axes.plot(ends, ends, **_DASHED)
        axes.scatter(before, after, s=22, color=COLOURS[0], alpha=0.55, linewidths=0)
        axes.set(xlim=ends, ylim=ends, xlabel="reward of the initial policy", ylabel="reward of the trained policy")

    return draw_plot(draw, title, (4.4, 3.4))


def two_histograms(before: Sequence[float], after: Sequence[float], title: str) -> Drawing:
    """The distributions of the rewards before and after training, in the same bins."""

    def draw(axes: Any) -> None:
        low, high = min(*before, *after), max(*before, *after)
        if high - low < 1e-9 * max(abs(low), abs(high), 1.0):
            low, high = low - 0.5, high + 0.5
        bins = max(8, min(24, len(before) // 6))
        edges = [low + (high - low) * index / bins for index in range(bins + 1)]
        for values, colour, name in ((before, COLOURS[1], "initial"), (after, COLOURS[0], "trained")):
            axes.hist(values, bins=edges, color=colour, alpha=0.25)
            axes.hist(values, bins=edges, histtype="step", linewidth=2.0, color=colour, label=name)
        axes.set_xlabel("reward")
        _counts(axes, "prompts")
        _legend(axes, 2)

    return draw_plot(draw, title, (4.4, 3.4))


def before_after(rows: Sequence[tuple[str, float, float]], title: str) -> Drawing:
    """A line per category from its mean reward before training to that after: ``(name, before, after)``."""

    def draw(axes: Any) -> None:
        places = _rows(axes, [name for name, _, _ in rows])
        for place, (_, before, after) in zip(places, rows, strict=True):
            axes.plot((before, after), (place, place), color=INK, linewidth=1.6, alpha=0.6, zorder=1)
        axes.scatter([row[1] for row in rows], places, s=46, color=COLOURS[1], label="initial", zorder=2)
        axes.scatter([row[2] for row in rows], places, s=46, color=COLOURS[0], label="trained", zorder=3)
        axes.set_xlabel("mean reward")
        _legend(axes, 2)

    return draw_plot(draw, title, (4.4, max(3.4, 1.3 + 0.34 * len(rows))))


def ridges(rows: Sequence[tuple[str, Points, float]], title: str, colour: int) -> Drawing:
    """Ridge plot with a row for each ``(name, [(score, density), ...], mean)``; all rows have the same height."""

    def draw(axes: Any) -> None:
        places = _rows(axes, [name for name, _, _ in rows], (0.2, 0))
        for place, (_, points, _) in zip(places, rows, strict=True):
            highest = max(density for _, density in points)
            found = [score for score, _ in points]
            line = [place + 0.85 * density / highest for _, density in points]
            axes.fill_between(found, place, line, color=COLOURS[colour], alpha=0.3, linewidth=0)
            axes.plot(found, line, color=COLOURS[colour], linewidth=1.4)
        axes.scatter([mean for _, _, mean in rows], places, s=20, color=INK, linewidths=0, zorder=3)
        axes.set_xlabel("score")

    return draw_plot(draw, title, (4.4, max(2.6, 0.9 + 0.4 * len(rows))))


def reliability(bins: Sequence[tuple[float, float, tuple[float, float], int]], title: str) -> Drawing:
    """Reliability diagram of ``(confidence, accuracy, its interval, pairs)``; on the dashed line the two are equal."""

    def draw(axes: Any) -> None:
        axes.plot((0.5, 1), (0.5, 1), **_DASHED)
        for confidence, _, ends, pairs in bins:
            axes.plot((confidence, confidence), ends, color=COLOURS[0], linewidth=2.0, alpha=0.45)
            shown = str(pairs) if pairs < 10_000 else f"{pairs / 1000:.0f}k"
            axes.text(confidence, 1.04, shown, ha="center", va="bottom", fontsize=8)
        axes.scatter([row[0] for row in bins], [row[1] for row in bins], s=30, color=COLOURS[0], zorder=3)
        axes.set(xlim=(0.48, 1.02), ylim=(-0.04, 1.14), yticks=(0, 0.25, 0.5, 0.75, 1))
        axes.set(xlabel="confidence", ylabel="accuracy")

    return draw_plot(draw, title, (4.4, 3.4))


def cluster_map(points: Sequence[tuple[float, float, int, bool]], title: str) -> Drawing:
    """Prompts ``(x, y, cluster, chosen)`` in the plane; each cluster has its own colour and shape.

    Few clusters get a legend; more, up to ``_MAX_NUMBERED``, are numbered in place. Chosen prompts are larger, with
    an edge.
    """

    def draw(axes: Any) -> None:
        numbers = sorted({cluster for _, _, cluster, _ in points})
        few = len(numbers) <= len(COLOURS)
        for place, cluster in enumerate(numbers):
            look = {
                "linestyle": "",
                "color": COLOURS[place % len(COLOURS)],
                # Beyond six, colours are reused with other shapes.
                "marker": _MARKERS[(place + place // len(COLOURS)) % len(_MARKERS)],
            }
            for chosen, size, alpha, edge in ((False, 4.5, 0.4, 0), (True, 7.5, 1, 1.3)):
                own = [(x, y) for x, y, c, is_chosen in points if c == cluster and is_chosen == chosen]
                if own:
                    style = look | {"markersize": size, "alpha": alpha, "markeredgewidth": edge}
                    axes.plot(*zip(*own, strict=True), **style, markeredgecolor=INK, zorder=2 + chosen)
            if few:
                axes.plot([], [], **look, markersize=6, label=str(cluster + 1))
            elif len(numbers) <= _MAX_NUMBERED:
                middle = (statistics.median(p[axis] for p in points if p[2] == cluster) for axis in (0, 1))
                axes.text(*middle, str(cluster + 1), ha="center", va="center", fontweight="bold", zorder=4)
        if few:
            _legend(axes, len(numbers))
        axes.tick_params(labelbottom=False, labelleft=False, length=0)
        axes.set(xlabel="first principal component", ylabel="second")

    return draw_plot(draw, title, (4.4, 3.4))


def _rows(axes: Any, names: Sequence[str], room: tuple[float, float] = (0.6, -0.4)) -> list[int]:
    """The y position of each row, the first on top, labeled with its name; ``room`` is the margin (below, above)."""
    places = list(range(len(names)))[::-1]
    axes.set_yticks(places, [_short(name) for name in names])
    axes.set_ylim(-room[0], len(names) + room[1])
    axes.grid(False, axis="y")
    return places


def _counts(axes: Any, what: str) -> None:
    """Format a histogram's y axis, and hide the vertical grid lines."""
    axes.set_ylabel(what)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.grid(False, axis="x")


def _short(name: str) -> str:
    return name if len(name) <= 22 else name[:21] + "…"


def _legend_columns(names: Sequence[str]) -> int:
    """Number of legend columns that fit above a plot: each as wide as its longest name, a line and a gap."""
    for columns in range(min(len(names), 3), 1, -1):
        rows = -(-len(names) // columns)
        widths = [max(map(len, names[start : start + rows])) + _LEGEND_GAP for start in range(0, len(names), rows)]
        if sum(widths) <= _LEGEND_WIDTH:
            return columns
    return 1


def _legend(axes: Any, columns: int) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=columns,
        borderaxespad=0.2,
        handlelength=1.2,
        columnspacing=1.4,
    )


def _thin(points: Points, limit: int = _MAX_POINTS) -> tuple[list[float], list[float]]:
    """At most ``limit`` points: neighbours are averaged, rather than sampled, so that spikes have no undue weight."""
    size = -(-len(points) // limit)
    blocks = [points[start : start + size] for start in range(0, len(points), max(size, 1))]
    return (
        [sum(x for x, _ in block) / len(block) for block in blocks],
        [sum(y for _, y in block) / len(block) for block in blocks],
    )


def _noisy(values: list[float]) -> bool:
    """Whether the line changes direction often: a running mean would only distort a smooth schedule."""
    turns = sum((b - a) * (c - b) < 0 for a, b, c in zip(values, values[1:], values[2:], strict=False))
    return turns > len(values) / 5


def _running_mean(values: list[float], reach: int) -> list[float]:
    near = (values[max(index - reach, 0) : index + reach + 1] for index in range(len(values)))
    return [sum(part) / len(part) for part in near]
