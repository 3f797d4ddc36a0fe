"""Reads a run's folder into plain data; tolerates missing, truncated and non-finite values."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_rlaif.errors import RunError, UserError
from trl_rlaif.files import unsigned
from trl_rlaif.pipeline import artifacts
from trl_rlaif.report.formatting import clean, count, label, number, section, shorten
from trl_rlaif.report.jury import read_verdicts
from trl_rlaif.report.label_data import Labels, read_labels
from trl_rlaif.report.parsing import (
    LARGEST_DRAWN,
    Turn,
    both,
    drawable,
    lines,
    probability,
    stored_lines,
    turn,
    turns,
)
from trl_rlaif.report.rankings import RankedPairs, read_rankings
from trl_rlaif.report.sampled import SampledPair, read_sampled

MAX_SAMPLES = 200
MAX_RECIPE_CHARACTERS = 100_000
# Metric names may contain category names, which must not be cut off.
_METRIC_NAME = 300
# Maximum characters that the table shows of a rehearsed pair's prompt, and of its response.
_EXAMPLE = 240
_MAX_JUDGES = 8
_RESTORE = "Restore the run's own copy."

Series = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Sample:
    """A held-out prompt with the answers of the initial and the trained policy."""

    set: str
    category: str
    prompt: list[Turn]
    start: Turn
    trained: Turn
    reward_start: float | None
    reward_trained: float | None
    p_trained: float | None
    # Preference probabilities of the other judges, by name.
    others: list[tuple[str, float]]


@dataclass(frozen=True)
class ScoredPair:
    """A held-out pair's scores (chosen, rejected), ``before`` and ``after`` the reward transforms (None without).

    ``human`` is whether a person also preferred the chosen response; None if nobody was asked.
    """

    category: str
    p: float | None
    human: bool | None
    before: tuple[float, float]
    after: tuple[float, float] | None


@dataclass(frozen=True)
class Rehearsed:
    """A pair that the policy rehearsed; ``group`` names its cluster, counted from 1, or why it was chosen."""

    group: str
    score: float | None
    prompt: str
    response: str


@dataclass(frozen=True)
class MapPoint:
    """A prompt's position on the map and its cluster, counted from 0; ``chosen`` if it is rehearsed."""

    x: float
    y: float
    cluster: int
    chosen: bool


@dataclass
class Run:
    """A run's folder as plain data; anything missing from the folder is empty."""

    name: str
    recipe: dict[str, Any]
    recipe_text: str
    results: dict[str, Any]
    series: dict[str, Series]
    labels: Labels
    rankings: RankedPairs
    sampled: list[SampledPair]
    samples: list[Sample]
    scored: list[ScoredPair]
    rehearsed: list[Rehearsed]
    map: list[MapPoint]
    people: dict[str, Any]
    pairs: int
    notes: list[str]


def read_run(folder: Path, *, labels: bool = True) -> Run:
    """Read everything that the report shows.

    Args:
        folder: Folder of a run.
        labels: Whether to read pairs and labels, of which there may be millions.

    Raises:
        UserError: The folder does not exist or has no recipe.yaml, or it is not a YAML mapping or is from a later
            version.
    """
    recipe, recipe_text = _read_recipe(folder)
    notes: list[str] = []
    results = _read_results(folder / artifacts.RESULTS, notes)
    pairs = stored_lines(folder / artifacts.PAIRS, notes) if labels else []
    ranked = read_rankings(folder / artifacts.RANKINGS, notes) if labels else RankedPairs()
    jury = read_verdicts(folder / artifacts.JURY, notes) if labels else {}
    path, known = folder / artifacts.LABELS, (ranked.probabilities, jury)
    name = label((recipe.get("run") or {}).get("name") if isinstance(recipe.get("run"), dict) else None)
    return Run(
        name=name or label(folder.resolve().name) or "run",
        recipe=recipe,
        recipe_text=recipe_text,
        results=results,
        series=_read_series(folder / artifacts.METRICS, notes),
        labels=read_labels(path, results, pairs, notes, *known) if labels else Labels(),
        rankings=ranked,
        sampled=read_sampled(recipe, pairs),
        samples=_read_samples(folder / artifacts.SAMPLES, notes),
        scored=_read_scored(folder / artifacts.REWARD_SCORES, notes),
        rehearsed=_read_rehearsed(folder / artifacts.REHEARSAL, notes),
        map=_read_map(folder / artifacts.SELECTION_MAP, notes),
        people=_read_people(folder, notes),
        pairs=len(pairs),
        notes=notes,
    )


def _read_recipe(folder: Path) -> tuple[dict[str, Any], str]:
    import yaml

    path = folder / artifacts.RECIPE
    if not path.is_file():
        raise UserError(
            "This is not a run's folder: it has no recipe.yaml.",
            where=str(folder),
            fix="Name the folder that `trl-rlaif run` wrote.",
        )
    text = clean(unsigned(path.read_text(encoding="utf-8", errors="replace")))
    try:
        recipe = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError("recipe.yaml is not valid YAML.", where=where, fix=_RESTORE) from error
    if not isinstance(recipe, dict):
        raise UserError("recipe.yaml holds no sections.", where=str(path), fix=_RESTORE)
    artifacts.check_format(recipe, str(folder))
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
        notes.append("results.json could not be read, so this page lacks the final results.")
        return {}
    return results


def _read_series(path: Path, notes: list[str]) -> dict[str, Series]:
    # A resumed run logs some steps twice: it continued from the later line.
    points: dict[str, dict[str, dict[float, float]]] = {}
    not_finite: dict[str, int] = {}
    for row in lines(path, notes):
        step = number(row.get("step"))
        if step is None or abs(step) > LARGEST_DRAWN:
            continue
        stage = points.setdefault(label(row.get("stage")), {})
        for key, raw in row.items():
            if key in ("stage", "step") or isinstance(raw, bool) or not isinstance(raw, (int, float)):
                continue
            key, value = label(key, _METRIC_NAME), number(raw)
            if value is None or abs(value) > LARGEST_DRAWN:
                not_finite[key] = not_finite.get(key, 0) + 1
            else:
                stage.setdefault(key, {})[step] = value
    for key, times in list(not_finite.items())[:20]:
        notes.append(
            f"The metric {key} was NaN, infinite or beyond 1e30 {times:,} time{'s' if times > 1 else ''}; "
            "these points are not shown."
        )
    return {
        stage: {key: sorted(values.items()) for key, values in metrics.items()} for stage, metrics in points.items()
    }


def _read_samples(path: Path, notes: list[str]) -> list[Sample]:
    return [
        Sample(
            set=label(row.get("set")) or "held-out",
            category=label(row.get("category")),
            prompt=turns(row.get("prompt")),
            start=turn("", row.get("start")),
            trained=turn("", row.get("trained")),
            reward_start=drawable(row.get("reward_start")),
            reward_trained=drawable(row.get("reward_trained")),
            p_trained=probability(row.get("p_trained")),
            others=_others(row.get("p_trained_by")),
        )
        for row in lines(path, notes)
    ]


def _others(by_judge: Any) -> list[tuple[str, float]]:
    found = [(label(name), probability(p)) for name, p in section({"judges": by_judge}, "judges").items()]
    return [(name, p) for name, p in found if p is not None][:_MAX_JUDGES]


def _read_scored(path: Path, notes: list[str]) -> list[ScoredPair]:
    scored = []
    for row in lines(path, notes):
        before, after = both(row, "chosen", "rejected"), both(row, "chosen_after", "rejected_after")
        if before is not None:
            human = row.get("human") if isinstance(row.get("human"), bool) else None
            scored.append(ScoredPair(label(row.get("category")), probability(row.get("p")), human, before, after))
    return scored


def _read_rehearsed(path: Path, notes: list[str]) -> list[Rehearsed]:
    found = []
    for row in lines(path, notes):
        cluster = number(row.get("cluster"))
        group = f"cluster {cluster + 1:.0f}" if cluster is not None else label(row.get("why")) or "no cluster"
        texts = (_one_line(row.get(key)) for key in ("prompt", "response"))
        found.append(Rehearsed(group, drawable(row.get("score")), *texts))
    return found


def _one_line(content: Any) -> str:
    """A text, or the last message of a conversation, cut to one line."""
    last = turns(content[-1:] if isinstance(content, list) else content)
    return label(last[0].text if last else "", _EXAMPLE)


def _read_map(path: Path, notes: list[str]) -> list[MapPoint]:
    found = []
    for row in lines(path, notes):
        place, cluster = both(row, "x", "y"), number(row.get("cluster"))
        if place is not None and cluster is not None:
            found.append(MapPoint(*place, int(cluster), row.get("chosen") is True))
    return found


def _read_people(folder: Path, notes: list[str]) -> dict[str, Any]:
    """Results of people's votes by set, from ``people_results``; empty if nobody has voted."""
    if not (folder / artifacts.VOTES).is_file():
        return {}
    from trl_rlaif.rating import people_results

    try:
        found = people_results(folder)
    except (UserError, RunError) as error:
        notes.append(f"The human votes could not be counted: {label(error.problems[0].what, 300)}")
        return {}
    except OSError as error:
        notes.append(f"The human votes could not be counted: {label(error.strerror, 300)}.")
        return {}
    if found["outdated"]:
        votes = count(found["outdated"], "human vote does", "human votes do")
        notes.append(f"{votes} not count: the responses have changed since then.")
    return found["sets"]
