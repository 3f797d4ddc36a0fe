"""Reads a run's folder into plain data: tolerant of what is missing, cut off or not a number."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_rlaif.errors import UserError
from trl_rlaif.report.wording import clean, label, number, section, shorten

MAX_SAMPLES = 200
MAX_RECIPE_CHARACTERS = 100_000
# Beyond this a drawing library's arithmetic overflows, and no honest metric goes there.
_LARGEST_DRAWN = 1e30
# A metric's name may hold a category's: what is cut off would be lost.
_METRIC_NAME = 300
# Characters of a rehearsed pair's prompt, and of its response, that the table shows.
_EXAMPLE = 240
_RESTORE = "Restore the run's own copy."

Series = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Turn:
    """One message of a prompt, cut to what is shown; ``cut`` is the number of characters left out."""

    role: str
    text: str
    cut: int


@dataclass(frozen=True)
class Sample:
    """A held-out prompt with the answers of the starting and of the trained policy."""

    set: str
    category: str
    prompt: list[Turn]
    start: Turn
    trained: Turn
    reward_start: float | None
    reward_trained: float | None
    p_trained: float | None


@dataclass(frozen=True)
class ScoredPair:
    """A held-out pair's scores, (chosen, rejected), ``before`` and ``after`` the reward transforms (None without)."""

    category: str
    p: float | None
    before: tuple[float, float]
    after: tuple[float, float] | None


@dataclass(frozen=True)
class Rehearsed:
    """A pair that the policy rehearsed; ``group`` is its cluster as a reader counts them, or what it was chosen for."""

    group: str
    score: float | None
    prompt: str
    response: str


@dataclass(frozen=True)
class MapPoint:
    """A prompt's place on the map of clusters, 0 being the first; ``chosen`` where it is rehearsed."""

    x: float
    y: float
    cluster: int
    chosen: bool


@dataclass
class Labels:
    """What labels.jsonl says: confidences in 0.5..1 and the winner's table, keyed (order 1-2, order 2-1)."""

    total: int = 0
    confidences: list[float] = field(default_factory=list)
    winners: dict[tuple[int, int], int] = field(default_factory=lambda: {(1, 1): 0, (1, 2): 0, (2, 1): 0, (2, 2): 0})
    ties: int = 0


@dataclass
class Run:
    """A run's folder as plain data; what the folder does not hold is empty."""

    name: str
    recipe: dict[str, Any]
    recipe_text: str
    results: dict[str, Any]
    series: dict[str, Series]
    labels: Labels
    samples: list[Sample]
    scored: list[ScoredPair]
    rehearsed: list[Rehearsed]
    map: list[MapPoint]
    pairs: int
    notes: list[str]


def read_run(folder: Path) -> Run:
    """Everything that the report shows of ``folder``.

    Raises:
        UserError: The folder does not exist, has no recipe.yaml, or its recipe.yaml is no YAML mapping.
    """
    recipe, recipe_text = _read_recipe(folder)
    notes: list[str] = []
    results = _read_results(folder / "results.json", notes)
    pairs = list(_lines(folder / "pairs.jsonl", notes))
    name = label((recipe.get("run") or {}).get("name") if isinstance(recipe.get("run"), dict) else None)
    return Run(
        name=name or label(folder.resolve().name) or "run",
        recipe=recipe,
        recipe_text=recipe_text,
        results=results,
        series=_read_series(folder / "metrics.jsonl", notes),
        labels=_read_labels(folder / "labels.jsonl", results, pairs, notes),
        samples=_read_samples(folder / "samples.jsonl", notes),
        scored=_read_scored(folder / "reward_scores.jsonl", notes),
        rehearsed=_read_rehearsed(folder / "rehearsal.jsonl", notes),
        map=_read_map(folder / "selection_map.jsonl", notes),
        pairs=len(pairs),
        notes=notes,
    )


def spread(items: list[Any], limit: int) -> list[Any]:
    """At most ``limit`` of the items, evenly spaced, in their order."""
    if len(items) <= limit:
        return items
    return [items[index * len(items) // limit] for index in range(limit)]


def _read_recipe(folder: Path) -> tuple[dict[str, Any], str]:
    import yaml

    path = folder / "recipe.yaml"
    if not path.is_file():
        raise UserError(
            "This is not a run's folder: it has no recipe.yaml.",
            where=str(folder),
            fix="Give the folder that `trl-rlaif run` wrote.",
        )
    text = clean(path.read_text(encoding="utf-8", errors="replace"))
    try:
        recipe = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError("recipe.yaml is not valid YAML.", where=where, fix=_RESTORE) from error
    if not isinstance(recipe, dict):
        raise UserError("recipe.yaml holds no sections.", where=str(path), fix=_RESTORE)
    lines = (shorten(line) for line in text[:MAX_RECIPE_CHARACTERS].split("\n"))
    shown = "\n".join(f"{line} … ({cut:,} characters left out)" if cut else line for line, cut in lines)
    if len(text) > MAX_RECIPE_CHARACTERS:
        shown += f"\n… ({len(text) - MAX_RECIPE_CHARACTERS:,} characters left out)"
    return recipe, shown


def _read_results(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        results = json.loads(path.read_bytes().decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        results = None
    if not isinstance(results, dict):
        notes.append("results.json could not be read, so the final numbers are missing from this page.")
        return {}
    return results


def _lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file; a last line that was cut off is passed over, others are noted."""
    if not path.is_file():
        return
    unreadable = 0
    with path.open("rb") as file:
        for raw in file:
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8", errors="replace"))
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield row
            elif raw.endswith(b"\n"):
                unreadable += 1
    if unreadable:
        lines = "1 line" if unreadable == 1 else f"{unreadable:,} lines"
        notes.append(f"{lines} of {path.name} could not be read and left out.")


def _read_series(path: Path, notes: list[str]) -> dict[str, Series]:
    # A resumed run logs some steps twice: the later line is what the run went on from.
    points: dict[str, dict[str, dict[float, float]]] = {}
    not_finite: dict[str, int] = {}
    for row in _lines(path, notes):
        step = number(row.get("step"))
        if step is None or abs(step) > _LARGEST_DRAWN:
            continue
        stage = points.setdefault(label(row.get("stage")), {})
        for key, raw in row.items():
            if key in ("stage", "step") or isinstance(raw, bool) or not isinstance(raw, (int, float)):
                continue
            key, value = label(key, _METRIC_NAME), number(raw)
            if value is None or abs(value) > _LARGEST_DRAWN:
                not_finite[key] = not_finite.get(key, 0) + 1
            else:
                stage.setdefault(key, {})[step] = value
    for key, times in list(not_finite.items())[:20]:
        notes.append(
            f"The metric {key} was NaN, infinite or beyond 1e30 {times:,} time{'s' if times > 1 else ''}; "
            "these points are not drawn."
        )
    return {
        stage: {key: sorted(values.items()) for key, values in metrics.items()} for stage, metrics in points.items()
    }


def _read_labels(path: Path, results: dict[str, Any], pairs: list[dict[str, Any]], notes: list[str]) -> Labels:
    """The run's own labels, one a pair: the file may also hold those of other labelers, and of pairs that are gone."""
    setup = section(results, "label").get("setup")
    latest = {}
    for row in _lines(path, notes):
        if setup is None:
            latest[str(row.get("id"))] = row
        elif row.get("setup") == setup:
            latest[str(row.get("pair"))] = row
    # A label is its pair's by the texts: the id in its line is what some pair with these texts was once called.
    rows = list(latest.values()) if setup is None else [latest[key] for key in map(_key, pairs) if key in latest]
    labels = Labels()
    for row in rows:
        labels.total += 1
        p, p_12, p_21 = (_probability(row.get(key)) for key in ("p", "p_12", "p_21"))
        if p is not None:
            labels.confidences.append(max(p, 1 - p))
        if p_12 is None or p_21 is None:
            continue
        if p_12 == 0.5 or p_21 == 0.5:
            labels.ties += 1
        else:
            labels.winners[(1 if p_12 > 0.5 else 2, 1 if p_21 > 0.5 else 2)] += 1
    return labels


def _key(pair: dict[str, Any]) -> str:
    """A pair as labels.jsonl knows it; an empty string where the line is no pair."""
    from trl_rlaif.data import Pair
    from trl_rlaif.labels.store import pair_key

    try:
        return pair_key(Pair("", pair["prompt"], pair["response_1"], pair["response_2"]))
    except (KeyError, TypeError):
        return ""


def _read_samples(path: Path, notes: list[str]) -> list[Sample]:
    return [
        Sample(
            set=label(row.get("set")) or "held-out",
            category=label(row.get("category")),
            prompt=_turns(row.get("prompt")),
            start=_turn("", row.get("start")),
            trained=_turn("", row.get("trained")),
            reward_start=_drawable(row.get("reward_start")),
            reward_trained=_drawable(row.get("reward_trained")),
            p_trained=_probability(row.get("p_trained")),
        )
        for row in _lines(path, notes)
    ]


def _read_scored(path: Path, notes: list[str]) -> list[ScoredPair]:
    scored = []
    for row in _lines(path, notes):
        before, after = _both(row, "chosen", "rejected"), _both(row, "chosen_after", "rejected_after")
        if before is not None:
            scored.append(ScoredPair(label(row.get("category")), _probability(row.get("p")), before, after))
    return scored


def _read_rehearsed(path: Path, notes: list[str]) -> list[Rehearsed]:
    found = []
    for row in _lines(path, notes):
        cluster = number(row.get("cluster"))
        group = f"cluster {cluster + 1:.0f}" if cluster is not None else label(row.get("why")) or "no cluster"
        texts = (_one_line(row.get(key)) for key in ("prompt", "response"))
        found.append(Rehearsed(group, _drawable(row.get("score")), *texts))
    return found


def _one_line(content: Any) -> str:
    """A text, or the last message of a conversation, cut to a line."""
    turns = _turns(content[-1:] if isinstance(content, list) else content)
    return label(turns[0].text if turns else "", _EXAMPLE)


def _read_map(path: Path, notes: list[str]) -> list[MapPoint]:
    found = []
    for row in _lines(path, notes):
        place, cluster = _both(row, "x", "y"), number(row.get("cluster"))
        if place is not None and cluster is not None:
            found.append(MapPoint(*place, int(cluster), row.get("chosen") is True))
    return found


def _both(row: dict[str, Any], first: str, second: str) -> tuple[float, float] | None:
    one, other = _drawable(row.get(first)), _drawable(row.get(second))
    return None if one is None or other is None else (one, other)


def _turns(prompt: Any) -> list[Turn]:
    if not isinstance(prompt, list):
        return [_turn("", prompt)]
    shown = [
        _turn(label(message.get("role"), 30), message.get("content"))
        if isinstance(message, dict)
        else _turn("", message)
        for message in prompt[:20]
    ]
    left_out = len(prompt) - len(shown)
    return shown + ([Turn("", f"… {left_out:,} more messages", 0)] if left_out > 0 else [])


def _turn(role: str, content: Any) -> Turn:
    if content is None:
        content = ""
    text, cut = shorten(content if isinstance(content, str) else json.dumps(content, default=str))
    return Turn(role, text, cut)


def _drawable(value: Any) -> float | None:
    value = number(value)
    return value if value is not None and abs(value) <= _LARGEST_DRAWN else None


def _probability(value: Any) -> float | None:
    value = number(value)
    return value if value is not None and 0 <= value <= 1 else None
