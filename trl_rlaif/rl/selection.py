"""What PPO trains on and what it rehearses: the selectors' choice from a pool, one for all processes."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import RandomSampler

from trl_rlaif.components import DataSelector
from trl_rlaif.distributed import failing_together
from trl_rlaif.errors import UserError
from trl_rlaif.pipeline.artifacts import to_line, write_atomically
from trl_rlaif.progress import progress_bar
from trl_rlaif.rl.ppo.advantages import kl_per_token
from trl_rlaif.rl.rehearsal import lines
from trl_rlaif.rl.rollouts import join_rollouts
from trl_rlaif.rl.scoring import Scores
from trl_rlaif.types import Pool, RehearsalPair, Rollout, Selection
from trl_rlaif.validation import check_num_responses, origin_of, validated

if TYPE_CHECKING:
    from trl_rlaif.rl.ppo.trainer import PPOTrainer

# Points of the report's map; more would only hide each other.
MAP_POINTS = 2_000
REHEARSAL_FILE, MAP_FILE = "rehearsal.jsonl", "selection_map.jsonl"


@dataclass(frozen=True)
class MergedSelection:
    """What all selectors together chose.

    Args:
        rows: Of the prompt dataset, to train on; None for all of it.
        strata: A label for each of ``rows``, or None.
        rehearsal: Pairs to rehearse.
        map: Points of the report's map of clusters: x, y, cluster, chosen, prompt.
    """

    rows: list[int] | None = None
    strata: list[Hashable] | None = None
    rehearsal: list[RehearsalPair] = field(default_factory=list)
    map: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MergedSelection:
        """What ``to_dict`` gave."""
        return cls(**{**values, "rehearsal": [RehearsalPair(**pair) for pair in values["rehearsal"]]})


def choose(trainer: PPOTrainer) -> MergedSelection:
    """The selectors' choice from the trainer's prompts, with scored responses of the present policy.

    Every process draws and scores a share of the pool; the first one chooses from all of it. The reward transforms'
    state is afterwards what it was: a pool is no training data.

    Raises:
        UserError: As ``select``.
    """
    accelerator, chosen = trainer.accelerator, MergedSelection()
    state = trainer.rewards.state_dict()
    every, updates = trainer.args.selection_every, trainer.state.global_step
    pool = draw_pool(trainer, responses_needed(trainer), selection=updates // every if every else 0)
    trainer.rewards.load_state_dict(state)
    with failing_together(accelerator):
        if accelerator.is_main_process:
            chosen = select(trainer.data_selectors, pool)
    return broadcast_object_list([chosen])[0]


def responses_needed(trainer: PPOTrainer) -> int:
    """Responses a prompt that the trainer's selectors need."""
    return max(map(_responses_needed, trainer.data_selectors))


def _responses_needed(selector: DataSelector) -> int:
    with origin_of(selector, "data selector").blamed("num_responses"):
        return check_num_responses(selector.num_responses)


def draw_pool(trainer: PPOTrainer, num_responses: int = 1, *, selection: int = 0) -> Pool:
    """Scored responses of the present policy to ``args.selection_prompts`` of the trainer's prompts, or to all.

    Every process draws a share, and has all of it in the end. Responses without a reward are left out.

    Args:
        trainer: Whose policy, rewards and transforms are used.
        num_responses: Responses a prompt.
        selection: How many selections came before: each one draws prompts of its own, where not all are drawn.

    Raises:
        UserError: More than ``args.max_failed`` of the responses have no reward, or all have none.
    """
    seed, limit = trainer.args.seed, trainer.args.selection_prompts
    rows = list(range(len(trainer.every_prompt)))
    if limit is not None and limit < len(rows):
        rows = sorted(np.random.default_rng(seed + selection).choice(len(rows), limit, replace=False).tolist())
    rows = [row for row in rows for _ in range(num_responses)]
    processes, size = trainer.accelerator.num_processes, trainer.args.local_batch_size
    share = -(-len(rows) // processes)
    begin = trainer.accelerator.process_index * share
    # What is beyond the last prompt is a repetition, so that all processes draw equally many.
    batches = [
        [rows[i % len(rows)] for i in range(start, min(start + size, begin + share))]
        for start in range(begin, begin + share, size)
    ]
    rollout, scores = _scored(trainer, batches, share)
    entropies = -rollout.logprobs.sum(1) / rollout.lengths.clamp(min=1)
    kl = kl_per_token(rollout.logprobs, rollout.ref_logprobs, trainer.args.kl_estimator).sum(1)
    found = zip(
        rollout.prompts,
        rollout.completions,
        scores.total.tolist(),
        rollout.categories,
        [ids[mask].tolist() for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)],
        [ids[:n].tolist() for ids, n in zip(rollout.response_ids, rollout.lengths.tolist(), strict=True)],
        entropies.tolist(),
        kl.tolist(),
        [{name: values[i] for name, values in rollout.columns.items()} for i in range(share)],
        strict=True,
    )
    found = gather_object(list(found))[: len(rows)]
    prompts, responses, scores, categories, prompt_ids, response_ids, entropies, kl, columns = map(
        list, zip(*found, strict=True)
    )
    pool = Pool(
        prompts=prompts,
        responses=responses,
        scores=torch.tensor(scores),
        categories=categories,
        rows=torch.tensor(rows),
        columns={name: [values[name] for values in columns] for name in columns[0]},
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        entropies=torch.tensor(entropies),
        kl=torch.tensor(kl),
        embed=lambda: _embeddings(trainer, prompt_ids, num_responses),
        seed=seed,
        selection=selection,
    )
    known = (~pool.scores.isnan()).nonzero()[:, 0].tolist()
    if not known:
        raise UserError("None of the responses to choose from has a reward.")
    return pool if len(known) == len(pool) else pool.subset(known)


def _scored(trainer: PPOTrainer, batches: list[list[int]], size: int) -> tuple[Rollout, Scores]:
    """Responses to batches of prompts (rows) as one rollout, and their (size,) scores, transformed all at once.

    A batch at a time they could not be compared: each would be mapped by other figures than the one before.
    """
    rollouts, scores, before = [], [], trainer.rewards.sum.state_dict()
    for batch in _shown(trainer, batches, size):
        rollouts.append(trainer.sample(trainer.data_collator([trainer.every_prompt[row] for row in batch])))
        scores.append(Scores.of(trainer.score(rollouts[-1])))
        trainer.rewards.observe(scores[-1])
        trainer.rewards.unscored.check()
    rollout = join_rollouts(rollouts)
    return rollout, Scores.of(trainer.transform(trainer.rewards.joined(scores, before), rollout, pool=True))


def _shown(trainer: PPOTrainer, batches: list[list[int]], size: int) -> Iterator[list[int]]:
    """The batches, with a progress bar over this process's share: a pool may take longer than an update."""
    if not trainer.accelerator.is_main_process:
        yield from batches
        return
    with progress_bar("Drawing responses to choose from", size, unit="responses") as advance:
        for batch in batches:
            yield batch
            advance(len(batch))


def _embeddings(trainer: PPOTrainer, prompt_ids: list[list[int]], repeats: int) -> np.ndarray:
    """By the frozen base; a prompt's responses stand one behind the other."""
    from trl_rlaif.models.embedding import mean_hidden_states
    from trl_rlaif.models.shared_model import active_adapter

    model = trainer.role_models.model("policy")
    with active_adapter(model, None):
        return mean_hidden_states(model, prompt_ids[::repeats]).repeat(repeats, axis=0)


def select(selectors: Sequence[DataSelector], pool: Pool) -> MergedSelection:
    """Apply selectors one after the other, each to the prompts that the one before left.

    Raises:
        UserError: A selector chose no prompt, an index that is not there, or what else its contract does not allow.
        ComponentError: The same of one that a recipe picked, or an exception in it.
    """
    rows: list[int] | None = None
    strata: dict[int, Hashable] = {}
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
        if selection.strata is not None:
            strata = dict(zip(rows, selection.strata, strict=True))
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


def write_selection(folder: Path, chosen: MergedSelection, rehearsed: Sequence[RehearsalPair]) -> None:
    """Write rehearsal.jsonl and selection_map.jsonl, for the reader's eyes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in ((REHEARSAL_FILE, lines(rehearsed)), (MAP_FILE, chosen.map)):
        if rows:
            write_atomically(folder / name, "".join(map(to_line, rows)))


class StratifiedSampler(RandomSampler):
    """A shuffled pass over rows in which every stretch holds the labels in like shares.

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
