"""The page's section on a taught judge: its answers to held-out pairs before and after, by source."""

from __future__ import annotations

from typing import Any

from trl_rlaif.report.figures import share
from trl_rlaif.report.formatting import label, number, section
from trl_rlaif.report.run_data import Run

_SOURCES = {
    "all": "all",
    "people": "people's choices",
    "labels": "another judge's labels",
    "other_prompt": "contrast: an answer to another prompt",
    "cut_off": "contrast: cut off",
    "looping": "contrast: looping",
    "shuffled": "contrast: words shuffled",
    "substituted": "contrast: words of other responses",
    "constraint": "contrast: ignores a constraint",
}


def teaching_part(run: Run) -> dict[str, Any] | None:
    """Whether the adapter is used, and a row for each source; None without the stage judge."""
    result = section(run.results, "judge")
    if not result:
        return None
    sources = section(result, "sources")
    return {
        "judge": label(result.get("judge"), 120),
        "unused": None if result.get("used") is True else label(result.get("reason"), 300),
        "gain": number(result.get("gain")),
        "error": number(result.get("standard_error")),
        "rows": [_row(name, section(values)) for name, values in sources.items()],
    }


def _row(name: Any, values: dict[str, Any]) -> dict[str, Any]:
    sides = [section(values, when) for when in ("before", "after")]
    return {
        "name": _SOURCES.get(str(name), label(name)),
        "taught": number(values.get("taught")),
        "held_out": number(values.get("held_out")),
        "agreement": [share(section(side, "agreement")) for side in sides],
        "bias": [share(section(side, "position_bias")) for side in sides],
        "ece": [number(side.get("ece")) for side in sides],
    }
