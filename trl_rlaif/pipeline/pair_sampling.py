"""Sampling from the initial policy in the stage sample, and pairs from a plugin's sampler."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from trl_rlaif.batching import length_batches
from trl_rlaif.encoding import PromptLike, as_rendered, encode_prompt
from trl_rlaif.generation import sample_responses, seeded
from trl_rlaif.pipeline.context import Context, pair_row
from trl_rlaif.types import Pair, Prompt, SampledPair
from trl_rlaif.validation import ContractViolation

if TYPE_CHECKING:
    from trl_rlaif.components import PairSampler
    from trl_rlaif.pipeline.rows import DrawnRow, RevisionRow
    from trl_rlaif.recipe import SampleSection
    from trl_rlaif.responses import Response, ResponseReader


@dataclass
class StartingPolicy:
    """Samples responses with the settings of the section ``sample``."""

    context: Context
    section: SampleSection
    base: Any

    def __post_init__(self) -> None:
        self.model, self.role = _in_its_role(self.context, self.base)

    @property
    def seed(self) -> int:
        """Seed of all sampling."""
        return self.context.recipe.run.seed if self.section.seed is None else self.section.seed

    @cached_property
    def reader(self) -> ResponseReader:
        """Parses its responses."""
        return self.context.reader(self.model)

    def draw(self, tokens: Sequence[list[int]], *seeds: object, num_responses: int = 1) -> list[list[Response]]:
        """Sample responses to a batch of encoded prompts.

        Args:
            tokens: N token lists.
            seeds: Combined with the seed.
            num_responses: K per prompt.
        """
        with seeded(self.seed, "sample", *seeds):
            drawn = sample_responses(
                self.model,
                self.context.tokenizer,
                tokens,
                num_responses=num_responses,
                max_new_tokens=self.section.max_new_tokens,
                temperature=self.section.temperature,
                top_p=self.section.top_p,
                stop_ids=self.reader.stop_ids,
                keep_end=True,
            )
        return [[self.reader.read(ids, prompt) for ids in of] for prompt, of in zip(tokens, drawn, strict=True)]


def _in_its_role(context: Context, base: Any) -> tuple[Any, AbstractContextManager]:
    """The sampling model, and the context in which it is the initial policy: the base, or ``context.start`` on it."""
    if context.start is None:
        return base, nullcontext()
    from trl_rlaif.models.shared_model import SharedBase

    shared = SharedBase(base, context.start)
    return shared.model, shared.role("policy")


@dataclass
class PluginPairs:
    """Rows of pairs made by the recipe's sampler."""

    policy: StartingPolicy

    def __post_init__(self) -> None:
        self.sampler: PairSampler = self.policy.context.create("pair_sampler", self.policy.section.sampler)

    def draw(self, prompts: list[Prompt], tokens: list[list[int]]) -> list[DrawnRow]:
        """One row per prompt: pairs, or ``dropped`` with the reason."""
        generate, tokenizer = _Generate(self.policy, [prompt.id for prompt in prompts]), self.policy.context.tokenizer
        given = [replace(prompt, prompt=as_rendered(prompt.prompt, tokenizer)) for prompt in prompts]
        found = defaultdict(list)
        for pair in self.sampler.sample(given, generate, self.policy.seed):
            found[pair.id].append(pair)
        return [
            self._row(prompt, found[prompt.id])
            | {"redraws": 0, **{of: getattr(generate, of)[prompt.id] for of in ("responses", "ended", "tokens")}}
            for prompt in prompts
        ]

    def _row(self, prompt: Prompt, pairs: list[SampledPair]) -> DrawnRow:
        if pairs[0].dropped is not None:
            return {"id": prompt.id, "dropped": pairs[0].dropped}
        ids = [prompt.id] if len(pairs) == 1 else [f"{prompt.id}-{number}" for number in range(1, len(pairs) + 1)]
        rows = [
            pair_row(Pair(id, prompt.prompt, str(pair.response_1).strip(), str(pair.response_2).strip(),
                          prompt.category, None, prompt.extra | pair.extra))
            for id, pair in zip(ids, pairs, strict=True)
        ]  # fmt: skip
        revisions = [self._revision(prompt, pair.revision) for pair in pairs if pair.revision is not None]
        return {"id": prompt.id, "pairs": rows, "revisions": revisions}

    def _revision(self, prompt: Prompt, text: str) -> RevisionRow:
        asked = self.policy.context.chat(prompt.prompt)
        return {"prompt": asked, "completion": text if isinstance(asked, str) else _said(text)}


def _said(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


@dataclass
class _Generate:
    """``generate`` of PairSampler.sample: the initial policy for one batch of prompts."""

    policy: StartingPolicy
    ids: Sequence[str]
    calls: int = 0
    responses: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)

    def __call__(self, conversations: Mapping[str, PromptLike]) -> dict[str, str | None]:
        unknown = [id for id in conversations if id not in self.ids]
        if unknown:
            raise ContractViolation(f"asks about {unknown[0]!r}, which no prompt is called", "Use the prompts' ids.")
        self.calls += 1
        policy, section = self.policy, self.policy.section
        context = policy.context
        tokens = {id: encode_prompt(context.tokenizer, context.chat(of)) for id, of in conversations.items()}
        longest = context.longest_prompt(policy.base, section.max_new_tokens)
        fitting = [id for id, ids in tokens.items() if len(ids) <= longest]
        answers: dict[str, str | None] = dict.fromkeys(conversations)
        for batch in length_batches([len(tokens[id]) for id in fitting], section.batch_size):
            ids = [fitting[i] for i in batch]
            drawn = policy.draw([tokens[id] for id in ids], section.sampler.name, self.calls, *ids)
            for id, (response,) in zip(ids, drawn, strict=True):
                answers[id] = response.answer.strip()
                self.responses[id] += 1
                self.ended[id] += response.ended
                self.tokens[id] += len(response.answer_ids)
        return answers
