"""Rehearsal and forgetting: what the policy forgot during training, what it rehearsed, and at what cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trl_rlaif.recipe.sections import FORGET_SET
from trl_rlaif.report import plots
from trl_rlaif.report.figures import DRAWN_LINES, ELSEWHERE, Figure, curve, first_rows, present
from trl_rlaif.report.formatting import count, label, number, percent, scores, section
from trl_rlaif.report.parsing import spread
from trl_rlaif.report.run_data import MapPoint, Rehearsed, Run

# More points would only hide each other, and make the page large.
_DRAWN_POINTS = 800


@dataclass(frozen=True)
class GroupRow:
    """The rehearsed pairs of one cluster, with the best one as an example."""

    name: str
    pairs: int
    score: float | None
    prompt: str
    response: str


def rehearsal_part(run: Run) -> dict[str, Any] | None:
    """Curves, map, costs and tables; None if nothing was rehearsed and no forgetting was measured."""
    series = run.series.get("rl", {})
    rates, nlls = (_lines(series, kind) for kind in ("win_rate", "nll"))
    figures = present(
        curve(
            series, "Win rate over the initial policy",
            "Of greedy responses during training; the dashed line is the initial policy. A falling curve means "
            "forgetting.",
            rates, level=0.5,
        ),
        curve(
            series, "NLL of the initial policy's good answers",
            "In nats per token. A rising curve means forgetting.", nlls,
        ),
        curve(
            series, "NLL of rehearsed pairs", "In nats per token, for the pairs in each update.",
            {"rehearsal/nll": "NLL"},
        ),
        _map(run.map),
    )  # fmt: skip
    rows = _groups(run.rehearsed)
    found = {
        "figures": figures,
        "facts": _facts(section(run.results, "rl", "rehearsal")),
        "sets": _sets(run),
        **first_rows(rows),
    }
    return found if any(found.values()) else None


def _lines(series: dict[str, Any], kind: str) -> dict[str, str]:
    """The metrics of all sets with their names in the legend, the forget set first."""
    begin, end = ELSEWHERE[0], f"/{kind}"
    keys = [key for key in series if key.startswith(begin) and key.endswith(end)]
    names = {key: label(key.removeprefix(begin).removesuffix(end), 24) for key in keys}
    ordered = sorted(names.items(), key=lambda item: item[1] != FORGET_SET)
    return dict(ordered[:DRAWN_LINES])


def _facts(values: dict[str, Any]) -> list[tuple[str, str]]:
    pairs, share = number(values.get("pairs")), number(values.get("share_of_time"))
    first, last = number(values.get("nll_first")), number(values.get("nll_last"))
    found = []
    if pairs is not None:
        found.append(("pairs rehearsed", count(pairs)))
    if share is not None:
        found.append(("fraction of the updates' time", percent(share)))
    if first is not None and last is not None:
        found.append(("their NLL, first and last update", "{} → {}".format(*scores(first, last))))
    return found


def _sets(run: Run) -> list[dict[str, Any]]:
    """The evaluated sets whose NLL is known, with their metrics of forgetting."""
    found = []
    for name, values in section(run.results, "evaluate", "sets").items():
        values = section(values)
        row = {key: number(values.get(key)) for key in ("prompts", "win_rate", "nll_start", "nll_trained")}
        if row["nll_start"] is not None and row["nll_trained"] is not None:
            found.append({"name": label(name) or "held-out", **row})
    return found


def _groups(rehearsed: list[Rehearsed]) -> list[GroupRow]:
    """One row per cluster, the largest first."""
    found: dict[str, list[Rehearsed]] = {}
    for pair in rehearsed:
        found.setdefault(pair.group, []).append(pair)
    rows = []
    for name, pairs in found.items():
        known = [pair.score for pair in pairs if pair.score is not None]
        best = max(pairs, key=lambda pair: float("-inf") if pair.score is None else pair.score)
        mean = sum(known) / len(known) if known else None
        rows.append(GroupRow(name, len(pairs), mean, best.prompt, best.response))
    return sorted(rows, key=lambda row: -row.pairs)


def _map(points: list[MapPoint]) -> Figure | None:
    if not points:
        return None
    chosen = [point for point in points if point.chosen]
    others = [point for point in points if not point.chosen]
    room = max(_DRAWN_POINTS - len(chosen), 0)
    drawn = spread(chosen, _DRAWN_POINTS) + spread(others, room)
    clusters = len({point.cluster for point in points})
    said = f"{count(len(points), 'prompt')} in {count(clusters, 'cluster')}, {count(len(chosen))} with a rehearsed pair"
    caption = (
        "The first two principal components of the prompt embeddings: nearby prompts are similar. Rehearsed ones are "
        "large, with an edge."
    )
    if len(drawn) < len(points):
        caption += f" {count(len(drawn))} of {count(len(points), 'prompt')} are shown."
    drawing = plots.cluster_map([(p.x, p.y, p.cluster, p.chosen) for p in drawn], f"Map of the prompts: {said}")
    return Figure("Prompt clusters", drawing, caption, said)
