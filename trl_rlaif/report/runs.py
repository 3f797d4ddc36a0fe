"""The page that compares several finished runs: their differences, main results, and overlaid curves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trl_rlaif.report.experiments import INITIAL, Asked, responses_part
from trl_rlaif.report.figures import Figure, overlaid, win_rates
from trl_rlaif.report.run_data import Sample
from trl_rlaif.report.summary import PREVIEW_CHARACTERS, Measure, SetResult, set_results

if TYPE_CHECKING:
    from trl_rlaif.experiments.runs import Comparison


@dataclass(frozen=True)
class RunRow:
    """A run on one set; ``difference`` from the first run is None for that run, and if they share no prompt."""

    name: str
    result: SetResult
    difference: Measure | None


def runs_page(comparison: Comparison) -> dict[str, Any]:
    """All values of the template."""
    first, *others = comparison.names
    summary = [
        f"On {of}, the win rate of {name} minus that of {first} is {change.text} (interval {change.interval_text}): "
        f"{change.verdict}."
        for name, differences in zip(others, comparison.differences, strict=True)
        for of, change in differences.items()
    ]
    return {
        "title": ", ".join([first, *others[:-1]]) + f" and {others[-1]}",
        "preview": PREVIEW_CHARACTERS,
        "comparison": comparison,
        "summary": summary,
        "sets": _sets(comparison),
        "rl": overlaid(comparison.names, comparison.runs),
        **responses_part(_asked(comparison)),
    }


def _sets(comparison: Comparison) -> list[dict[str, Any]]:
    found: dict[str, list[RunRow]] = {}
    changes = [{}, *comparison.differences]
    for name, run, of in zip(comparison.names, comparison.runs, changes, strict=True):
        for result in set_results(run):
            found.setdefault(result.name, []).append(RunRow(name, result, of.get(result.name)))
    return [{"name": name, "rows": rows, "figures": _drawn(name, rows)} for name, rows in found.items()]


def _drawn(name: str, rows: list[RunRow]) -> list[Figure]:
    judged = [(row.name, row.result.win_rate, None) for row in rows if row.result.win_rate]
    heading, caption = "Win rate over the run's own initial policy", "Bars are 95% intervals."
    return [win_rates(judged, heading, f"{heading} on {name}", caption, "win rate")] if judged else []


def _asked(comparison: Comparison) -> list[Asked]:
    """The prompts evaluated by all runs, with the answers of the first run's initial policy and of all trained ones."""
    answers = [{_key(sample): sample for sample in run.samples} for run in comparison.runs]
    start = f"{INITIAL} of {comparison.names[0]}"
    return [
        Asked(
            one.set,
            one.category,
            one.prompt,
            [
                (start, one.start),
                *((name, of[key].trained) for name, of in zip(comparison.names, answers, strict=True)),
            ],
        )
        for key, one in answers[0].items()
        if all(key in of for of in answers)
    ]


def _key(sample: Sample) -> tuple[str, str]:
    return sample.set, "\0".join(turn.text for turn in sample.prompt)
