"""Records that trainers pass to components and hooks: scores, responses, rollouts, pools, selections."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import Self

    import numpy as np
    import torch


@dataclass(frozen=True)
class PreferenceScores:
    """A batch of comparisons scored by a reward model, for a transform's loss.

    Args:
        chosen: Scores of the chosen responses, shape (batch,), float.
        rejected: Scores of the rejected responses, shape (batch,), float.
        p: Probability that chosen is preferred, shape (batch,), float in [0, 1].
        categories: Category of each prompt, or None if unknown.
        expected: e(x), the expected reward of each prompt, shape (batch,), float; only for transforms with
            ``needs_expected``.
        chosen_log_ratios: log pi(y|x) - log pi'_k(y|x) of the chosen responses under K other policies, shape
            (batch, K), float, if the data has them.
        rejected_log_ratios: The same for the rejected responses.
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

    B is the batch size, P the padded prompt length, T the padded response length. Prompts are padded on the
    left, responses on the right.

    Args:
        prompt_ids: (B, P) int64.
        prompt_mask: (B, P) bool, True for prompt tokens.
        response_ids: (B, T) int64, as sampled; tokens after the end are arbitrary.
        lengths: (B,) int64, number of tokens including the end token, 0..T.
        ended: (B,) bool, True if the end token was sampled.
        prompts: Prompts as in the dataset: text or messages, B entries.
        completions: Responses in the same form (text, or a list with one assistant message).
        columns: The other columns of the dataset, B entries each.
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
        """Masks, (B, T) bool each: of the response tokens, and of these with the step after the last one.

        The score is placed on that step, so values and returns extend one step further than log-probabilities.
        """
        import torch

        positions = torch.arange(self.response_ids.shape[1], device=self.lengths.device)
        return positions < self.lengths[:, None], positions <= self.lengths[:, None]

    def learned(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same masks, for the tokens to train on."""
        return self.masks()

    def select(self, rows: torch.Tensor) -> Self:
        """Some rows, in their order: (N,) int64, or (B,) bool."""
        return _select(self, rows)

    def sequences(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Prompt ids, prompt mask, response ids and lengths of some rows."""
        return self.prompt_ids[rows], self.prompt_mask[rows], self.response_ids[rows], self.lengths[rows]

    @cached_property
    def prompt_lengths(self) -> list[int]:
        """Number of tokens of each prompt; synchronizes with the GPU once."""
        return self.prompt_mask.sum(1).tolist()

    @cached_property
    def response_lengths(self) -> list[int]:
        """Number of tokens of each response, likewise."""
        return self.lengths.tolist()

    def by_length(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows, (N,) int64 on the CPU, sorted by prompt length, shortest first."""
        import torch

        return rows[torch.tensor([self.prompt_lengths[row] for row in rows.tolist()]).argsort(stable=True)]

    @property
    def categories(self) -> list[str | None]:
        """Category of each row, from the column ``category`` if there is one."""
        return self.columns.get("category") or [None] * len(self.prompts)


@dataclass(frozen=True, kw_only=True)
class Rollout(Responses):
    """A batch of sampled responses with the quantities that PPO's update needs.

    Args:
        logprobs: (B, T) float32, log-probabilities under the sampling policy at the sampling temperature.
        ref_logprobs: (B, T) float32, the same under the reference.
        values: (B, T) float32, value of the state before each response token; 0 without a value head.
        scored: (B,) bool, False for responses without any reward, which are not trained on; None: all have one.
        metrics: Scoring metrics for the log.
    """

    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    scored: torch.Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def learned(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The masks, False in the rows of responses without a reward."""
        if self.scored is None:
            return self.masks()
        tokens, steps = self.masks()
        return tokens & self.scored[:, None], steps & self.scored[:, None]

    def kl(self) -> torch.Tensor:
        """(B,) float32, sum of each response's log-ratios to the reference: an estimate of the KL in nats."""
        return ((self.logprobs - self.ref_logprobs) * self.masks()[0]).sum(1)


@dataclass(frozen=True)
class ScoredBatch:
    """The responses passed to a reward transform; all of them have a reward.

    Args:
        prompts: Prompts as in the dataset: text or messages, B entries.
        completions: Responses in the same form (text, or a list with one assistant message).
        lengths: (B,) int64, number of response tokens, including the end token.
        kl: (B,) float32, estimated KL between the sampling policy and the reference, in nats per response: the sum of
            the sampled tokens' log-ratios. NaN if unknown: for the reward model's held-out pairs, and in RLOO and GRPO
            unless a transform has ``needs_kl``.
        columns: The other columns of the dataset, B entries each.
        parts: (B,) float32 for each reward, weighted and normalized; their sum is the input of the first transform. NaN
            if a response lacks this reward but has another one. Rewards of weight 0 are not included.
        model_scores: (B,) float32, r(x, y) of the reward model, if there is one.
        model_scale: Factor of ``model_scores`` in that sum: weight divided by normalization.
        expected: (B,) float32, e(x) of a reward model with such a head, in units of ``model_scores``.
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
        """Category of each row, from the column ``category`` if there is one."""
        return self.columns.get("category") or [None] * len(self.prompts)

    def select(self, rows: torch.Tensor) -> ScoredBatch:
        """Some rows, in their order: (N,) int64, or (B,) bool."""
        return _select(self, rows)


def _no_embeddings() -> np.ndarray:
    raise ValueError("This pool was made without `embed`, which computes its embeddings.")


@dataclass(frozen=True)
class Pool:
    """Scored responses for selectors to choose from; several responses to a prompt are consecutive.

    Args:
        prompts: Text or messages, N entries.
        responses: Responses in the same form, N entries.
        scores: (N,) float32, summed and transformed reward; r - e with the Advantage Model.
        categories: Category of each prompt, or None if unknown, N entries.
        rows: (N,) int64, row of each prompt in the prompt dataset.
        columns: The other columns of the dataset, N entries each.
        prompt_ids: N token sequences.
        response_ids: N token sequences, as sampled, including the end token if it was sampled.
        entropies: (N,) float32, -log pi(y|x) per token under the sampling policy, in nats.
        kl: (N,) float32, estimated KL between that policy and the reference, in nats per response.
        embed: Computes the embeddings.
        seed: Seed for a selector's random choices.
        selection: Number of earlier selections in this run; a resumed run continues counting.
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
        """(N, H) float32, mean hidden states of the prompts under the frozen base; computed on first use."""
        return self.embed()

    def subset(self, indices: Sequence[int]) -> Pool:
        """A pool of the given rows, in that order."""
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
        """The pair of a row, for rehearsal."""
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
    """A response for the policy to rehearse.

    Args:
        prompt, response: Text or messages.
        score: The score it was selected by; None if the user provided it.
        cluster: Cluster of the prompt, 0..c-1, if the selector clustered prompts.
        why: Reason for the selection, in words.
        prompt_ids, response_ids: Tokens; those of the response include its end token.
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
    """A selector's choice from a pool of N rows.

    Args:
        prompts: Rows whose prompts PPO trains on, in any order; repeated rows are drawn more often. None: all prompts.
        strata: A label for each of ``prompts``; every batch then has the same proportions of labels.
        rehearsal: Pairs that the policy rehearses.
        clusters: (N,) ints, cluster of each row, for the report's map.
        embeddings: (N, H) float, the embeddings that were clustered; None: the pool's own.
    """

    prompts: Sequence[int] | None = None
    strata: Sequence[Hashable] | None = None
    rehearsal: Sequence[RehearsalPair] = ()
    clusters: Sequence[int] | None = None
    embeddings: np.ndarray | None = None
