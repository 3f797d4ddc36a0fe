"""Writes the page, and its plots as separate files."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trl_rlaif.errors import RunError
from trl_rlaif.files import write_folder
from trl_rlaif.report.figures import Figure

_LONGEST_NAME = 60


def write_page(path: Path, html: str) -> None:
    """Replace the page atomically.

    Raises:
        RunError: It cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(html.encode("utf-8"))
        os.replace(draft, path)
    except OSError as error:
        raise _unwritable("The report", path, error) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def write_plots(folder: Path, page: Mapping[str, Any]) -> None:
    """Replace ``folder`` by one with an SVG and a PNG of every plot of ``page``; remove it if there are none.

    Raises:
        RunError: They cannot be written.
    """
    plots = named_plots(page)

    def write(building: Path) -> None:
        for name, figure in plots.items():
            (building / f"{name}.svg").write_bytes(figure.drawing.titled_svg(figure.heading))
            (building / f"{name}.png").write_bytes(figure.drawing.titled_png(figure.heading))

    try:
        if plots:
            write_folder(folder, write)
        elif folder.is_dir():
            shutil.rmtree(folder)
    except OSError as error:
        shutil.rmtree(folder.with_name(f".{folder.name}.building"), ignore_errors=True)
        raise _unwritable("The plots of the report", folder, error) from error


def named_plots(page: Mapping[str, Any]) -> dict[str, Figure]:
    """Every figure of a page, in order, keyed by a file name without suffix, made from its heading.

    A heading used for several sets is prefixed with the set's name; names that still collide get a number.
    """
    found = list(_figures(page))
    headings = [slug(figure.heading) or "plot" for _, figure in found]
    named: dict[str, Figure] = {}
    for (part, figure), heading in zip(found, headings, strict=True):
        name = f"{slug(part)}-{heading}" if headings.count(heading) > 1 and slug(part) else heading
        unique, number = name, 2
        while unique in named:
            unique, number = f"{name}-{number}", number + 1
        named[unique] = figure
    return named


def slug(text: str) -> str:
    """Lower-case Latin letters and digits joined by hyphens, safe as a file name; empty if there are none."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:_LONGEST_NAME].strip("-")


def _figures(part: Any, name: str = "") -> Iterator[tuple[str, Figure]]:
    """The figures in a part of the page, each with the name of that part."""
    if isinstance(part, Figure):
        yield name, part
    elif isinstance(part, Mapping):
        own = part.get("name")
        for value in part.values():
            yield from _figures(value, own if isinstance(own, str) else name)
    elif isinstance(part, (list, tuple)):
        for value in part:
            yield from _figures(value, name)


def _unwritable(what: str, path: Path, error: OSError) -> RunError:
    return RunError(
        f"{what} cannot be written: {error.strerror or error}.",
        where=str(path),
        fix="Check the folder's permissions and the space left on its disk.",
    )
