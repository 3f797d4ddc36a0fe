"""Labeling with Ray Data: each worker on a cluster has its own judge, and one driver stores the labels."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_rlaif.data import Pair
from trl_rlaif.errors import TrlRlaifError, UserError
from trl_rlaif.judging.remote import RemoteJudge
from trl_rlaif.judging.usage import Meter, Usage
from trl_rlaif.labels.store import LabelStore
from trl_rlaif.models.kernels import kernels
from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.label_costs import meter_of
from trl_rlaif.pipeline.label_tasks import LabelTask, label_key, label_tasks
from trl_rlaif.pipeline.outside_labels import distinct, opened_to_label
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.usage import counted
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.progress import progress_bar
from trl_rlaif.recipe import Recipe
from trl_rlaif.recipe.inputs import read_calibration
from trl_rlaif.types import Label

if TYPE_CHECKING:
    from trl_rlaif.components import Labeler
    from trl_rlaif.judging.judge import Judge


def label_with_ray(
    recipe: Recipe,
    output: str | Path,
    *,
    workers: int = 1,
    batch_size: int = 256,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
) -> int:
    """Label a run's unlabeled pairs with Ray Data; ``trl-rlaif run RECIPE --resume`` continues from there.

    Each worker is an actor that loads the judge once. Labels are appended to the run's labels.jsonl as they arrive, so
    after a kill only the rest is asked. They equal those of ``trl-rlaif run``, except that a judge in the worker's
    process computes in other batches, which may change the last digits.

    Args:
        recipe: From ``parse_recipe``. Its labelers under ``label.compare`` and the pairs of ``label.calibration`` are
            included.
        output: The run's folder, whose pairs are complete. If the judge is ``taught``, workers on other machines must
            see it at the same path.
        workers: Number of actors.
        batch_size: Pairs per task: lost, and asked again, if a worker dies.
        num_cpus, num_gpus: Per actor.

    Returns:
        How many pairs were labeled.

    Raises:
        UserError: Ray is not installed; the labels' inputs are not complete; or the recipe's questions depend on
            earlier answers.
        RunError: The judge is no longer available, or its budget is used up.
    """
    _check(recipe)
    made, actors = 0, {"workers": workers, "batch_size": batch_size, "num_cpus": num_cpus, "num_gpus": num_gpus}
    with opened_to_label(recipe, installed_plugins(), Path(output)) as context, counted(context, "label"):
        section, tasks = context.recipe.label, label_tasks(context.recipe)
        judged = [p for p in read_calibration(recipe).items if p.human in (1, 2)] if section.calibration else []
        with LabelStore(context.folder / artifacts.LABELS, context.folder.state / artifacts.LABEL_INDEX) as store:
            for task in tasks:
                driver = _Driver(context, store, task)
                made += driver.label(context.pairs(), actors)
                made += driver.label(judged, actors) if section.jury or task is tasks[0] else 0
    return made


def _check(recipe: Recipe) -> None:
    ranking = recipe.label.ranking if recipe.label else None
    rounds = recipe.rounds is not None and recipe.rounds.number > 1
    for wrong, what in (
        (recipe.label is None, "Ray labels pairs, and this recipe has no 'label'."),
        (rounds, "Ray labels the pairs of one run, and this recipe has rounds."),
        (ranking is not None and ranking.method == "tournament", "What a tournament asks follows from all answers."),
    ):
        if wrong:
            raise UserError(what, where=str(recipe.source), fix="Label without Ray: trl-rlaif run RECIPE.")


class _Driver:
    """Stores the labels of one labeler."""

    def __init__(self, context: Context, store: LabelStore, task: LabelTask) -> None:
        self.context, self.store, self.task = context, store, task
        self.key, self.meter = label_key(context, task), meter_of(context, task)

    def label(self, pairs: Sequence[Pair], actors: Mapping[str, Any]) -> int:
        """Label pairs; returns how many were labeled now."""
        everything = distinct(self.key, pairs)
        missing = {pair.id: pair for pair in self.store.missing(self.key, everything)}
        self._check_budget(left=len(missing))
        made = asked = 0
        of_worker = (self.context.recipe, self.context.folder.path, self.context.date, self.task)
        title = f"Labeling ({self.task.name})"
        with progress_bar(title, len(everything), len(everything) - len(missing), "pairs") as advance:
            for answered in _mapped(list(missing.values()), of_worker, **actors) if missing else ():
                for label in answered.labels:
                    self.store.add(self.key, missing[label.id], label)
                    made += label.p is not None
                asked += len(answered.labels)
                advance(len(answered.labels))
                self._count(answered.used, left=len(missing) - asked)
                if answered.error is not None:
                    raise answered.error
        return made

    def _count(self, used: Usage, left: int) -> None:
        if self.meter is not None:
            self.meter.total.add(used)
            self._check_budget(left)

    def _check_budget(self, left: int) -> None:
        if self.meter is not None and self.meter.used_up and left:
            raise self.meter.error()


@dataclass(frozen=True)
class Answered:
    """A worker's result for a batch.

    Args:
        labels: Of its pairs.
        used: Tokens used by a judge on a server.
        error: Why it could not label the rest.
    """

    labels: list[Label]
    used: Usage
    error: TrlRlaifError | None


class Worker:
    """Labels batches of pairs; Ray Data makes one in each actor."""

    def __init__(self, recipe: Recipe, folder: Path, today: date, task: LabelTask) -> None:
        """Load nothing yet: a later failure is returned as a batch's result, so that Ray does not retry it.

        Args:
            recipe: With ``auto`` resolved.
            folder: The run's.
            today: The date given to chat templates.
            task: The labels to compute.
        """
        self.recipe, self.folder, self.today, self.task = recipe, folder, today, task

    @cached_property
    def _context(self) -> Context:
        context = Context(self.recipe, RunFolder(self.folder), installed_plugins())
        context.date = self.today
        return context

    @cached_property
    def _labeler(self) -> Labeler:
        return self._context.create_labeler(self.task.labeler)

    @cached_property
    def _judge(self) -> Judge:
        return self._context.judges.load(self.task.judge, self.task.prompt)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[bytes]]:
        """From rows with one pair each to one row with the result, all pickled."""
        return {"answered": [pickle.dumps(self._answer([pickle.loads(row) for row in batch["pair"]]))]}

    def _answer(self, pairs: Sequence[Pair]) -> Answered:
        labels: list[Label] = []
        meter, error = Meter(), None
        try:
            with kernels(self.recipe.run.kernels):
                judge, known = self._judge, meter_of(self._context, self.task)
                if isinstance(judge, RemoteJudge) and known is not None:
                    meter = judge.meter = Meter(known.price, known.budget)  # the driver counts earlier usage
                labels.extend(self._labeler.label(pairs, judge))
        except TrlRlaifError as raised:
            error = raised
        return Answered(labels, meter.used, error)


def _mapped(
    pairs: Sequence[Pair],
    of_worker: tuple[Any, ...],
    *,
    workers: int,
    batch_size: int,
    **resources: float,
) -> Iterator[Answered]:
    """The results of actors, each with a Worker built from the arguments; batch by batch, in any order."""
    try:
        import ray.data
    except ImportError:
        raise UserError("Labeling with Ray needs the package ray.", fix="pip install 'trl-rlaif[ray]'") from None
    rows = [{"pair": pickle.dumps(pair)} for pair in pairs]
    # A block is a batch, and its labels arrive as soon as it is done.
    blocks = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // batch_size))
    pool = ray.data.ActorPoolStrategy(size=workers)
    found = blocks.map_batches(Worker, fn_constructor_args=of_worker, batch_size=None, compute=pool, **resources)
    for batch in found.iter_batches(batch_size=None, prefetch_batches=0):
        yield from map(pickle.loads, batch["answered"])
