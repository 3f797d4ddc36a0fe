"""Guards components: every return value is validated, and exceptions name the component."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from trl_rlaif.components import Component, DataSelector, Labeler, PairSampler, RewardTransform
from trl_rlaif.validation.blame import ORIGIN, Origin, origin_of
from trl_rlaif.validation.labels import label_call
from trl_rlaif.validation.pairs import sample_call
from trl_rlaif.validation.scores import loss_call, transform_call
from trl_rlaif.validation.selections import select_call

C = TypeVar("C", bound=Component)


def validated(component: C, origin: Origin | None = None) -> C:
    """The same component, with every return value validated from now on.

    Args:
        component: Of any kind. One that is already validated is unchanged.
        origin: Its origin in a recipe; None outside of recipes.
    """
    if ORIGIN in vars(component):
        return component
    for base, (kind, methods) in _METHODS.items():
        if isinstance(component, base):
            setattr(component, ORIGIN, origin or origin_of(component, kind))
            for name, call in methods.items():
                # On the instance, so that no caller can bypass the check.
                setattr(component, name, partial(call, getattr(component, ORIGIN), getattr(component, name)))
    return component


def _call(name: str, origin: Origin, method: Callable[..., Any], *arguments: Any) -> Any:
    """Call a method whose result is not validated; a failure names the component."""
    with origin.blamed(f"{name}()"):
        return method(*arguments)


# For each kind, the wrappers of its methods.
_METHODS: dict[type[Component], tuple[str, dict[str, Callable[..., Any]]]] = {
    Labeler: ("labeler", {"label": label_call} | {name: partial(_call, name) for name in ("columns", "check_row")}),
    RewardTransform: (
        "reward transform",
        {name: partial(transform_call, name) for name in ("transform", "transform_pool")}
        | {"loss": loss_call}
        | {name: partial(_call, name) for name in ("metrics", "state_dict", "load_state_dict")},
    ),
    DataSelector: ("data selector", {"select": select_call}),
    PairSampler: ("pair sampler", {"sample": sample_call}),
}
