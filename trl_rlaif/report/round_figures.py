"""The page's section on rounds: a row for each, and each reward model's accuracy on new responses."""

from __future__ import annotations

from typing import Any

from trl_rlaif.report import plots
from trl_rlaif.report.figures import Figure, present, share
from trl_rlaif.report.formatting import label, number, percent, scores, section
from trl_rlaif.report.run_data import Run

MAX_ROUNDS = 100


def rounds_part(run: Run) -> dict[str, Any] | None:
    """A row for each round, and a figure; None for a run without rounds."""
    recipe, found = section(run.recipe, "rounds"), section(run.results, "rounds").get("rows")
    if not recipe or not isinstance(found, list) or not found:  # results may outlive the recipe's rounds
        return None
    rows = [_row(section(row)) for row in found[:MAX_ROUNDS]]
    return {
        "rows": rows,
        "judged": any(row["after"]["rate"] is not None for row in rows),
        "implicit": any(row["implicit"] for row in rows),
        "earlier": percent(number(recipe.get("earlier"))),
        "moves": label(recipe.get("reference")) == "previous",
        "figures": present(_figure(rows)),
    }


def _row(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "pairs": number(row.get("pairs")),
        "tokens": number(row.get("tokens")),
        "before": share(section(row, "accuracy_before")),
        "before_held_out": share(section(row, "accuracy_before_held_out")),
        "after": share(section(row, "accuracy")),
        "score": _change(row, "score", lambda *both: scores(*both)),
        "implicit": _change(row, "implicit", lambda *both: [*map(percent, both)]),
        "kl": number(row.get("kl_last")),
    }


def _change(row: dict[str, Any], name: str, shown: Any) -> str:
    """A number's first and last value in a round, as ``0.12 → 0.34``."""
    both = [number(row.get(f"{name}_{when}")) for when in ("first", "last")]
    return "" if None in both else " → ".join(shown(*both))


def _figure(rows: list[dict[str, Any]]) -> Figure | None:
    named = [
        (
            name,
            [
                (n, row[key]["rate"], row[key]["interval"])
                for n, row in enumerate(rows, 1)
                if row[key]["rate"] is not None
            ],
        )
        for name, key in (("before training on the round", "before_held_out"), ("after", "after"))
    ]
    if not all(points for _, points in named):
        return None
    heading = "Accuracy of the reward model on the responses of each round"
    caption = (
        "On each round's held-out prompts, as its policy answered them: the previous round's reward model, and the one "
        "trained on the round's other prompts. Bars are 95% intervals; dashed line: chance."
    )
    return Figure(heading, plots.by_round(named, heading, "accuracy"), caption)
