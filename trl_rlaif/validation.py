"""What a run relies on in what components return: the rules of each kind, and a guard that says who broke one."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, TypeVar

from trl_rlaif.components import Component, DataSelector, Labeler, PairSampler, RewardTransform
from trl_rlaif.errors import RunError, TrlRlaifError, UserError
from trl_rlaif.interrupts import is_fault
from trl_rlaif.types import Label, Pair, RehearsalPair, SampledPair, Selection

if TYPE_CHECKING:
    import torch

    from trl_rlaif.components import Generate
    from trl_rlaif.data import Prompt
    from trl_rlaif.judging.judge import Judge
    from trl_rlaif.plugins import Registered
    from trl_rlaif.types import Pool, PreferenceScores, ScoredBatch

C = TypeVar("C", bound=Component)

_RANGES = {
    "p": (0, 1), "p_12": (0, 1), "p_21": (0, 1), "mass_12": (0, 1), "mass_21": (0, 1),
    "score_1": (-1, 1), "score_2": (-1, 1), "spread_1": (0, math.inf), "spread_2": (0, math.inf),
}  # fmt: skip
# Where a component, or a reward function, keeps who it is.
_ORIGIN = "_trl_rlaif_origin"
_RESUME = "What was done is kept: once this is mended, --resume goes on."
_DROP = "Yield SampledPair(prompt.id, dropped='why') instead."
# Of pairs.jsonl, all that a sampler's extra columns must not be called.
_PAIR_COLUMNS = {field.name for field in fields(Pair)}


class ContractViolation(Exception):
    """A rule that a component broke.

    Args:
        what: What it does, to follow its name: ``returns a list``.
        fix: What its author should write instead.
    """

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


class ComponentError(RunError):
    """A component that a recipe names broke a rule or raised; the recipe is right, so the exit code is 1."""


class RewardError(ComponentError, UserError):
    """The same of a reward. Also a UserError: on one of those in a reward, the trainers save what was learned."""

    exit_code = RunError.exit_code


# ---- Whose fault it is ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """Who a component or a reward function is.

    Args:
        who: In words, with its distribution: ``labeler 'words' of my-words 0.1.0``.
        where: The place in the recipe.
        picked: By a recipe; what it raises then ends the run in words. Without one it belongs to the caller's own
            code: it raises what it raises, and a broken rule is a UserError.
    """

    who: str
    where: str = ""
    picked: bool = True

    @classmethod
    def of(cls, found: Registered, where: str) -> Origin:
        """Of a component as it is registered."""
        kind = found.kind.replace("_", " ")
        return cls(f"{kind} '{found.name}' of {found.distribution} {found.version}".rstrip(), where)

    def error(self, what: str, fix: str, kind: type[ComponentError] = ComponentError) -> TrlRlaifError:
        """The error that ends the run."""
        if not self.picked:
            return UserError(f"The {self.who} {what}.", fix=fix)
        return kind(f"The {self.who} {what}.", where=self.where, fix=f"{fix} {_RESUME}")

    @contextmanager
    def blamed(self, method: str, kind: type[ComponentError] = ComponentError) -> Iterator[None]:
        """Turn what is raised within into an error with this name on it.

        Raises:
            ComponentError: With the component's own exception as cause. One that speaks to users already keeps its
                type and words, and is given the place in the recipe.
        """
        try:
            yield
        except ContractViolation as violation:
            raise self.error(violation.what, violation.fix, kind) from None
        except TrlRlaifError as error:
            if self.where and not any(problem.where for problem in error.problems):
                error.problems = tuple(replace(problem, where=self.where) for problem in error.problems)
                error.args = (str(error),)
            raise
        except BaseException as error:
            # A generator that is closed early, and so its labels, is nobody's fault.
            if not self.picked or isinstance(error, GeneratorExit) or not is_fault(error):
                raise
            what = f"failed in {method}: {type(error).__name__}: {error}".rstrip(".: ")
            raise self.error(what, "Add --debug behind trl-rlaif for the traceback.", kind) from error


def origin_of(subject: Any, kind: str) -> Origin:
    """Who a component or function is; one that no recipe picked is called by its class or name."""
    name = getattr(subject, "__name__", None)
    who = f"{kind} '{name}'" if isinstance(name, str) else f"{kind} {type(subject).__name__}"
    return getattr(subject, _ORIGIN, None) or Origin(who, picked=False)


def tagged(function: Any, origin: Origin) -> Any:
    """A reward function that knows which recipe picked it; the user's own stays as it is."""

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return function(*arguments, **named)

    call.__name__ = getattr(function, "__name__", type(function).__name__)
    setattr(call, _ORIGIN, origin)
    return call


def validated(component: C, origin: Origin | None = None) -> C:
    """The same component, whose every return value is checked from here on.

    Args:
        component: Of any kind. One that is validated already stays as it is.
        origin: Which recipe picked it; None outside of recipes.
    """
    if _ORIGIN in vars(component):
        return component
    for base, (kind, methods) in _METHODS.items():
        if isinstance(component, base):
            setattr(component, _ORIGIN, origin or origin_of(component, kind))
            for name, call in methods.items():
                # On the instance: no place that calls it can forget the check.
                setattr(component, name, partial(call, getattr(component, _ORIGIN), getattr(component, name)))
    return component


# ---- Labels -----------------------------------------------------------------------------------------------


def checked_labels(found: Iterable[Any], pairs: Sequence[Pair], done: Collection[str]) -> Iterator[Label]:
    """Labels as they come, each checked; in the end, that there is one of every pair that is not done.

    Raises:
        ContractViolation: One is no Label, of another pair, of one that is done or labeled, or has values that cannot
            be; or a pair has none.
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


def _label(
    origin: Origin, label: Callable[..., Any], pairs: Sequence[Pair], judge: Judge, done: Collection[str] = ()
) -> Iterator[Label]:
    with origin.blamed("label()"):
        found = label(pairs, judge, done)
        try:
            yield from checked_labels(found, pairs, done)
        finally:
            if hasattr(found, "close"):  # at once: it may have asked a server about more
                found.close()


# ---- Scores -----------------------------------------------------------------------------------------------


def check_scores(found: Any, given: torch.Tensor) -> None:
    """That a transform made finite float32 scores of the given ones' shape.

    Raises:
        ContractViolation: It did not.
    """
    import torch

    if not isinstance(found, torch.Tensor):
        raise ContractViolation(f"returns a {type(found).__name__}", "Return a tensor: one score a response.")
    if found.shape != given.shape:
        raise ContractViolation(
            f"returns the shape {tuple(found.shape)} for {tuple(given.shape)}", "Return one score a response."
        )
    if found.dtype != torch.float32:
        raise ContractViolation(f"returns {found.dtype}", "Return float32 scores, with .float().")
    if found.device != given.device:
        raise ContractViolation(
            f"returns scores on {found.device} for {given.device}", "Return them with .to(scores.device)."
        )
    if not found.isfinite().all():
        raise ContractViolation(
            "returns scores that are not finite", "Guard divisions and logarithms: a spread may be 0."
        )


def check_loss(loss: Any) -> None:
    """That a transform's loss is a finite scalar.

    Raises:
        ContractViolation: It is not.
    """
    import torch

    if _is_finite_scalar(loss):
        return
    shown = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) and loss.dim() else repr(loss)
    raise ContractViolation(
        f"gives {shown} as its loss", "Return a finite scalar tensor, the mean over the comparisons, or None."
    )


def _is_finite_scalar(loss: Any) -> bool:
    import torch

    return isinstance(loss, torch.Tensor) and not loss.dim() and bool(loss.isfinite())


def _transform(
    method: str, origin: Origin, transform: Callable[..., Any], scores: torch.Tensor, batch: ScoredBatch
) -> torch.Tensor:
    with origin.blamed(f"{method}()"):
        found = transform(scores, batch)
        check_scores(found, scores)
    return found


def _loss(origin: Origin, loss: Callable[..., Any], scores: PreferenceScores) -> torch.Tensor | None:
    with origin.blamed("loss()"):
        found = loss(scores)
        # What a model whose training diverged gives is not the transform's fault. The scores are looked at only where
        # it matters, since each look waits for a GPU.
        sound = found is None or _is_finite_scalar(found)
        diverged = not sound and not (scores.chosen.isfinite().all() and scores.rejected.isfinite().all())
        if found is not None and not diverged:
            if not sound:
                check_loss(found)
            if scores.chosen.requires_grad and not found.requires_grad:
                fix = "Compute it from scores.chosen and scores.rejected, without detach()."
                raise ContractViolation("gives a loss without gradient", fix)
    return found


def _call(name: str, origin: Origin, method: Callable[..., Any], *arguments: Any) -> Any:
    """What only has to be named when it fails."""
    with origin.blamed(f"{name}()"):
        return method(*arguments)


# ---- Selections -------------------------------------------------------------------------------------------


def check_selection(found: Any, size: int) -> Selection:
    """What a selector returned of a pool of ``size`` rows, as a Selection.

    Raises:
        ContractViolation: It is neither a Selection nor indices; an index is not there; nothing is left to train on; or
            strata, rehearsal, clusters or embeddings do not belong to the rows.
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
    """How many responses a prompt a selector asks for.

    Raises:
        ContractViolation: It is no whole number from 1.
    """
    if type(count) is not int or count < 1:
        raise ContractViolation(f"says that num_responses is {count!r}", "Make it a whole number, 1 or more.")
    return count


def _select(origin: Origin, select: Callable[..., Any], pool: Pool) -> Selection:
    with origin.blamed("select()"):
        return check_selection(select(pool), len(pool))


# ---- Sampled pairs ----------------------------------------------------------------------------------------


def checked_pairs(found: Iterable[Any], prompts: Sequence[Prompt]) -> dict[str, list[SampledPair]]:
    """What a sampler made of each prompt, by its id.

    Raises:
        ContractViolation: One is no SampledPair, of a prompt that was not given, or neither a pair nor dropped; or a
            prompt has none, or a pair although it is dropped.
    """
    by_prompt: dict[str, list[SampledPair]] = {prompt.id: [] for prompt in prompts}
    if isinstance(found, str | bytes) or not isinstance(found, Iterable):
        raise ContractViolation(f"returns a {type(found).__name__}", "Yield SampledPair(prompt.id, ...).")
    for pair in found:
        if not isinstance(pair, SampledPair):
            raise ContractViolation(f"yields a {type(pair).__name__}", "Yield trl_rlaif.SampledPair(prompt.id, ...).")
        if not isinstance(pair.id, Hashable) or pair.id not in by_prompt:
            raise ContractViolation(f"yields the id {pair.id!r}, which no prompt has", "Pass the prompt's id on.")
        _check_pair(pair)
        by_prompt[pair.id].append(pair)
    for id, pairs in by_prompt.items():
        if not pairs:
            fix = "Yield one a prompt or more; of one that gives none, SampledPair(prompt.id, dropped='why')."
            raise ContractViolation(f"says nothing of the prompt {id!r}", fix)
        if len(pairs) > 1 and any(pair.dropped for pair in pairs):
            fix = "Give a reason in dropped where there is no pair, and nothing else."
            raise ContractViolation(f"drops the prompt {id!r} and yields more of it", fix)
    return by_prompt


def _check_pair(pair: SampledPair) -> None:
    texts = (pair.response_1, pair.response_2)
    if pair.dropped:
        if texts != (None, None) or pair.revision is not None:
            fix = "Give a reason in dropped where there is no pair, and nothing else."
            raise ContractViolation(f"drops {pair.id!r} and gives a response", fix)
        return
    given = texts if pair.revision is None else (*texts, pair.revision)
    if not all(isinstance(text, str) and text.strip() for text in given):
        raise ContractViolation(f"yields a pair of {pair.id!r} with a response that is no text, or blank", _DROP)
    if pair.response_1 == pair.response_2:
        raise ContractViolation(f"yields two equal responses to {pair.id!r}", _DROP)
    known = sorted(set(pair.extra) & _PAIR_COLUMNS)
    if known:
        fix = "Call the column something else."
        raise ContractViolation(f"yields a pair of {pair.id!r} with a column '{known[0]}', which pairs have", fix)
    try:
        json.dumps(pair.extra, allow_nan=False)
    except (TypeError, ValueError) as error:
        what = f"yields a pair of {pair.id!r} whose extra cannot be written as JSON: {error}"
        raise ContractViolation(what, "Fill it with finite numbers and texts.") from None


def _sample(
    origin: Origin, sample: Callable[..., Any], prompts: Sequence[Prompt], generate: Generate, seed: int
) -> list[SampledPair]:
    with origin.blamed("sample()"):
        return [pair for pairs in checked_pairs(sample(prompts, generate, seed), prompts).values() for pair in pairs]


# For each kind what its methods are called through.
_METHODS: dict[type[Component], tuple[str, dict[str, Callable[..., Any]]]] = {
    Labeler: ("labeler", {"label": _label} | {name: partial(_call, name) for name in ("columns", "check_row")}),
    RewardTransform: (
        "reward transform",
        {name: partial(_transform, name) for name in ("transform", "transform_pool")}
        | {"loss": _loss}
        | {name: partial(_call, name) for name in ("metrics", "state_dict", "load_state_dict")},
    ),
    DataSelector: ("data selector", {"select": _select}),
    PairSampler: ("pair sampler", {"sample": _sample}),
}
