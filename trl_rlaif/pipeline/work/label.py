"""Soft labels from one or several judges, and the resulting preference dataset."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from trl_rlaif import distributed
from trl_rlaif.data import Pair
from trl_rlaif.data.overlap import prompt_key
from trl_rlaif.errors import RunError, UserError
from trl_rlaif.evaluation import agreement, calibration_error, compare_agreement
from trl_rlaif.labels import LabelKey, LabelStore
from trl_rlaif.labels.calibration import Calibration, check_choices, cross_validate, why_too_few
from trl_rlaif.labels.store import KEY, Plan, pair_key
from trl_rlaif.pipeline import artifacts, rankings
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.jury import Jury
from trl_rlaif.pipeline.label_costs import counting
from trl_rlaif.pipeline.label_rows import LOW_MASS, Columns, StoredRows, TaskLabels
from trl_rlaif.pipeline.label_tasks import LabelTask, label_key, label_tasks
from trl_rlaif.pipeline.preferences import write_preferences
from trl_rlaif.pipeline.results import LabelResults
from trl_rlaif.pipeline.rows import JudgedRow, LabelRow
from trl_rlaif.progress import progress_bar, say
from trl_rlaif.recipe.inputs import read_calibration, warn_of_overlaps

if TYPE_CHECKING:
    from trl_rlaif.judging.judge import Judge
    from trl_rlaif.pipeline.rankings import Rankings

# Fractions above this are worth a warning.
MANY = 0.5
# Pairs passed to a labeler together, and held in memory. Batches of similar length are formed within them.
AT_ONCE = 8192


def run(context: Context) -> LabelResults:
    """Write ``labels.jsonl`` and ``preferences/``; return statistics of the labels."""
    started = time.monotonic()
    with LabelStore(context.folder / artifacts.LABELS, context.folder.state / artifacts.LABEL_INDEX) as store:
        numbers = _run(context, store)
    return numbers | {"seconds": time.monotonic() - started}


def _run(context: Context, store: LabelStore) -> LabelResults:
    pairs = context.pairs()
    tasks, judged = label_tasks(context.recipe), _judged_by_people(context)
    main, *others = tasks
    ranking = rankings.of(context, pairs, label_key(context, main).columns)
    if ranking is not None and ranking.section.method == "tournament":
        labels = {main.name: _tournament(context, store, main, ranking)}
    else:
        labels = {main.name: _labels(context, store, main, pairs)}
    labels |= {task.name: _labels(context, store, task, pairs) for task in others}
    if context.shard:
        return labels[main.name].numbers() | {"shard": str(context.shard)}
    if ranking is not None:
        labels[main.name] = _ranked(ranking, labels[main.name])
    section, final = context.recipe.label, labels[main.name]
    jury = Jury(section.jury, labels) if section.jury else None
    if jury is not None:
        final = _together(labels, jury.labels)
    numbers = final.numbers()
    if not numbers["labeled"]:
        raise RunError("The judge could not label a single pair.", fix=_reasons(numbers["skipped"]))
    calibration, numbers["calibration"] = _calibrate(context, store, tasks, jury, final, judged)
    numbers["overlaps"] = warn_of_overlaps(context.recipe, "label") if judged else []
    p, least = _calibrated(final, calibration), section.min_confidence
    p[np.maximum(p, 1 - p) < least] = np.nan
    kept = np.flatnonzero(~np.isnan(p))
    if not len(kept):
        raise UserError(f"No label reaches a confidence of {least}.", fix="Lower label.min_confidence.")
    numbers["unsure"] = numbers["labeled"] - len(kept)
    if jury is not None:
        agreed = jury.undisputed(kept)
        numbers["jury"] = jury.numbers(len(kept) - len(agreed))
        p[np.setdiff1d(kept, agreed)] = np.nan
        jury.write(context)
    write_preferences(context, pairs, p, jury.disagreement if jury else None)
    if ranking is not None:
        ranking.write(context)
        numbers["ranking"] = ranking.numbers()
    if len(tasks) > 1:
        numbers["comparison"] = _comparison({task.name: labels[task.name] for task in tasks})
    return numbers | {"broken_lines": store.broken}


def _together(labels: dict[str, TaskLabels], joined: Sequence[LabelRow]) -> TaskLabels:
    """A jury's labels, with all members' requests and total duration."""
    first, *_ = members = list(labels.values())
    asked = np.unique(np.concatenate([of.asked for of in members]))
    seconds = sum(of.noted.get("seconds", 0.0) for of in members)
    return TaskLabels(first.key, first.pairs, joined, asked, first.noted | {"seconds": seconds})


def _ranked(ranking: Rankings, labels: TaskLabels) -> TaskLabels:
    """The labels with probabilities from the ranking."""
    rows = ranking.take(labels.by_id())
    return TaskLabels(labels.key, labels.pairs, [rows[pair.id] for pair in labels.pairs], labels.asked, labels.noted)


def _calibrated(labels: TaskLabels, calibration: Calibration | None) -> np.ndarray:
    """The probabilities used for training, (N,) float64; NaN if there is none."""
    columns, p = labels.columns, np.array(labels.columns.p)
    for place in columns.labeled.tolist() if calibration else ():
        p[place] = calibration.apply(_judged(columns, place))
    return p


def _judged(columns: Columns, place: int) -> dict[str, float | None]:
    """The parts of a label that a calibration reads."""
    found = {"p": columns.p[place], "p_12": columns.p_12[place], "p_21": columns.p_21[place]}
    return {name: None if math.isnan(value) else value for name, value in found.items()}


def _labels(
    context: Context, store: LabelStore, task: LabelTask, pairs: Sequence[Pair], purpose: str = "label"
) -> TaskLabels:
    """A task's labels of these pairs, or of this machine's shard of them; missing ones are made now."""
    mine = context.shard.of(pairs) if context.shard else pairs
    result = _pass(context, store, task, mine, purpose, lambda: context.judges.load(task.judge, task.prompt))
    _warn(task, result)
    return result


def _pass(
    context: Context, store: LabelStore, task: LabelTask, mine: Sequence[Pair], purpose: str, judge: Callable[[], Judge]
) -> TaskLabels:
    """A task's labels of these pairs; missing ones are made now.

    Args:
        purpose: Names the plan's file; passes over different pairs need different purposes.
        judge: Loads the task's judge, if anything is missing.
    """
    key = label_key(context, task)
    keys = np.array([key.of(pair).encode() for pair in mine], dtype=KEY)
    # Pairs that could not be judged are retried: a server may be back.
    done = np.array([store.is_judged(key.key, of.decode()) for of in keys.tolist()], dtype=bool)
    path = context.folder.state / artifacts.work_of("label") / artifacts.plan_of(purpose, key.key)
    plan = Plan(path, key.key, keys[~done], keys)
    distributed.wait()  # until all processes have read the folder
    if not done.all():
        _make(context, store, task, key, plan, mine, done, judge())
        store.wait()
    return TaskLabels(key, mine, StoredRows(store, key.key, keys), plan.places, plan.noted)


def _tournament(context: Context, store: LabelStore, main: LabelTask, ranking: Rankings) -> TaskLabels:
    """Run a tournament, round by round; returns labels of the run's own pairs. Each answer is stored as a label.

    A round's questions follow from the earlier answers, so a killed run resumes where it stopped.
    """
    asking = replace(main.labeler, options=main.labeler.options | {"orders": "12"})
    judge = cache(lambda: context.judges.load(main.judge, main.prompt))
    missing: list[str] = []
    noted: dict[str, Any] = {"seconds": 0.0}
    number = 0

    def ask(questions: list[Pair]) -> dict[str, LabelRow]:
        nonlocal number
        number += 1
        task = replace(main, name=f"round {number}", labeler=asking)
        found = _pass(context, store, task, questions, f"round-{number}", judge)
        missing.extend(questions[place].id for place in found.asked.tolist())
        seconds = noted["seconds"] + found.noted.get("seconds", 0.0)
        noted.update(found.noted | {"seconds": seconds})
        return found.by_id()

    rows = ranking.play(ask)
    places = {pair.id: place for place, pair in enumerate(ranking.pairs)}
    asked = np.array([places[id] for id in missing if id in places], dtype=np.int64)  # without swapped pairs
    key = label_key(context, replace(main, labeler=asking))
    result = TaskLabels(key, ranking.pairs, [rows[id] for id in places], asked, noted)
    _warn(main, result)
    return result


def _make(
    context: Context,
    store: LabelStore,
    task: LabelTask,
    key: LabelKey,
    plan: Plan,
    mine: Sequence[Pair],
    done: np.ndarray,
    judge: Judge,
) -> None:
    """Label the pairs of a plan that are not done, with only part of them in memory at a time."""
    labeler = context.create_labeler(task.labeler)
    title = "Labeling" if task.name == "label" else f"Labeling ({task.name})"
    bar = progress_bar(title, len(plan.places), int(done[plan.places].sum()), "pairs")
    with counting(context, task, plan, judge) as note, bar as advance:
        for start in range(0, len(plan.places), AT_ONCE):
            places = plan.places[start : start + AT_ONCE]
            if done[places].all():
                continue
            pairs = [mine[place] for place in places.tolist()]
            by_id = {pair.id: pair for pair in pairs}
            known = {pair.id for pair, is_done in zip(pairs, done[places], strict=True) if is_done}
            for label in labeler.label(pairs, judge, known):
                note()  # before the label, which may be the last one before a kill
                store.add(key, by_id[label.id], label)
                advance(1)


def _warn(task: LabelTask, result: TaskLabels) -> None:
    low, labeled = result.low_masses(), len(result.columns.labeled)
    if low > MANY * 2 * labeled:
        say(
            f"Warning ({task.name}): in {low} of {2 * labeled} answers the judge gave its candidates less than "
            f"{LOW_MASS:.0%} together. It may not understand the question: try another prompt, or a larger judge."
        )
    bias = result.position_bias()
    if bias and bias["rate"] > MANY:
        say(
            f"Warning ({task.name}): in {bias['rate']:.0%} of the pairs the judge preferred the same position both "
            "times, whichever response was there."
        )


def _reasons(skipped: dict[str, int]) -> str:
    return "; ".join(f"{count} pairs: {reason}" for reason, count in skipped.items())


def _judged_by_people(context: Context) -> list[Pair] | None:
    """The pairs of label.calibration, read and checked before the judge is asked; None without the key."""
    if context.recipe.label.calibration is None:
        return None
    judged = [p for p in read_calibration(context.recipe).items if p.human in (1, 2)]
    check_choices([pair.human for pair in judged])
    return judged


def _calibrate(
    context: Context,
    store: LabelStore,
    tasks: list[LabelTask],
    jury: Jury | None,
    final: TaskLabels,
    judged: list[Pair] | None,
) -> tuple[Calibration | None, dict[str, Any] | None]:
    """Fit to human choices; report metrics before and after, on these pairs and the run's own.

    The fit is None unless cross-validation shows that it helps.
    """
    if judged is None:
        return None, None
    rows = _of_judged(context, store, tasks, jury, judged)
    known = [pair for pair in judged if pair.id in rows]
    observed, human = [rows[pair.id] for pair in known], [pair.human for pair in known]
    own, others = _text_keys(final.pairs), _text_keys(known)
    found: dict[str, Any] = {"used": False, "pairs": len(known)}
    found["shared_with_run"] = int(np.isin(others, own).sum())
    reason, fitted = why_too_few(human), None
    if reason is None:
        mean_prob = tasks[0].labeler.options.get("debias") == "mean_prob"
        fitted = Calibration.fit(observed, human, mean_prob=mean_prob)
        crossed = cross_validate(
            observed,
            human,
            [prompt_key(pair.prompt) for pair in known],
            mean_prob=mean_prob,
            seed=context.recipe.run.seed,
        )
        found |= {
            "temperature": 1 / fitted.scale,
            "position_bias": fitted.bias if fitted.has_bias(observed) else None,
            "cross_validated": crossed,
            "run": _on_run(fitted, final.columns, np.isin(own, others)),
        }
        reason = _why_unused(crossed)
    if reason is not None:
        say(
            f"Warning: the calibration is not used: {reason}. The labels stay as the judge gives them. More judged "
            "pairs, of many prompts, can show whether it helps."
        )
        return None, found | {"reason": reason}
    return fitted, found | {"used": True, "reason": None}


def _of_judged(
    context: Context, store: LabelStore, tasks: list[LabelTask], jury: Jury | None, judged: list[Pair]
) -> dict[str, JudgedRow]:
    """The labels of human-judged pairs: the main labeler's, or a jury's."""
    rows = {}
    for task in tasks if jury else tasks[:1]:
        name = "calibration" if task is tasks[0] else f"calibration of {task.name}"
        rows[task.name] = _labels(context, store, replace(task, name=name), judged, "calibration")
    final = next(iter(rows.values()))
    if jury is not None:
        final = _together(rows, jury.joined(rows))
    return final.judged()


def _text_keys(pairs: Iterable[Pair]) -> np.ndarray:
    """``pair_key`` of each pair, without the columns that a label depends on."""
    return np.array([pair_key(pair).encode() for pair in pairs], dtype=KEY)


def _why_unused(crossed: dict[str, Any] | None) -> str | None:
    """The one-standard-error rule (Breiman et al. 1984): the gain must exceed its standard error; None if it does."""
    if crossed is None:
        return "all judged pairs are of one prompt, so it cannot be cross-validated"
    if crossed["gain"] > crossed["standard_error"]:
        return None
    before, after = (crossed[when]["log_loss"] for when in ("before", "after"))
    return (
        f"cross-validation does not show that it helps (log-loss {before:.3f} before, {after:.3f} after, "
        f"standard error of the difference {crossed['standard_error']:.3f})"
    )


def _on_run(fitted: Calibration, columns: Columns, seen: np.ndarray) -> dict[str, Any]:
    """Metrics before and after calibration on the run's human-judged pairs, without those that it was fitted to."""
    unseen = [i for i in columns.labeled.tolist() if columns.human[i] in (1, 2) and not seen[i]]
    human, prompts = [columns.human[i] for i in unseen], [columns.prompts[i] for i in unseen]
    before, after = [columns.p[i] for i in unseen], [fitted.apply(_judged(columns, i)) for i in unseen]
    return {
        when: {"agreement": agreement(p, human, prompts), "ece": calibration_error(p, human)}
        for when, p in (("before", before), ("after", after))
    }


def _comparison(labels: dict[str, TaskLabels]) -> dict[str, Any]:
    """Each labeler's results, and its agreement with human choices compared with the first labeler's."""
    first = next(iter(labels.values())).columns
    table = {}
    for name, one in labels.items():
        numbers, columns = one.numbers(), one.columns
        both = np.intersect1d(columns.labeled, first.labeled).tolist()
        common = [i for i in both if first.human[i] in (1, 2)]
        table[name] = {k: dict(numbers)[k] for k in _COMPARED} | {
            "against_first": compare_agreement(
                [columns.p[i] for i in common],
                [first.p[i] for i in common],
                [first.human[i] for i in common],
            )
        }
    return table


_COMPARED = ("labeler", "judge", "labeled", "agreement", "position_bias", "mass", "ece", "pairs_per_second")
