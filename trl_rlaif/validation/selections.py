"""The contract for a data selector's selection."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from trl_rlaif.types import RehearsalPair, Selection
from trl_rlaif.validation.blame import ContractViolation, Origin

if TYPE_CHECKING:
    from trl_rlaif.types import Pool


def check_selection(found: Any, size: int) -> Selection:
    """A selector's result for a pool of ``size`` rows, as a Selection.

    Raises:
        ContractViolation: It is neither a Selection nor indices; an index is out of range; no prompt is left; strata,
            clusters or embeddings do not match the rows; or rehearsal is invalid.
    """
    if not isinstance(found, Selection):
        if isinstance(found, str | bytes) or not isinstance(found, Iterable):
            raise ContractViolation(f"returns a {type(found).__name__}", "Return a Selection, or indices of the pool.")
        found = Selection(prompts=list(found))
    _check_prompts(found, size)
    _check_rehearsal(found.rehearsal)
    _check_clusters(found, size)
    return found


def _check_prompts(found: Selection, size: int) -> None:
    if found.prompts is None:
        if found.strata is not None:
            raise ContractViolation("returns strata without prompts", "Give each of prompts its label.")
        return
    for index in found.prompts:
        if str(getattr(index, "dtype", type(index).__name__)) in ("bool", "torch.bool"):
            raise ContractViolation("returns a mask", "Return indices, such as numpy.flatnonzero(mask).")
        try:
            whole = operator.index(index)
        except TypeError:
            raise ContractViolation(f"returns {index!r}, which is no index", "Return whole numbers.") from None
        if not 0 <= whole < size:
            raise ContractViolation(
                f"chose the index {whole} of a pool of {size}",
                "Return places in the pool, counted from 0, not rows of the dataset.",
            )
    if not len(found.prompts):
        raise ContractViolation(
            f"chose 0 rows of {size} and leaves no prompt to train on",
            "Choose at least one, raise a UserError that says what to change, or return Selection(prompts=None).",
        )
    if found.strata is None:
        return
    if len(found.strata) != len(found.prompts) or not all(isinstance(label, Hashable) for label in found.strata):
        raise ContractViolation("returns strata that do not belong to its prompts", "Give each of prompts one label.")


def _check_rehearsal(pairs: Sequence[Any]) -> None:
    for pair in pairs:
        if not isinstance(pair, RehearsalPair):
            raise ContractViolation(
                f"rehearses a {type(pair).__name__}", "Make pairs with pool.pair(index, why='...')."
            )
        if not pair.prompt_ids or not pair.response_ids:
            raise ContractViolation("rehearses an empty prompt or response", "Leave out rows without response_ids.")
        if pair.score is not None and not math.isfinite(pair.score):
            raise ContractViolation(f"rehearses a pair whose score is {pair.score}", "Leave it out.")


def _check_clusters(found: Selection, size: int) -> None:
    import numpy as np

    if found.clusters is not None and len(found.clusters) != size:
        raise ContractViolation(
            f"returns {len(found.clusters)} clusters for {size} rows", "Give every row its cluster."
        )
    if found.embeddings is not None:
        shape = np.shape(found.embeddings)
        if len(shape) != 2 or shape[0] != size or not np.isfinite(found.embeddings).all():
            raise ContractViolation(f"returns embeddings of the shape {shape}", f"Give a finite ({size}, H) array.")


def check_num_responses(count: Any) -> int:
    """The number of responses per prompt that a selector asks for.

    Raises:
        ContractViolation: It is not a positive integer.
    """
    if type(count) is not int or count < 1:
        raise ContractViolation(f"says that num_responses is {count!r}", "Make it a whole number, 1 or more.")
    return count


def select_call(origin: Origin, select: Callable[..., Any], pool: Pool) -> Selection:
    """``DataSelector.select`` of a component, validated."""
    with origin.blamed("select()"):
        return check_selection(select(pool), len(pool))
