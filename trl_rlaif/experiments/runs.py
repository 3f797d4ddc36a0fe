"""Compares finished runs: differences between their recipes, and which improved more, from their evaluations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from trl_rlaif.data.overlap import prompt_key
from trl_rlaif.errors import UserError
from trl_rlaif.evaluation import bootstrap_mean, points
from trl_rlaif.files import read_state
from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.inputs import flat
from trl_rlaif.rating.pairs import read_comparisons
from trl_rlaif.recipe.sections import STAGES
from trl_rlaif.report.formatting import MINUS, count, label, section
from trl_rlaif.report.run_data import Run, read_run
from trl_rlaif.report.summary import SIGNIFICANT, Measure, judge_name, set_results, sign_test

# Keys that do not affect a run's results, or are shown elsewhere.
_NOT_SETTINGS = ("versions", "command", "machine", "format", "run.name", "report")
_MOST_SETTINGS = 20

# By set and prompt, mean points of the trained responses against the initial policy's: 1, 0, or 0.5 for a tie.
Points = dict[tuple[str, str], float]


@dataclass(frozen=True)
class Comparison:
    """A comparison of finished runs.

    Args:
        names: Distinct names of the runs: their folders' names, or paths if names repeat.
        runs: The runs, in the given order.
        settings: Settings that differ, with each run's value, by key.
        differences: For each run but the first, by set: its win rate over its initial policy minus that of the first
            run, on the prompts of both.
        notes: Reasons why results are not comparable.
    """

    names: list[str]
    runs: list[Run]
    settings: dict[str, list[str]]
    differences: list[dict[str, Measure]]
    notes: list[str]


def compare_runs(folders: Sequence[Path]) -> Comparison:
    """Read runs, and compare each with the first on the prompts that both evaluated.

    Nothing is judged again: win rates over the initial policy tell which run improved more on it, not which of the
    two policies would win; a recipe with ``compare`` has them judged against each other.

    Raises:
        UserError: There is only one run, or one of them has no evaluation.
    """
    if len(folders) < 2:
        raise UserError("A comparison needs two runs.", fix="Name another folder.")
    runs, found = [read_run(folder, labels=False) for folder in folders], [_points(folder) for folder in folders]
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    differences = [_differences(found[0], other) for other in found[1:]]
    return Comparison(names, runs, _settings(folders, runs), differences, list(_notes(runs)))


def described(comparison: Comparison) -> list[str]:
    """The comparison as lines of text."""
    names = comparison.names
    settings = [f"  {key}: {' | '.join(values)}" for key, values in comparison.settings.items()]
    more = [f"  and {len(settings) - _MOST_SETTINGS} more"] if len(settings) > _MOST_SETTINGS else []
    lines = ["Settings that differ:", *(settings[:_MOST_SETTINGS] or ["  none"]), *more]
    for name, run in zip(names, comparison.runs, strict=True):
        lines += ["", f"{name}:"]
        for of in set_results(run):
            if of.win_rate:
                rate = f"{of.win_rate.text} ({of.win_rate.interval_text}), {of.win_rate.verdict}"
                lines.append(f"  {of.name}: {rate}; {of.win_rate.detail}" + (f"; {of.tokens}" if of.tokens else ""))
    for name, differences in zip(names[1:], comparison.differences, strict=True):
        lines += ["", f"{name} minus {names[0]}, on the prompts of both:"]
        for shared, change in differences.items():
            rate = f"{change.text} of win rate (95% interval {change.interval_text})"
            lines.append(f"  {shared}: {rate} on {change.detail}: {change.verdict}")
        lines += [] if differences else ["  there are none."]
    return lines + [f"Note: {note}" for note in comparison.notes]


def _points(folder: Path) -> Points:
    got: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for one in read_comparisons(folder):
        if one.p_trained is not None:
            got[one.set, prompt_key(one.messages)] += points([one.p_trained])
    return {key: fmean(values) for key, values in got.items()}


def _settings(folders: Sequence[Path], runs: Sequence[Run]) -> dict[str, list[str]]:
    values, files = [dict(flat(run.recipe)) for run in runs], [_digests(folder) for folder in folders]
    found = {}
    for key in dict.fromkeys(key for of in values for key in of):
        shown = [label(str(of.get(key, "not set")), 60) for of in values]
        # Files are compared by content, wherever they are.
        digests = [of[key] for of in files if key in of]
        if len(digests) == len(runs) and len(set(digests)) > 1 and len(set(shown)) == 1:
            shown = [f"{path} ({digest[:8]})" for path, digest in zip(shown, digests, strict=True)]
        if not key.startswith(_NOT_SETTINGS) and len(set(digests if len(digests) == len(runs) else shown)) > 1:
            found[key] = shown
    return found


def _digests(folder: Path) -> dict[str, str]:
    """Digests of the input files of the run's stages, by key."""
    markers = [read_state(folder / artifacts.STATE / artifacts.marker_of(stage), "") for stage in STAGES]
    files = [item for marker in markers for item in section(marker, "inputs", "files").items()]
    return {key: str(section(file).get("digest")) for key, file in files}


def _differences(first: Points, other: Points) -> dict[str, Measure]:
    shared = [key for key in first if key in other]
    return {
        name: _difference([other[key] - first[key] for key in shared if key[0] == name])
        for name in dict.fromkeys(of for of, _ in shared)
    }


def _difference(change: list[float]) -> Measure:
    low, high = bootstrap_mean(change)
    p = sign_test({"wins": sum(x > 0 for x in change), "losses": sum(x < 0 for x in change)}) or 0.0
    mean, clear = fmean(change), p < SIGNIFICANT and not low <= 0 <= high
    shown = [f"{100 * value:+.1f}".replace("-", MINUS) for value in (mean, low, high)]
    verdict, tone = (
        ("a clear difference", "good" if mean > 0 else "bad") if clear else ("no clear difference", "unclear")
    )
    detail = f"{count(len(change), 'prompt')}, sign test p = {p:.2g}"
    return Measure(mean, (low, high), f"{shown[0]} points", f"{shown[1]} to {shown[2]}", verdict, tone, detail)


def _notes(runs: Sequence[Run]) -> Iterator[str]:
    if len({_judge(run) for run in runs}) > 1:
        yield "the runs were measured by different judges, whose win rates cannot be compared."
    if len({str(section(run.recipe, "model").get("path")) for run in runs}) > 1:
        yield "the runs started from different models: each win rate is over its own initial policy."


def _judge(run: Run) -> tuple[str, str]:
    """The evaluation's judge, and its sources if it was taught by the run itself."""
    taught = section(run.recipe, "evaluate").get("judge") == "taught"
    return judge_name(run, "evaluate"), str(section(run.results, "judge", "sources")) if taught else ""
