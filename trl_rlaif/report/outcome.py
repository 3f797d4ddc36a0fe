"""The last lines that a run prints: results, warnings, and the next step."""

from __future__ import annotations

import shlex

from trl_rlaif.report.formatting import section
from trl_rlaif.report.judge_figures import judged_sets
from trl_rlaif.report.no_learning import signs_of_no_learning
from trl_rlaif.report.run_data import Run
from trl_rlaif.report.summary import set_results, summary
from trl_rlaif.report.warnings import warnings

# The report has the rest.
_MOST_DOUBTS = 3


def outcome(run: Run, place: str) -> list[str]:
    """Lines to print; the report contains all of this and more.

    Args:
        run: Contents of the run's folder; pairs and labels are not needed.
        place: The folder, as written in a command.
    """
    sets = set_results(run)
    said = summary(run, sets)
    # Without an evaluation, the last sentence is about the latest stage.
    lines = said[: len(sets)] or said[-1:]
    if signs := signs_of_no_learning(run):
        lines.append("\n- ".join(["This run may have learned nothing:", *signs]))
    if doubts := warnings(run, sets, judged_sets(run)):
        more = f"\n- and {len(doubts) - _MOST_DOUBTS} more in the report" if len(doubts) > _MOST_DOUBTS else ""
        lines.append("\n- ".join(["Before you trust these results:", *doubts[:_MOST_DOUBTS]]) + more)
    return [*lines, *_next(run, shlex.quote(place))]


def _next(run: Run, place: str) -> list[str]:
    if section(run.results, "evaluate"):
        return [f"Next: compare the responses yourself (trl-rlaif rate {place}), and then use the policy "
                f"(trl-rlaif export {place} --what policy)."]  # fmt: skip
    if section(run.results, "rl"):
        return ["Next: evaluate the policy on prompts that it was not trained on (data.eval_prompts and evaluate)."]
    if section(run.results, "label"):
        return ["Next: read some labels with their pairs in the report before you train on them."]
    return []
