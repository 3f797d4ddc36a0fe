"""Runs that are done side by side: what their recipes differ in, and which improved more, from what they measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from trl_rlaif.data.overlap import prompt_key
from trl_rlaif.errors import UserError
from trl_rlaif.evaluation import bootstrap_mean, points
from trl_rlaif.pipeline.inputs import flat
from trl_rlaif.rating.pairs import read_comparisons
from trl_rlaif.report.formatting import count, label, section
from trl_rlaif.report.run_data import Run, read_run
from trl_rlaif.report.summary import SIGNIFICANT, judge_name, set_results, sign_test

# What says nothing of how a run was made, or is told otherwise.
_NOT_SETTINGS = ("versions", "command", "machine", "format", "run.name", "report")
_MOST_SETTINGS = 20

# By set and prompt, the mean of what the trained responses got against the start's: 1, 0, or 0.5 for a tie.
Points = dict[tuple[str, str], float]


def compare_runs(folders: Sequence[Path]) -> list[str]:
    """Lines to read: differing settings, each run's win rates against its own start, and the difference on shared
    prompts of each run from the first.

    Nothing is judged anew: two win rates against a start tell which run moved further from it, not which of the two
    policies wins; a recipe with ``compare`` has them judged against each other.

    Raises:
        UserError: There is only one run, or one of them has no evaluation.
    """
    if len(folders) < 2:
        raise UserError("A comparison needs two runs.", fix="Name another folder.")
    runs, found = [read_run(folder, labels=False) for folder in folders], [_points(folder) for folder in folders]
    names = [str(folder) for folder in folders]
    lines = ["Settings that differ:", *(_settings(names, runs) or ["  none"])]
    for name, run in zip(names, runs, strict=True):
        lines += ["", f"{name}:"]
        for of in set_results(run):
            if of.win_rate:
                rate = f"{of.win_rate.text} ({of.win_rate.interval_text}), {of.win_rate.verdict}"
                lines.append(f"  {of.name}: {rate}; {of.win_rate.detail}" + (f"; {of.tokens}" if of.tokens else ""))
    for name, other in zip(names[1:], found[1:], strict=True):
        lines += ["", f"{name} less {names[0]}, on the prompts of both:", *_differences(found[0], other)]
    return lines + [f"Note: {note}" for note in _notes(runs)]


def _points(folder: Path) -> Points:
    got: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for one in read_comparisons(folder):
        if one.p_trained is not None:
            got[one.set, prompt_key(one.messages)] += points([one.p_trained])
    return {key: fmean(values) for key, values in got.items()}


def _settings(names: Sequence[str], runs: Sequence[Run]) -> list[str]:
    values = [dict(flat(run.recipe)) for run in runs]
    keys = [key for key in dict.fromkeys(key for of in values for key in of) if not key.startswith(_NOT_SETTINGS)]
    told = {key: [label(str(of.get(key, "not set")), 60) for of in values] for key in keys}
    lines = [f"  {key}: {' | '.join(of)}" for key, of in told.items() if len(set(of)) > 1]
    more = [f"  and {len(lines) - _MOST_SETTINGS} more"] if len(lines) > _MOST_SETTINGS else []
    return lines[:_MOST_SETTINGS] + more


def _differences(first: Points, other: Points) -> Iterator[str]:
    shared = [key for key in first if key in other]
    for name in dict.fromkeys(of for of, _ in shared):
        change = [other[key] - first[key] for key in shared if key[0] == name]
        low, high = bootstrap_mean(change)
        p = sign_test({"wins": sum(x > 0 for x in change), "losses": sum(x < 0 for x in change)}) or 0.0
        clear = p < SIGNIFICANT and not low <= 0 <= high
        said = f"{100 * fmean(change):+.1f} points of win rate (95% interval {100 * low:+.1f} to {100 * high:+.1f})"
        yield (
            f"  {name}: {said} on {count(len(change), 'prompt')}, sign test p = {p:.2g}: "
            f"{'a clear difference' if clear else 'no clear difference'}"
        )
    if not shared:
        yield "  there are none."


def _notes(runs: Sequence[Run]) -> Iterator[str]:
    if len({judge_name(run, "evaluate") for run in runs}) > 1:
        yield "the runs were measured by different judges, whose win rates cannot be compared."
    if len({str(section(run.recipe, "model").get("path")) for run in runs}) > 1:
        yield "the runs began with different models: each win rate is against its own."
