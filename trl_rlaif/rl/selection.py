"""Data selection: which prompts PPO trains on and which pairs it rehearses, the same in all processes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import RandomSampler

from trl_rlaif.components import DataSelector
from trl_rlaif.distributed import failing_together
from trl_rlaif.errors import UserError
from trl_rlaif.files import to_line, write_atomically
from trl_rlaif.pipeline.artifacts import REHEARSAL, SELECTION_MAP
from trl_rlaif.progress import progress_bar
from trl_rlaif.rl.rehearsal import Rehearsal, lines
from trl_rlaif.rl.reward_shaping import kl_per_token
from trl_rlaif.rl.rollouts import join_rollouts, unpadded
from trl_rlaif.rl.scoring import RewardPipeline, Scores
from trl_rlaif.types import Pool, RehearsalPair, Rollout, Selection
from trl_rlaif.validation import check_num_responses, origin_of, validated

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset
    from torch import nn

    from trl_rlaif.rl.ppo.config import PPOConfig

# Points of the report's map; more would only hide each other.
MAP_POINTS = 2_000


@dataclass(frozen=True)
class MergedSelection:
    """The combined selection of all selectors.

    Args:
        rows: Indices into the prompt dataset, to train on; None for all of it.
        strata: A label for each of ``rows``, or None.
        rehearsal: Pairs to rehearse.
        map: Points of the report's map of clusters: x, y, cluster, chosen, prompt.
    """

    rows: list[int] | None = None
    strata: list[int] | None = None
    rehearsal: list[RehearsalPair] = field(default_factory=list)
    map: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MergedSelection:
        """From ``to_dict``'s result."""
        return cls(**{**values, "rehearsal": [RehearsalPair(**pair) for pair in values["rehearsal"]]})


class Steps(Protocol):
    """A trainer's steps that a pool of responses goes through."""

    def sample(self, batch: dict[str, Any]) -> Rollout:
        """Responses of the current policy to a collated batch of prompts."""

    def score(self, rollout: Rollout) -> Scores | torch.Tensor:
        """Their summed rewards."""

    def transform(self, scores: Scores | torch.Tensor, rollout: Rollout, *, pool: bool = False) -> Any:
        """Transformed scores: Scores, or (B,) float32."""


@dataclass
class PromptPool:
    """Samples and scores the current policy's responses to a run's prompts. Each process samples a share.

    Args:
        prompts: With ``input_ids``.
        collate: Makes a batch from rows.
        steps: Sample, score and transform.
        rewards: Counts the responses without a reward; its state is restored on request.
        policy: Returns the policy's model, whose base without an adapter embeds prompts.
        args: Seed, number of prompts, batch size and KL estimator.
        accelerator: Of all processes.
    """

    prompts: Dataset
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    steps: Steps
    rewards: RewardPipeline
    policy: Callable[[], nn.Module]
    args: PPOConfig
    accelerator: Accelerator

    def draw(self, num_responses: int = 1, *, selection: int = 0) -> Pool:
        """Scored responses to ``args.selection_prompts`` of the prompts, or to all; every process gets all of them.

        Responses without a reward are left out.

        Args:
            num_responses: Responses per prompt.
            selection: Number of earlier selections: each one draws different prompts, unless all are used.

        Raises:
            UserError: More than a fraction ``args.max_failed`` of the responses has no reward, or all have none.
        """
        rows = [row for row in self._rows(selection) for _ in range(num_responses)]
        share = -(-len(rows) // self.accelerator.num_processes)
        begin, size = self.accelerator.process_index * share, self.args.local_batch_size
        # Beyond the last prompt they repeat, since all processes must sample equally many.
        batches = [
            [rows[i % len(rows)] for i in range(start, min(start + size, begin + share))]
            for start in range(begin, begin + share, size)
        ]
        rollout, scores = self._scored(batches, share)
        found = gather_object(self._plain(rollout, scores))[: len(rows)]
        drawn: dict[str, Any] = {name: [values[name] for values in found] for name in found[0]}
        prompt_ids, columns = drawn["prompt_ids"], drawn["columns"]
        drawn |= {name: torch.tensor(drawn[name]) for name in ("scores", "entropies", "kl")}
        drawn["columns"] = {name: [values[name] for values in columns] for name in columns[0]}
        pool = Pool(
            **drawn,
            rows=torch.tensor(rows),
            embed=lambda: self._embeddings(prompt_ids, num_responses),
            seed=self.args.seed,
            selection=selection,
        )
        known = (~pool.scores.isnan()).nonzero()[:, 0].tolist()
        if not known:
            raise UserError("None of the responses to choose from has a reward.")
        return pool if len(known) == len(pool) else pool.subset(known)

    def _rows(self, selection: int) -> list[int]:
        """The prompts to sample responses to."""
        rows, limit = list(range(len(self.prompts))), self.args.selection_prompts
        if limit is None or limit >= len(rows):
            return rows
        chosen = np.random.default_rng(self.args.seed + selection).choice(len(rows), limit, replace=False)
        return sorted(chosen.tolist())

    def _scored(self, batches: list[list[int]], size: int) -> tuple[Rollout, Scores]:
        """Responses to batches of prompts (rows) as one rollout, and their (size,) scores, transformed together.

        Transformed batch by batch, they would not be comparable: each batch has its own statistics.
        """
        rollouts, scores, before = [], [], self.rewards.sum.state_dict()
        # A pool may take longer than an update.
        bar = progress_bar("Drawing responses to choose from", size, unit="responses")
        with bar if self.accelerator.is_main_process else nullcontext(lambda count: None) as advance:
            for batch in batches:
                rollouts.append(self.steps.sample(self.collate([self.prompts[row] for row in batch])))
                scores.append(Scores.of(self.steps.score(rollouts[-1])))
                self.rewards.observe(scores[-1])
                self.rewards.unscored.check()
                advance(len(batch))
        rollout = join_rollouts(rollouts)
        return rollout, Scores.of(self.steps.transform(self.rewards.joined(scores, before), rollout, pool=True))

    def _plain(self, rollout: Rollout, scores: Scores) -> list[dict[str, Any]]:
        """A pool's record of each response, as plain values that can be gathered."""
        prompt_ids, response_ids = zip(*unpadded(*rollout.sequences(slice(None))), strict=True)
        found = {
            "prompts": rollout.prompts,
            "responses": rollout.completions,
            "scores": scores.total.tolist(),
            "categories": rollout.categories,
            "prompt_ids": prompt_ids,
            "response_ids": response_ids,
            "entropies": (-rollout.logprobs.sum(1) / rollout.lengths.clamp(min=1)).tolist(),
            "kl": kl_per_token(rollout.logprobs, rollout.ref_logprobs, self.args.kl_estimator).sum(1).tolist(),
            "columns": [{name: values[i] for name, values in rollout.columns.items()} for i in range(len(prompt_ids))],
        }
        return [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]

    def _embeddings(self, prompt_ids: list[list[int]], repeats: int) -> np.ndarray:
        """By the frozen base; a prompt's responses are consecutive."""
        from trl_rlaif.models.embedding import mean_hidden_states
        from trl_rlaif.models.shared_model import active_adapter

        model = self.policy()
        with active_adapter(model, None):
            return mean_hidden_states(model, prompt_ids[::repeats]).repeat(repeats, axis=0)


class PromptSelection:
    """The selectors' choice from a run's pool, to train on and to rehearse, the same in all processes.

    Args:
        selectors: Applied one after another; without any, nothing changes.
        pool: What they choose from.
        rehearsal: Filled with the pairs that they choose.
        folder: Where the choice is written for inspection.
        reload: Switches training to other prompts, given them and a label for each or None.

    Attributes:
        chosen: The current choice; None before the first.
        at: The update before which it was made, if known.
    """

    def __init__(
        self,
        selectors: Sequence[DataSelector],
        pool: PromptPool,
        rehearsal: Rehearsal,
        folder: str | Path,
        reload: Callable[[Dataset, Sequence[Hashable] | None], None] = lambda prompts, strata: None,
    ) -> None:
        self.selectors, self.pool, self.rehearsal, self.folder = list(selectors), pool, rehearsal, Path(folder)
        self._reload = reload
        self.chosen: MergedSelection | None = None
        self.at: int | None = None

    @property
    def num_responses(self) -> int:
        """Responses per prompt that the selectors need."""
        return max(map(responses_needed, self.selectors))

    @property
    def prompts(self) -> Dataset:
        """The prompts chosen to train on."""
        rows = None if self.chosen is None else self.chosen.rows
        return self.pool.prompts if rows is None else self.pool.prompts.select(rows)

    def due(self, update: int) -> bool:
        """Whether to choose before this update, from 0: at the start, and every ``selection_every`` updates."""
        every = self.pool.args.selection_every
        again = every is not None and update > 0 and update % every == 0
        # A run that stopped between a selection and the end of its update is resumed with that selection.
        return bool(self.selectors) and (self.chosen is None or (again and self.at != update))

    def renew(self, update: int) -> None:
        """Choose, if that is due before this update."""
        if self.due(update):
            self.take(self.choose(update))
            self.at = update

    def choose(self, update: int) -> MergedSelection:
        """The selectors' choice. The rewards' state is restored afterwards: a pool is not training data.

        Raises:
            UserError: As ``select``.
        """
        every = self.pool.args.selection_every
        with self.pool.rewards.unchanged():
            pool = self.pool.draw(self.num_responses, selection=update // every if every else 0)
        return self.choose_from(pool)

    def choose_from(self, pool: Pool) -> MergedSelection:
        """The first process's choice, broadcast to all."""
        chosen = MergedSelection()
        with failing_together(self.pool.accelerator):
            if self.pool.accelerator.is_main_process:
                chosen = select(self.selectors, pool)
        return broadcast_object_list([chosen])[0]

    def take(self, chosen: MergedSelection) -> None:
        """Train on it and rehearse it from now on."""
        before, self.chosen = self.chosen or MergedSelection(), chosen
        self.rehearsal.fill(chosen.rehearsal)
        self.write()
        if (chosen.rows, chosen.strata) != (before.rows, before.strata):
            self._reload(self.prompts, chosen.strata)

    def state_dict(self) -> dict[str, Any]:
        """The choice, and when it was made; the same in all processes."""
        return {"chosen": None if self.chosen is None else self.chosen.to_dict(), "selected_at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a ``state_dict``."""
        if state["chosen"] is not None:
            self.take(MergedSelection.from_dict(state["chosen"]))
        self.at = state.get("selected_at")  # checkpoints of earlier versions have none

    def write(self) -> None:
        """Write rehearsal.jsonl and selection_map.jsonl."""
        if not self.pool.accelerator.is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        points = [] if self.chosen is None else self.chosen.map
        for name, rows in ((REHEARSAL, lines(self.rehearsal.pairs)), (SELECTION_MAP, points)):
            if rows:
                write_atomically(self.folder / name, "".join(map(to_line, rows)))


def responses_needed(selector: DataSelector) -> int:
    """Responses per prompt that a selector needs."""
    with origin_of(selector, "data selector").blamed("num_responses"):
        return check_num_responses(selector.num_responses)


def select(selectors: Sequence[DataSelector], pool: Pool) -> MergedSelection:
    """Apply selectors one after another, each to the prompts that the previous one kept.

    Raises:
        UserError: A selector chose no prompt or an invalid index, or violated its contract in another way.
        ComponentError: The same for a selector that a recipe names, or an exception in it.
    """
    rows: list[int] | None = None
    strata: dict[int, int] = {}
    rehearsal: list[RehearsalPair] = []
    points: list[dict[str, Any]] = []
    for selector in selectors:
        selection = validated(selector).select(pool)
        rehearsal += selection.rehearsal
        if selection.clusters is not None:
            points = map_points(pool, selection)
        if selection.prompts is None:
            continue
        chosen = [int(i) for i in selection.prompts]
        rows = [int(pool.rows[i]) for i in chosen]
        if selection.strata is not None:  # numbered: the label itself does not matter, and a checkpoint holds numbers
            numbers = {label: i for i, label in enumerate(dict.fromkeys(selection.strata))}
            strata = {row: numbers[label] for row, label in zip(rows, selection.strata, strict=True)}
        kept = set(rows)
        pool = pool.subset([i for i, row in enumerate(pool.rows.tolist()) if row in kept])
    return MergedSelection(rows, [strata[row] for row in rows] if strata else None, rehearsal, points)


def map_points(pool: Pool, selection: Selection) -> list[dict[str, Any]]:
    """A pool's prompts on the first two principal components of their embeddings, the rehearsed ones marked."""
    from sklearn.decomposition import PCA

    from trl_rlaif.encoding import as_text

    chosen = {tuple(pair.prompt_ids) for pair in selection.rehearsal}
    marked = np.array([tuple(ids) in chosen for ids in pool.prompt_ids])
    first = np.unique(pool.rows.numpy(), return_index=True)[1]
    if len(first) > MAP_POINTS:
        others = np.random.default_rng(pool.seed).permutation(first[~marked[first]])
        first = np.sort(np.concatenate([first[marked[first]], others])[:MAP_POINTS])
    embeddings = pool.embeddings if selection.embeddings is None else selection.embeddings
    if len(first) < 2:
        return []
    places = PCA(2, random_state=pool.seed).fit_transform(embeddings[first])
    return [
        {
            "x": float(x),
            "y": float(y),
            "cluster": int(selection.clusters[i]),
            "chosen": bool(marked[i]),
            "prompt": as_text(pool.prompts[i])[:200],
        }
        for i, (x, y) in zip(first.tolist(), places, strict=True)
    ]


class StratifiedSampler(RandomSampler):
    """A shuffled pass over rows in which every stretch holds the labels in similar proportions.

    Args:
        strata: A label for each row.
    """

    def __init__(self, strata: Sequence[Hashable]) -> None:
        super().__init__(strata)
        self._strata: dict[Hashable, list[int]] = {}
        for row, label in enumerate(strata):
            self._strata.setdefault(label, []).append(row)

    def __iter__(self) -> Iterator[int]:
        generator = self.generator  # accelerate's, in several processes
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
        places: list[tuple[float, int]] = []
        for rows in self._strata.values():
            order = torch.randperm(len(rows), generator=generator).tolist()
            begin = torch.rand((), generator=generator).item()
            places += [((i + begin) / len(rows), rows[k]) for i, k in enumerate(order)]
        yield from (row for _, row in sorted(places))
