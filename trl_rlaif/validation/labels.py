"""The contract for labels."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from trl_rlaif.types import Label, Pair
from trl_rlaif.validation.blame import ContractViolation, Origin

if TYPE_CHECKING:
    from trl_rlaif.judging.judge import Judge

_RANGES = {
    "p": (0, 1), "p_12": (0, 1), "p_21": (0, 1), "mass_12": (0, 1), "mass_21": (0, 1),
    "score_1": (-1, 1), "score_2": (-1, 1), "spread_1": (0, math.inf), "spread_2": (0, math.inf),
}  # fmt: skip
# Tolerance for the sum of probabilities computed in float32.
_ROUNDING = 1e-5


def checked_labels(found: Iterable[Any], pairs: Sequence[Pair], done: Collection[str]) -> Iterator[Label]:
    """Labels as they come, each validated; at the end, checks that every pair that is not done has one.

    Raises:
        ContractViolation: One is not a Label, is for an unknown, done or already labeled pair, or has invalid values;
            or a pair has none.
    """
    known = {pair.id for pair in pairs}
    done, seen = set(done), set()
    for label in found:
        if not isinstance(label, Label):
            raise ContractViolation(f"yields a {type(label).__name__}", "Yield trl_rlaif.Label(pair.id, p=...).")
        if not isinstance(label.id, Hashable) or label.id not in known:
            raise ContractViolation(f"yields the id {label.id!r}, which no pair has", "Pass the pair's id on as it is.")
        if label.id in done:
            raise ContractViolation(f"labels {label.id!r} again, although it is done", "Leave out the ids in done.")
        if label.id in seen:
            raise ContractViolation(f"yields two labels of {label.id!r}", "Yield exactly one a pair.")
        seen.add(label.id)
        _check_label(label)
        yield label
    missing = [pair.id for pair in pairs if pair.id not in seen and pair.id not in done]
    if missing:
        raise ContractViolation(
            f"gives no label of {missing[0]!r}" + (f" and {len(missing) - 1} more" if missing[1:] else ""),
            "Yield one a pair; of what cannot be judged, Label(pair.id, skipped='why').",
        )


def _check_label(label: Label) -> None:
    for name, (low, high) in _RANGES.items():
        value = getattr(label, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            what = f"yields a {type(value).__name__} as {name} of {label.id!r}"
            raise ContractViolation(what, "Make it a plain number, with float(...).")
        if not low <= value <= high:
            raise ContractViolation(
                f"yields {name} = {value} of {label.id!r}, outside [{low}, {high}]", "Normalize or clamp it."
            )
    for name in ("ratings_1", "ratings_2"):
        ratings = getattr(label, name)
        if ratings is not None and not (min(ratings) >= 0 and math.isclose(math.fsum(ratings), 1, abs_tol=_ROUNDING)):
            raise ContractViolation(f"yields {name} of {label.id!r} that do not add up to 1", "Normalize them.")
    if (label.p is None) != bool(label.skipped):
        both = "neither p nor" if label.p is None else "both p and"
        raise ContractViolation(
            f"yields a label of {label.id!r} with {both} a reason in skipped",
            "Give it p; or skipped, where the pair cannot be judged.",
        )
    try:
        json.dumps(asdict(label), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ContractViolation(
            f"yields a label of {label.id!r} that cannot be written as JSON: {error}",
            "Fill its fields with finite numbers and texts alone.",
        ) from None


def label_call(
    origin: Origin, label: Callable[..., Any], pairs: Sequence[Pair], judge: Judge, done: Collection[str] = ()
) -> Iterator[Label]:
    """``Labeler.label`` of a component, its labels validated as they come."""
    with origin.blamed("label()"):
        found = label(pairs, judge, done)
        try:
            yield from checked_labels(found, pairs, done)
        finally:
            if hasattr(found, "close"):  # at once: it may have more requests to a server in progress
                found.close()
