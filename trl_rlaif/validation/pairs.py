"""The contract for the pairs of a sampler."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from trl_rlaif.types import Pair, SampledPair
from trl_rlaif.validation.blame import ContractViolation, Origin

if TYPE_CHECKING:
    from trl_rlaif.components import Generate
    from trl_rlaif.data import Prompt

_DROP = "Yield SampledPair(prompt.id, dropped='why') instead."
# Columns of pairs.jsonl, which a sampler's extra columns must not be named after.
_PAIR_COLUMNS = {field.name for field in fields(Pair)}


def checked_pairs(found: Iterable[Any], prompts: Sequence[Prompt]) -> dict[str, list[SampledPair]]:
    """A sampler's pairs by prompt id.

    Raises:
        ContractViolation: One is not a SampledPair, is for an unknown prompt, or is neither a valid pair nor dropped;
            or a prompt has none, or a pair although it is dropped.
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


def sample_call(
    origin: Origin, sample: Callable[..., Any], prompts: Sequence[Prompt], generate: Generate, seed: int
) -> list[SampledPair]:
    """``PairSampler.sample`` of a component, validated."""
    with origin.blamed("sample()"):
        return [pair for pairs in checked_pairs(sample(prompts, generate, seed), prompts).values() for pair in pairs]
