"""What trainers hand to components and hooks: scores, responses, rollouts, pools, selections."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

    import numpy as np
    import torch


@dataclass(frozen=True)
class PreferenceScores:
    """A batch of comparisons as a reward model sees it, for a transform's loss.

    Args:
        chosen: Scores of the chosen responses, shape (batch,), float.
        rejected: Scores of the rejected responses, shape (batch,), float.
        p: Probability that chosen is preferred, shape (batch,), float in [0, 1].
        categories: Kind of prompt of each row, or None where unknown.
        expected: e(x), the reward expected for each prompt, shape (batch,), float; only for a transform that
            ``needs_expected``.
        chosen_log_ratios: log pi(y|x) - log pi'_k(y|x) of the chosen responses under K other policies, shape
            (batch, K), float, where the data has them.
        rejected_log_ratios: The same of the rejected responses.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    p: torch.Tensor
    categories: list[str | None]
    expected: torch.Tensor | None = None
    chosen_log_ratios: torch.Tensor | None = None
    rejected_log_ratios: torch.Tensor | None = None


def _select(batch: Any, rows: torch.Tensor) -> Any:
    """A dataclass of tensors, lists and dicts of these, with B rows each, cut down to some of the rows."""
    indices = rows.nonzero()[:, 0].tolist() if str(rows.dtype) == "torch.bool" else rows.tolist()

    def chosen(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: chosen(entries) for name, entries in value.items()}
        if isinstance(value, list):
            return [value[i] for i in indices]
        return value if value is None or isinstance(value, float) else value[rows]

    return type(batch)(**{each.name: chosen(getattr(batch, each.name)) for each in fields(batch)})


@dataclass(frozen=True, kw_only=True)
class Responses:
    """Prompts and responses as tokens.

    B is the batch, P the padded prompt length, T the padded response length. Prompts are padded on the
    left, responses on the right.

    Args:
        prompt_ids: (B, P) int64.
        prompt_mask: (B, P) bool, True where a prompt token stands.
        response_ids: (B, T) int64, as sampled; what follows the end is noise.
        lengths: (B,) int64, tokens up to and with the end token, 0..T.
        ended: (B,) bool, True where the end token was sampled.
        prompts: What the dataset held: text or messages, B entries.
        completions: The responses in the same form (text, or a list with one assistant message).
        columns: The dataset's other columns, B entries each.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    response_ids: torch.Tensor
    lengths: torch.Tensor
    ended: torch.Tensor
    prompts: list[Any]
    completions: list[Any]
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def masks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T) bool each: response tokens; and the same with the step after the last.

        The score lands on that step, so values and returns reach one step further than log-probabilities.
        """
        import torch

        positions = torch.arange(self.response_ids.shape[1], device=self.lengths.device)
        return positions < self.lengths[:, None], positions <= self.lengths[:, None]

    def learned(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same masks, of what is trained on."""
        return self.masks()

    def select(self, rows: torch.Tensor) -> Self:
        """Some rows, in their order: (N,) int64, or (B,) bool."""
        return _select(self, rows)

    def sequences(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Prompt ids, prompt mask, response ids and lengths of some rows."""
        return self.prompt_ids[rows], self.prompt_mask[rows], self.response_ids[rows], self.lengths[rows]

    @cached_property
    def prompt_lengths(self) -> list[int]:
        """Tokens of each prompt, for which the CPU waits once."""
        return self.prompt_mask.sum(1).tolist()

    @cached_property
    def response_lengths(self) -> list[int]:
        """Tokens of each response, likewise."""
        return self.lengths.tolist()

    def by_length(self, rows: torch.Tensor) -> torch.Tensor:
        """The same rows, (N,) int64 on the CPU, the shortest prompt first."""
        import torch

        return rows[torch.tensor([self.prompt_lengths[row] for row in rows.tolist()]).argsort(stable=True)]

    @property
    def categories(self) -> list[str | None]:
        """Kind of prompt of each row, from the column ``category`` where there is one."""
        return self.columns.get("category") or [None] * len(self.prompts)


@dataclass(frozen=True, kw_only=True)
class Rollout(Responses):
    """One batch of sampled responses and all that PPO's update needs of them.

    Args:
        logprobs: (B, T) float32, log-probability under the sampling policy at the sampling temperature.
        ref_logprobs: (B, T) float32, the same under the reference.
        values: (B, T) float32, value of the state before each response token; 0 where there is no value head.
        scored: (B,) bool, False where a response has no reward at all and teaches nothing; None: all have one.
        metrics: Numbers of how it was scored, for the log.
    """

    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    scored: torch.Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def learned(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The masks, False in the rows of responses that have no reward."""
        if self.scored is None:
            return self.masks()
        tokens, steps = self.masks()
        return tokens & self.scored[:, None], steps & self.scored[:, None]

    def kl(self) -> torch.Tensor:
        """(B,) float32, the sum of each response's log-ratios to the reference: an estimate of its KL, in nats."""
        return ((self.logprobs - self.ref_logprobs) * self.masks()[0]).sum(1)


@dataclass(frozen=True)
class ScoredBatch:
    """Responses as a reward transform sees them: all of them have a reward.

    Args:
        prompts: What the dataset held: text or messages, B entries.
        completions: The responses in the same form (text, or a list with one assistant message).
        lengths: (B,) int64, response tokens, the end token counted.
        kl: (B,) float32, the estimated KL between the policy that sampled and the reference, in nats per response: the
            sum of the log-ratios of the sampled tokens. NaN where it is unknown: for the reward model's held-out pairs,
            and in RLOO and GRPO unless a transform ``needs_kl``.
        columns: The dataset's other columns, B entries each.
        parts: (B,) float32 by reward, weighted and normalized, whose sum the first transform is given; NaN where a
            response lacks this reward and has another. A reward of weight 0 is not among them.
        model_scores: (B,) float32, r(x, y) of the reward model, if there is one.
        model_scale: What a unit of ``model_scores`` counts in that sum: weight over normalization.
        expected: (B,) float32, e(x) of a reward model that has such a head, in the unit of ``model_scores``.
    """

    prompts: list[Any]
    completions: list[Any]
    lengths: torch.Tensor
    kl: torch.Tensor
    columns: dict[str, list[Any]] = field(default_factory=dict)
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    model_scores: torch.Tensor | None = None
    model_scale: float = 1.0
    expected: torch.Tensor | None = None

    @property
    def categories(self) -> list[str | None]:
        """The kind of prompt of each row, from the column ``category`` where there is one."""
        return self.columns.get("category") or [None] * len(self.prompts)

    def select(self, rows: torch.Tensor) -> ScoredBatch:
        """Some rows, in their order: (N,) int64, or (B,) bool."""
        return _select(self, rows)


def _no_embeddings() -> np.ndarray:
    raise ValueError("This pool was made without `embed`, which computes its embeddings.")


@dataclass(frozen=True)
class Pool:
    """Scored responses to prompts, from which selectors choose; a prompt may have several, one after the other.

    Args:
        prompts: Text or messages, N entries.
        responses: The responses in the same form, N entries.
        scores: (N,) float32, the summed and transformed reward; with the Advantage Model, r - e.
        categories: Kind of prompt, or None where unknown, N entries.
        rows: (N,) int64, each prompt's row of the prompt dataset.
        columns: The dataset's other columns, N entries each.
        prompt_ids: N token sequences.
        response_ids: N token sequences, as sampled, with the end token where it was drawn.
        entropies: (N,) float32, -log pi(y|x) by token under the policy that sampled, nats.
        kl: (N,) float32, the estimated KL between that policy and the reference, nats a response.
        embed: Computes the embeddings.
        seed: Of what a selector draws at random.
        selection: How many selections of this run came before; a resumed run goes on counting.
    """

    prompts: list[Any]
    responses: list[Any]
    scores: torch.Tensor
    categories: list[str | None]
    rows: torch.Tensor
    columns: dict[str, list[Any]] = field(default_factory=dict)
    prompt_ids: list[list[int]] = field(default_factory=list)
    response_ids: list[list[int]] = field(default_factory=list)
    entropies: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    embed: Callable[[], np.ndarray] = _no_embeddings
    seed: int = 0
    selection: int = 0

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def embeddings(self) -> np.ndarray:
        """(N, H) float32, mean hidden states of the prompts under the frozen base; computed when first asked for."""
        return self.embed()

    def subset(self, indices: Sequence[int]) -> Pool:
        """The same of some rows, in the order given."""
        chosen = [int(i) for i in indices]
        return Pool(
            prompts=[self.prompts[i] for i in chosen],
            responses=[self.responses[i] for i in chosen],
            scores=self.scores[chosen],
            categories=[self.categories[i] for i in chosen],
            rows=self.rows[chosen],
            columns={name: [values[i] for i in chosen] for name, values in self.columns.items()},
            prompt_ids=[self.prompt_ids[i] for i in chosen],
            response_ids=[self.response_ids[i] for i in chosen],
            entropies=None if self.entropies is None else self.entropies[chosen],
            kl=None if self.kl is None else self.kl[chosen],
            embed=lambda: self.embeddings[chosen],
            seed=self.seed,
            selection=self.selection,
        )

    def pair(self, index: int, *, why: str, cluster: int | None = None) -> RehearsalPair:
        """A row as a pair to rehearse."""
        return RehearsalPair(
            prompt=self.prompts[index],
            response=self.responses[index],
            score=float(self.scores[index]),
            cluster=cluster,
            why=why,
            prompt_ids=self.prompt_ids[index],
            response_ids=self.response_ids[index],
        )


@dataclass(frozen=True)
class RehearsalPair:
    """A response that the policy shall not lose.

    Args:
        prompt, response: Text, or messages.
        score: What it was chosen by; None where it is a user's own.
        cluster: Kind of prompt, 0..c-1, where a selector clustered.
        why: What it was chosen for, in words.
        prompt_ids, response_ids: Tokens, the response's with its end token.
    """

    prompt: Any
    response: Any
    score: float | None
    cluster: int | None
    why: str
    prompt_ids: list[int]
    response_ids: list[int]


@dataclass(frozen=True)
class Selection:
    """What a selector chose from a pool of N rows.

    Args:
        prompts: Rows whose prompts PPO trains on, in any order, repeated ones drawn more often; None leaves all.
        strata: Of each of ``prompts``, a label: every batch then holds the labels in like shares.
        rehearsal: What the policy rehearses.
        clusters: (N,) ints, of each row, for the report's map.
        embeddings: (N, H) float, by which they were clustered; None: the pool's own.
    """

    prompts: Sequence[int] | None = None
    strata: Sequence[Hashable] | None = None
    rehearsal: Sequence[RehearsalPair] = ()
    clusters: Sequence[int] | None = None
    embeddings: np.ndarray | None = None
