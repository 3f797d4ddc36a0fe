"""The page of a comparison: every variant against every other, and what each one took."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_rlaif.pipeline import artifacts
from trl_rlaif.recipe.variants import START
from trl_rlaif.report import plots
from trl_rlaif.report.figures import Figure, win_rates
from trl_rlaif.report.formatting import count, label, number, section
from trl_rlaif.report.parsing import Turn, lines, spread, turn, turns
from trl_rlaif.report.run_data import Run
from trl_rlaif.report.summary import Measure, page_head, win_rate_measure

MAX_PROMPTS = 60
MAX_VARIANTS = 24
INITIAL = "initial policy"


@dataclass(frozen=True)
class Cell:
    """A policy's win rate over another; None on the diagonal, and if nothing was judged."""

    rate: Measure | None
    over: str


@dataclass(frozen=True)
class ArmRow:
    """One policy on one set, with metrics from its own run; None if unknown."""

    name: str
    overall: Measure | None
    controlled: Measure | None
    cells: list[Cell]
    tokens: float | None
    ended: float | None
    kl: float | None
    accuracy: float | None
    agreement: float | None
    seconds: float | None
    report: str


@dataclass(frozen=True)
class Asked:
    """A held-out prompt with every policy's answer."""

    set: str
    category: str
    prompt: list[Turn]
    answers: list[tuple[str, Turn]]


def comparison_page(run: Run, folder: Path) -> dict[str, Any]:
    """All values of the template."""
    compare = section(run.results, "compare")
    sets = [_set(compare, name, values) for name, values in list(section(compare, "sets").items())[:12]]
    asked = _asked(folder, list(section(compare, "variants"))[:MAX_VARIANTS], run.notes)
    return {
        **page_head(run),
        "summary": _summary(compare, sets),
        "sets": sets,
        "notes": run.notes,
        **responses_part(asked),
    }


def policy_name(key: Any) -> str:
    """The name shown for a variant or for the initial policy."""
    return INITIAL if key == START else label(key)


def responses_part(asked: list[Asked]) -> dict[str, Any]:
    """Values of the section with the responses of all policies."""
    shown = spread(asked, MAX_PROMPTS)
    return {
        "asked": shown,
        "all_asked": len(asked),
        "asked_sets": sorted({one.set for one in shown}),
        "asked_categories": sorted({one.category for one in shown}),
    }


def _set(compare: dict[str, Any], name: Any, values: Any) -> dict[str, Any]:
    values = section(values)
    pairs, contestants = section(values, "pairs"), section(values, "contestants")
    names = list(section(values, "overall"))[: MAX_VARIANTS + 1]
    rows = [_row(compare, values, key, names, section(pairs, key), section(contestants, key)) for key in names]
    ranked = sorted(rows, key=lambda row: -(row.overall.value if row.overall else -math.inf))
    return {
        "name": label(name) or "held-out",
        "prompts": number(values.get("prompts")),
        "columns": [policy_name(key) for key in names],
        "rows": rows,
        "ranked": ranked,
        "figures": _drawn(label(name), ranked),
        "controlled": any(row.controlled for row in rows),
    }


def _row(
    compare: dict[str, Any],
    values: dict[str, Any],
    key: str,
    names: list[str],
    pairs: dict[str, Any],
    contestant: dict[str, Any],
) -> ArmRow:
    own = section(compare, "variants", key)
    agreement = section(own, "label_agreement") or section(own, "reward_agreement")
    return ArmRow(
        name=policy_name(key),
        overall=win_rate_measure(section(values, "overall", key)),
        controlled=win_rate_measure(contestant.get("length_controlled")),
        cells=[
            Cell(win_rate_measure(pairs.get(other)) if other != key else None, policy_name(other)) for other in names
        ],
        tokens=number(section(contestant, "tokens").get("mean")),
        ended=number(contestant.get("ended")),
        kl=number(own.get("kl")),
        accuracy=number(own.get("reward_accuracy")),
        agreement=number(agreement.get("rate")),
        seconds=number(own.get("seconds")),
        # A variant's name is a folder name: nothing else gets into the link.
        report=f"{artifacts.VARIANTS}/{key}/{artifacts.REPORT}" if own else "",
    )


def _drawn(name: str, ranked: list[ArmRow]) -> list[Figure]:
    judged = [row for row in ranked if row.overall]
    figures = []
    if judged:
        caption = "Best first; bars are 95% intervals."
        if any(row.controlled for row in ranked):
            caption += " The win rate at equal length is over the initial policy only."
        named, heading = [(row.name, row.overall, row.controlled) for row in judged], "Win rate over all others"
        figures.append(win_rates(named, heading, f"{heading} on {name}", caption, "win rate"))
    moved = [(row.name, row.kl, row.overall.value) for row in judged if row.kl is not None]
    if len(moved) > 1:
        title = f"Win rate over all others versus KL to the reference on {name}"
        drawing = plots.named_points(moved, title, ("KL to the reference, in nats", "win rate"))
        caption = "Improvement versus the policy's distance from the reference."
        figures.append(Figure("Win rate versus KL", drawing, caption))
    return figures


def _summary(compare: dict[str, Any], sets: list[dict[str, Any]]) -> list[str]:
    variants = len(section(compare, "variants"))
    judge = label(compare.get("judge"), 120)
    sentences = []
    for one in sets:
        best = next((row for row in one["ranked"] if row.overall), None)
        if best is None:
            sentences.append(f"No pairs were judged on {one['name']}.")
            continue
        start = next((row for row in one["rows"] if row.name == INITIAL), None)
        sentence = f"On {one['name']}, {best.name} has the highest win rate: {best.overall.text}"
        sentence += f" (interval {best.overall.interval_text})" if best.overall.interval_text else ""
        if start is not None and start.overall and start is not best:
            sentence += f"; the initial policy has {start.overall.text}"
        sure = [cell.over for cell in best.cells if cell.rate and cell.rate.interval and cell.rate.interval[0] > 0.5]
        beaten = f"clearly better than {', '.join(sure)}" if sure else "not clearly better than any of them"
        sentences.append(f"{sentence}. By the intervals, it is {beaten}.")
    prompts = ", ".join(count(one["prompts"], "prompt") for one in sets)
    sentences.append(
        f"{count(variants, 'variant')} and the initial policy were compared pairwise, in both orders, on {prompts} by "
        f"{judge or 'the judge'}."
    )
    return sentences


def _asked(folder: Path, variants: list[Any], notes: list[str]) -> list[Asked]:
    """Every prompt with all answers, from the variants' own samples."""
    found: dict[tuple[str, str], Asked] = {}
    for variant in variants:
        if not isinstance(variant, str) or Path(variant).name != variant:
            continue
        for row in lines(folder / artifacts.VARIANTS / variant / artifacts.SAMPLES, notes):
            key = (label(row.get("set")) or "held-out", label(row.get("id")))
            if key not in found:
                found[key] = Asked(key[0], label(row.get("category")), turns(row.get("prompt")), [])
                found[key].answers.append((INITIAL, turn("", row.get("start"))))
            found[key].answers.append((policy_name(variant), turn("", row.get("trained"))))
    return list(found.values())
