"""Draws numbers as inline SVG that follows the page's colours and is the same for the same numbers."""

from __future__ import annotations

import contextlib
import hashlib
import io
import statistics
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from trl_rlaif.report.wording import clean

Points = Sequence[tuple[float, float]]

# Okabe and Ito's colours, which colour-blind readers tell apart too; the page has its own shade of each.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_INK, _GRID = "#7a7f87", "#7a7f88"
_MAX_POINTS = 800
_SMOOTH_FROM = 40
_SIZE = (4.4, 2.6)
_MARKERS = ("o", "s", "^", "D", "v", "P")
_MAX_NUMBERED = 36

_STYLE: dict[str, Any] = {
    "svg.hashsalt": "trl-rlaif",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "font.size": 11,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "lines.linewidth": 2.0,
}


def curves(named: Sequence[tuple[str, Points]], title: str, x_label: str = "step", level: float | None = None) -> str:
    """Lines over steps, each ``(name, [(step, value), ...])``; a long one gets its running mean too.

    Args:
        level: A value to compare with, as a dashed line.
    """

    def draw(axes: Any) -> None:
        if level is not None:
            axes.axhline(level, color=_INK, linewidth=1.0, linestyle=(0, (4, 3)))
        for index, (name, points) in enumerate(named):
            colour = COLOURS[index % len(COLOURS)]
            style = "-" if index < len(COLOURS) else "--"
            steps, values = _thin(points)
            marker = "o" if len(steps) <= 12 else ""
            shown = name if len(named) > 1 else None
            if len(steps) >= _SMOOTH_FROM and _noisy(values):
                axes.plot(steps, values, color=colour, linewidth=1.0, alpha=0.35)
                values = _running_mean(values, max(len(values) // 20, 2))
            axes.plot(steps, values, style, color=colour, marker=marker, markersize=4, label=shown)
        if len(named) > 1:
            _legend(axes, min(len(named), 3))
        axes.set_xlabel(x_label)

    return _svg(draw, title)


def confidence_histogram(confidences: Sequence[float], title: str) -> str:
    """How sure the labels are: counts of max(p, 1 - p) in ten bins from 0.5 to 1."""

    def draw(axes: Any) -> None:
        edges = [0.5 + 0.05 * index for index in range(10)] + [1.0]
        axes.hist(confidences, bins=edges, color=COLOURS[0], rwidth=0.9)
        axes.set_xlim(0.49, 1.01)
        axes.set_xlabel("confidence of the label, max(p, 1 − p)")
        axes.set_ylabel("pairs")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.grid(False, axis="x")

    return _svg(draw, title)


def paired_scatter(pairs: Points, title: str) -> str:
    """Each prompt's reward before (x) and after (y); points above the diagonal got better."""

    def draw(axes: Any) -> None:
        before, after = [x for x, _ in pairs], [y for _, y in pairs]
        low, high = min(before + after), max(before + after)
        margin = (high - low) * 0.05 or 0.5
        ends = (low - margin, high + margin)
        axes.plot(ends, ends, color=_INK, linewidth=1.0, linestyle=(0, (4, 3)))
        axes.scatter(before, after, s=22, color=COLOURS[0], alpha=0.55, linewidths=0)
        axes.set_xlim(*ends)
        axes.set_ylim(*ends)
        axes.set_xlabel("reward of the start")
        axes.set_ylabel("reward when trained")

    return _svg(draw, title, (4.4, 3.4))


def two_histograms(before: Sequence[float], after: Sequence[float], title: str) -> str:
    """The distributions of the rewards before and after, over the same bins."""

    def draw(axes: Any) -> None:
        low, high = min(*before, *after), max(*before, *after)
        if high - low < 1e-9 * max(abs(low), abs(high), 1.0):
            low, high = low - 0.5, high + 0.5
        bins = max(8, min(24, len(before) // 6))
        edges = [low + (high - low) * index / bins for index in range(bins + 1)]
        for values, colour, name in ((before, COLOURS[1], "start"), (after, COLOURS[0], "trained")):
            axes.hist(values, bins=edges, color=colour, alpha=0.25)
            axes.hist(values, bins=edges, histtype="step", linewidth=2.0, color=colour, label=name)
        axes.set_xlabel("reward")
        axes.set_ylabel("prompts")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.grid(False, axis="x")
        _legend(axes, 2)

    return _svg(draw, title, (4.4, 3.4))


def before_after(rows: Sequence[tuple[str, float, float]], title: str) -> str:
    """A line a category from its mean reward before to the one after: ``(name, before, after)``."""

    def draw(axes: Any) -> None:
        places = list(range(len(rows)))[::-1]
        names = [_short(name) for name, _, _ in rows]
        for place, (_, before, after) in zip(places, rows, strict=True):
            axes.plot((before, after), (place, place), color=_INK, linewidth=1.6, alpha=0.6, zorder=1)
        axes.scatter([row[1] for row in rows], places, s=46, color=COLOURS[1], label="start", zorder=2)
        axes.scatter([row[2] for row in rows], places, s=46, color=COLOURS[0], label="trained", zorder=3)
        axes.set_yticks(places, names)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel("mean reward")
        axes.grid(False, axis="y")
        _legend(axes, 2)

    return _svg(draw, title, (4.4, max(3.4, 1.3 + 0.34 * len(rows))))


def ridges(rows: Sequence[tuple[str, Points, float]], title: str, colour: int) -> str:
    """A row for each ``(name, [(score, density), ...], mean)`` over one axis; all rows are of the same height."""

    def draw(axes: Any) -> None:
        places = list(range(len(rows)))[::-1]
        for place, (_, points, _) in zip(places, rows, strict=True):
            highest = max(density for _, density in points)
            found = [score for score, _ in points]
            line = [place + 0.85 * density / highest for _, density in points]
            axes.fill_between(found, place, line, color=COLOURS[colour], alpha=0.3, linewidth=0)
            axes.plot(found, line, color=COLOURS[colour], linewidth=1.4)
        axes.scatter([mean for _, _, mean in rows], places, s=20, color=_INK, linewidths=0, zorder=3)
        axes.set_yticks(places, [_short(name) for name, _, _ in rows])
        axes.set_ylim(-0.2, len(rows))
        axes.set_xlabel("score")
        axes.grid(False, axis="y")

    return _svg(draw, title, (4.4, max(2.6, 0.9 + 0.4 * len(rows))))


def reliability(bins: Sequence[tuple[float, float, tuple[float, float], int]], title: str) -> str:
    """Points ``(confidence, share right, its interval, pairs)``; on the dashed line both shares are the same."""

    def draw(axes: Any) -> None:
        axes.plot((0.5, 1), (0.5, 1), color=_INK, linewidth=1.0, linestyle=(0, (4, 3)))
        for confidence, _, ends, pairs in bins:
            axes.plot((confidence, confidence), ends, color=COLOURS[0], linewidth=2.0, alpha=0.45)
            shown = str(pairs) if pairs < 10_000 else f"{pairs / 1000:.0f}k"
            axes.text(confidence, 1.04, shown, ha="center", va="bottom", fontsize=8)
        axes.scatter([row[0] for row in bins], [row[1] for row in bins], s=30, color=COLOURS[0], zorder=3)
        axes.set_xlim(0.48, 1.02)
        axes.set_ylim(-0.04, 1.14)
        axes.set_yticks((0, 0.25, 0.5, 0.75, 1))
        axes.set_xlabel("confidence")
        axes.set_ylabel("share right")

    return _svg(draw, title, (4.4, 3.4))


def cluster_map(points: Sequence[tuple[float, float, int, bool]], title: str) -> str:
    """Prompts ``(x, y, cluster, chosen)`` in the plane; few clusters have each a colour and a shape of its own.

    More of them are numbered where they lie. What is chosen is drawn larger, with an edge.
    """

    def draw(axes: Any) -> None:
        numbers = sorted({cluster for _, _, cluster, _ in points})
        few = len(numbers) <= len(COLOURS)
        for place, cluster in enumerate(numbers):
            look = {
                "linestyle": "",
                "color": COLOURS[place % len(COLOURS)],
                # Beyond six, a colour comes again with another shape.
                "marker": _MARKERS[(place + place // len(COLOURS)) % len(_MARKERS)],
            }
            for chosen, size, alpha, edge in ((False, 4.5, 0.4, 0), (True, 7.5, 1, 1.3)):
                own = [(x, y) for x, y, c, is_chosen in points if c == cluster and is_chosen == chosen]
                if own:
                    style = look | {"markersize": size, "alpha": alpha, "markeredgewidth": edge}
                    axes.plot(*zip(*own, strict=True), **style, markeredgecolor=_INK, zorder=2 + chosen)
            if few:
                axes.plot([], [], **look, markersize=6, label=str(cluster + 1))
            elif len(numbers) <= _MAX_NUMBERED:
                middle = (statistics.median(p[axis] for p in points if p[2] == cluster) for axis in (0, 1))
                axes.text(*middle, str(cluster + 1), ha="center", va="center", fontweight="bold", zorder=4)
        if few:
            _legend(axes, len(numbers))
        axes.tick_params(labelbottom=False, labelleft=False, length=0)
        axes.set_xlabel("first principal component")
        axes.set_ylabel("second")

    return _svg(draw, title, (4.4, 3.4))


def _short(name: str) -> str:
    return name if len(name) <= 22 else name[:21] + "…"


def _legend(axes: Any, columns: int) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=columns,
        borderaxespad=0.2,
        handlelength=1.2,
        columnspacing=1.4,
    )


def _thin(points: Points) -> tuple[list[float], list[float]]:
    """At most ``_MAX_POINTS`` points: neighbours are averaged, so that no spike decides by being picked."""
    size = -(-len(points) // _MAX_POINTS)
    blocks = [points[start : start + size] for start in range(0, len(points), max(size, 1))]
    return (
        [sum(x for x, _ in block) / len(block) for block in blocks],
        [sum(y for _, y in block) / len(block) for block in blocks],
    )


def _noisy(values: list[float]) -> bool:
    """Whether the line turns often: a smooth schedule would only be bent by a running mean."""
    turns = sum((b - a) * (c - b) < 0 for a, b, c in zip(values, values[1:], values[2:], strict=False))
    return turns > len(values) / 5


def _running_mean(values: list[float], reach: int) -> list[float]:
    means = []
    for index in range(len(values)):
        near = values[max(index - reach, 0) : index + reach + 1]
        means.append(sum(near) / len(near))
    return means


@contextlib.contextmanager
def _house_style() -> Iterator[None]:
    import matplotlib.style

    # "default" first: a reader's own matplotlibrc must not change the page.
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        # The page's own font draws the text, so a glyph that matplotlib's font lacks is no loss.
        warnings.simplefilter("ignore", UserWarning)
        yield


def _svg(draw: Callable[[Any], None], title: str, size: tuple[float, float] = _SIZE) -> str:
    """Runs ``draw`` on fresh axes and returns the figure as an ``<svg>`` element titled ``title``."""
    with _house_style():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        draw(axes)
        # Few enough that the labels never touch, whatever the numbers.
        axes.locator_params(axis="x", nbins=5)
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(file.getvalue(), clean(title))


def _for_page(svg: bytes, title: str) -> str:
    """The same drawing without what would reach beyond it: prolog, metadata, global style, spare ids."""
    root = ET.fromstring(svg)
    width, height = root.get("viewBox", "0 0 1 1").split()[2:]
    used = _references(root)
    # All drawings of the page share one space of ids.
    own = hashlib.sha256(title.encode() + svg).hexdigest()[:8] + "-"
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style", "title"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        if attributes.get("id") not in used:
            attributes.pop("id", None)
        else:
            attributes["id"] = own + attributes["id"]
        for key, value in attributes.items():
            if key == "href":
                attributes[key] = value.replace("#", f"#{own}", 1)
            elif key in ("style", "fill", "stroke", "clip-path"):
                attributes[key] = _follow_page(value.replace("url(#", f"url(#{own}"))
        element.attrib.clear()
        element.attrib.update(attributes)
    root.attrib.clear()
    box = f"0 0 {width} {height}"
    root.attrib.update({"class": "plot", "viewBox": box, "role": "img", "aria-label": title})
    heading = ET.Element("title")
    heading.text = title
    root.insert(0, heading)
    return ET.tostring(root, encoding="unicode", short_empty_elements=True)


def _references(root: ET.Element) -> set[str]:
    used = set()
    for element in root.iter():
        for key, value in element.attrib.items():
            if key.rpartition("}")[2] == "href" and value.startswith("#"):
                used.add(value[1:])
            used.update(part.partition(")")[0] for part in value.split("url(#")[1:])
    return used


def _follow_page(style: str) -> str:
    """The fixed colours of a style attribute as the page's own: the text's, and a variable a series."""
    style = style.replace(_INK, "currentColor").replace(_GRID, "currentColor")
    for index, colour in enumerate(COLOURS):
        style = style.replace(colour, f"var(--series-{index + 1})")
    return style
