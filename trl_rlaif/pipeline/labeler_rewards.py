"""A run's labeler rewards on held-out prompts, which the policy was not trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from trl_rlaif.algorithms import ALGORITHMS
from trl_rlaif.errors import UserError
from trl_rlaif.evaluation.judge_panel import columns_for
from trl_rlaif.pipeline.rl_setup import reward_function
from trl_rlaif.progress import progress_bar

if TYPE_CHECKING:
    from trl_rlaif.models.shared_model import SharedBase
    from trl_rlaif.pipeline.context import Context

SIDES = ("start", "trained")


def _measured(context: Context) -> list[str]:
    """The labelers among the rewards of ``rl`` that score single responses; none if RL samples no responses."""
    if not ALGORITHMS[context.recipe.rl.algorithm].samples:
        return []
    find = context.plugins.registry.find
    return [name for name in context.recipe.reward_labelers if not getattr(find("labeler", name).component, "ranks", 0)]


def score_responses(context: Context, shared: SharedBase, sets: Mapping[str, list[dict[str, Any]]]) -> None:
    """Have every labeler score the first responses to all prompts, as in ``rl``, and add its rewards to their rows.

    Args:
        shared: The base, for judges that are "same" or "taught".
        sets: Rows by set, with ``prompt``, ``start`` and ``trained``. If there are labelers, the rows get
            ``rewards_start`` and ``rewards_trained``: rewards by labeler name, None if a column or an answer is
            missing.
    """
    for name in _measured(context):
        labeler = reward_function(context, name, shared)
        for of, rows in sets.items():
            scored = list(_with_columns(context, labeler, rows))
            with progress_bar(f"Rewarding ({of}: {name})", len(rows) * len(SIDES), unit="responses") as advance:
                for side in SIDES:
                    for row in rows:
                        row.setdefault(f"rewards_{side}", {})[name] = None
                    found = _rewards(labeler, side, scored)
                    for (row, _), reward in zip(scored, found, strict=True):
                        row[f"rewards_{side}"][name] = reward
                    advance(len(rows))


def _with_columns(
    context: Context, labeler: Any, rows: list[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The rows with all columns that the labeler reads, each with its other columns."""
    prompt = labeler.judge.prompt
    extra = columns_for(context, labeler, prompt)
    for row in rows:
        columns = extra(row["prompt"])
        try:
            labeler.check_row(prompt, columns)
        except UserError:
            continue
        yield row, columns


def _rewards(labeler: Any, side: str, scored: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[float | None]:
    if not scored:
        return []
    rows, columns = zip(*scored, strict=True)
    names = labeler.columns(labeler.judge.prompt)
    return labeler(
        [row["prompt"] for row in rows],
        [row[side] for row in rows],
        **{name: [of.get(name) for of in columns] for name in names},
    )
