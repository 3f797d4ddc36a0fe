"""Renders matplotlib drawings as inline SVG in the page's colours, and as standalone SVG and PNG files."""

from __future__ import annotations

import contextlib
import hashlib
import io
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from trl_rlaif.report.formatting import clean

# Based on Okabe and Ito's colours, which colour-blind readers can distinguish; dark mode has its own shades.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b65590", "#b37a00", "#3a9bd1")
INK = "#5c626b"
_GRID, _PAPER = "#5c626c", "#ffffff"
_SIZE = (4.4, 2.6)
_DOTS_PER_INCH = 150
_SVG = "http://www.w3.org/2000/svg"
_TITLE_HEIGHT = 22  # of an exported SVG, in points

_STYLE: dict[str, Any] = {
    "svg.hashsalt": "trl-rlaif",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "axes.formatter.useoffset": False,
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": _PAPER,
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


@dataclass(frozen=True)
class Drawing:
    """A plot in its three forms.

    Args:
        inline: An ``<svg>`` element for the page, in the page's colours and font.
        svg: A standalone file with a white background.
        figure: The matplotlib figure, for ``titled_png``.
    """

    inline: Markup
    svg: bytes
    figure: Any

    def titled_svg(self, heading: str) -> bytes:
        """The SVG file with its heading above the drawing, since outside of the page it has no other."""
        root = ET.fromstring(self.svg)
        width, height = (float(size) for size in root.get("viewBox", "0 0 1 1").split()[2:])
        root.set("viewBox", f"0 {-_TITLE_HEIGHT} {width:g} {height + _TITLE_HEIGHT:g}")
        root.set("height", f"{height + _TITLE_HEIGHT:g}pt")
        box = {"y": f"{-_TITLE_HEIGHT}", "width": f"{width:g}", "height": f"{_TITLE_HEIGHT}", "fill": _PAPER}
        ET.SubElement(root, f"{{{_SVG}}}rect", box)
        look = {"x": "6", "y": "-6", "fill": INK, "style": "font: bold 12px sans-serif"}
        ET.SubElement(root, f"{{{_SVG}}}text", look).text = clean(heading)
        return ET.tostring(root, encoding="utf-8", xml_declaration=True)

    def titled_png(self, heading: str) -> bytes:
        """The same as PNG; rendered on demand, since that takes as long as all the rest."""
        file = io.BytesIO()
        with _house_style():
            title = self.figure.text(0.02, 1.02, clean(heading), fontweight="bold", va="bottom")
            self.figure.savefig(
                file, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None}, bbox_inches="tight"
            )
            title.remove()
        return file.getvalue()


def draw_plot(draw: Callable[..., None], title: str, size: tuple[float, float] = _SIZE, rows: int = 1) -> Drawing:
    """Run ``draw`` on new axes: ``rows`` of them, which share one x axis.

    Args:
        title: Text alternative for readers who cannot see the drawing.
    """
    title = clean(title)
    with _house_style():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        stack: Any = figure.subplots(rows, squeeze=False, sharex=True)[:, 0]
        draw(*stack)
        # Few enough that tick labels never touch, whatever the numbers.
        stack[-1].locator_params(axis="x", nbins=5)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
        figure.set_layout_engine("none")  # the layout is done, and takes most of the time
    svg = file.getvalue()
    return Drawing(Markup(_for_page(svg, title)), svg, figure)


@contextlib.contextmanager
def _house_style() -> Iterator[None]:
    import matplotlib.style

    # "default" first: a reader's own matplotlibrc must not change the page.
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        # The text is drawn in the page's own font, so glyphs that matplotlib's font lacks do not matter.
        warnings.simplefilter("ignore", UserWarning)
        yield


def _for_page(svg: bytes, title: str) -> str:
    """The drawing without anything that affects the rest of the page: prolog, metadata, global style, unused ids."""
    root = ET.fromstring(svg)
    width, height = root.get("viewBox", "0 0 1 1").split()[2:]
    used = _references(root)
    # All drawings on the page share one id namespace.
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
    """A style attribute with the page's colours: none for paper, the text's for ink, a variable per series."""
    style = style.replace(_PAPER, "none").replace(INK, "currentColor").replace(_GRID, "currentColor")
    for index, colour in enumerate(COLOURS):
        style = style.replace(colour, f"var(--series-{index + 1})")
    return style
