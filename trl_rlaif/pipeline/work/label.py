"""Soft labels from one or several judges, and the preference dataset that follows from them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from trl_rlaif.data import Pair
from trl_rlaif.data.overlap import prompt_key
from trl_rlaif.errors import RunError, UserError
from trl_rlaif.evaluation import (
    agreement,
    calibration_error,
    compare_agreement,
    length_preference,
    position_bias,
    summarize_mass,
)
from trl_rlaif.judging.suspicious import count_suspicious
from trl_rlaif.labels import LabelKey, LabelStore
from trl_rlaif.labels.calibration import Calibration, check_choices, cross_validate, why_too_few
from trl_rlaif.labels.store import Plan, pair_key
from trl_rlaif.pipeline import artifacts, rankings
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.jury import Jury
from trl_rlaif.pipeline.label_costs import counting, usage_numbers
from trl_rlaif.pipeline.label_tasks import LabelTask, label_key, label_tasks
from trl_rlaif.pipeline.preferences import write_preferences
from trl_rlaif.pipeline.results import LabelResults
from trl_rlaif.pipeline.rows import JudgedRow, LabelRow
from trl_rlaif.progress import progress_bar, say
from trl_rlaif.recipe.inputs import read_calibration, warn_of_overlaps

if TYPE_CHECKING:
    from trl_rlaif.judging.judge import Judge
    from trl_rlaif.pipeline.rankings import Rankings

# A judge with less than this on its candidates did not answer the question.
LOW_MASS = 0.5
# From here on a share is worth a warning.
MANY = 0.5


def run(context: Context) -> LabelResults:
    """Write ``labels.jsonl`` and ``preferences/``; return what the labels say of the labelers."""
    started = time.monotonic()
    pairs, store = context.pairs(), LabelStore(context.folder / artifacts.LABELS)
    tasks, judged = label_tasks(context.recipe), _judged_by_people(context)
    main, *others = tasks
    ranking = rankings.of(context, pairs, label_key(context, main).columns)
    if ranking is not None and ranking.section.method == "tournament":
        rows = {main.name: _tournament(context, store, main, ranking)}
    else:
        rows = {main.name: _rows(context, store, main, pairs)}
    rows |= {task.name: _rows(context, store, task, pairs) for task in others}
    if context.shard:
        numbers = _of_shard(context, rows[main.name], pairs) | {"usage": usage_numbers(context)}
        return numbers | {"seconds": time.monotonic() - started}
    if ranking is not None:
        rows[main.name].rows = ranking.take(rows[main.name].rows)
    section, final = context.recipe.label, rows[main.name]
    jury = Jury(section.jury, pairs, {name: of.rows for name, of in rows.items()}) if section.jury else None
    if jury is not None:
        final = _together(rows, jury.labels)
    numbers, labeled = final.numbers(pairs), final.labeled
    if not labeled:
        raise RunError("The judge could not label a single pair.", fix=_reasons(numbers["skipped"]))
    calibration, numbers["calibration"] = _calibrate(context, store, tasks, jury, pairs, labeled, judged)
    numbers["overlaps"] = warn_of_overlaps(context.recipe, "label") if judged else []
    p = {id: calibration.apply(row) if calibration else row["p"] for id, row in labeled.items()}
    least = section.min_confidence
    kept = {id: value for id, value in p.items() if max(value, 1 - value) >= least}
    if not kept:
        raise UserError(f"No label is as confident as {least}.", fix="Lower label.min_confidence.")
    numbers["unsure"] = len(p) - len(kept)
    if jury is not None:
        agreed = jury.undisputed(set(kept))
        numbers["jury"] = jury.numbers(len(kept) - len(agreed))
        kept = {id: value for id, value in kept.items() if id in agreed}
        jury.write(context)
    write_preferences(context, pairs, kept, jury.disagreement if jury else None)
    if ranking is not None:
        ranking.write(context)
        numbers["ranking"] = ranking.numbers()
    if len(tasks) > 1:
        numbers["comparison"] = _comparison({task.name: rows[task.name] for task in tasks}, pairs)
    numbers["usage"] = usage_numbers(context)
    return numbers | {"broken_lines": store.broken, "seconds": time.monotonic() - started}


class _Rows:
    """A task's labels by id, and what it took to make those that were missing: of which pairs, and what was noted."""

    def __init__(self, key: LabelKey, rows: dict[str, LabelRow], missing: list[Pair], noted: dict[str, Any]):
        self.key, self.rows, self.missing, self.noted = key, rows, missing, noted

    @property
    def labeled(self) -> dict[str, JudgedRow]:
        """Labels by id, without what could not be judged."""
        return {id: row for id, row in self.rows.items() if row["p"] is not None}

    def position_bias(self, pairs: list[Pair]) -> dict[str, Any] | None:
        """Of the pairs that were asked in both orders."""
        labeled = self.labeled
        known = [(labeled[pair.id], pair) for pair in pairs if pair.id in labeled]
        found = [(row["p_12"], row["p_21"], prompt_key(pair.prompt)) for row, pair in known]
        both = [row for row in found if None not in row]
        return position_bias(*zip(*both, strict=True)) if both else None

    def numbers(self, pairs: list[Pair]) -> LabelResults:
        """What the labels say of the labeler."""
        labeled, noted = self.labeled, self.noted
        made = sum(pair.id in labeled for pair in self.missing)
        known = [pair for pair in pairs if pair.id in labeled]
        p, human = [labeled[pair.id]["p"] for pair in known], [pair.human for pair in known]
        prompts = [prompt_key(pair.prompt) for pair in known]
        by_category: dict[str, list[Pair]] = {}
        for pair in known:
            if pair.category is not None and pair.human is not None:
                by_category.setdefault(pair.category, []).append(pair)
        return {
            "pairs": len(pairs),
            "labeled": len(labeled),
            "skipped": dict(Counter(row["skipped"] for row in self.rows.values() if row.get("skipped"))),
            "mean_confidence": sum(max(x, 1 - x) for x in p) / len(p) if p else None,
            "position_bias": self.position_bias(known),
            "mass": summarize_mass(_masses(labeled), LOW_MASS),
            "agreement": agreement(p, human, prompts),
            "agreement_by_category": {
                name: agreement(
                    [labeled[pair.id]["p"] for pair in of],
                    [pair.human for pair in of],
                    [prompt_key(pair.prompt) for pair in of],
                )
                for name, of in by_category.items()
                if any(pair.human != 0 for pair in of)
            },
            "length_preference": length_preference(
                p, human, [(len(pair.response_1), len(pair.response_2)) for pair in known], prompts
            ),
            "ece": calibration_error(p, human),
            "judge": self.key.judge,
            "labeler": self.key.labeler,
            "setup": self.key.key,
            "columns": list(self.key.columns),
            "made": made,
            "voted": sum(bool(row.get("voted")) for row in labeled.values()),
            "suspicious": count_suspicious((pair.response_1, pair.response_2) for pair in known),
            "bounded": sum("bound_12" in row or "bound_21" in row for row in labeled.values()),
            "pairs_per_second": made / noted["seconds"] if made and noted.get("seconds") else None,
            "precision": noted.get("precision"),
        }


def _together(rows: dict[str, _Rows], joined: dict[str, LabelRow]) -> _Rows:
    """A jury's labels. What it took to make them is what it took all members."""
    members = list(rows.values())
    missing = {pair.id: pair for of in members for pair in of.missing}
    seconds = sum(of.noted.get("seconds", 0.0) for of in members)
    return _Rows(members[0].key, joined, list(missing.values()), members[0].noted | {"seconds": seconds})


def _rows(context: Context, store: LabelStore, task: LabelTask, pairs: list[Pair], purpose: str = "label") -> _Rows:
    """A task's labels of these pairs (of this machine's share of them); the missing ones are made now."""
    mine = context.shard.of(pairs) if context.shard else pairs
    result = _pass(context, store, task, mine, purpose, lambda: context.judges.load(task.judge, task.prompt))
    _warn(task, result, mine)
    return result


def _pass(
    context: Context, store: LabelStore, task: LabelTask, mine: list[Pair], purpose: str, judge: Callable[[], Judge]
) -> _Rows:
    """A task's labels of these pairs; the missing ones are made now.

    Args:
        purpose: Passes over different pairs have different purposes, since a plan's file is named after it.
        judge: Loads the task's judge, if anything is missing.
    """
    key = label_key(context, task)
    missing = store.missing(key, mine)
    path = context.folder.state / artifacts.work_of("label") / artifacts.plan_of(purpose, key.key)
    plan = Plan(path, key, missing, mine)
    if missing:
        _make(context, store, task, key, plan, judge())
    return _Rows(key, store.find(key, mine), plan.pairs, plan.noted)


def _tournament(context: Context, store: LabelStore, main: LabelTask, ranking: Rankings) -> _Rows:
    """What a tournament asks, round by round, as labels of the run's own pairs. Each answer is a label of its own.

    What is asked in a round follows from the answers before it, so a run that was killed asks on where it was.
    """
    asking = replace(main.labeler, options=main.labeler.options | {"orders": "12"})
    judge = cache(lambda: context.judges.load(main.judge, main.prompt))
    missing: list[Pair] = []
    noted: dict[str, Any] = {"seconds": 0.0}
    number = 0

    def ask(questions: list[Pair]) -> dict[str, LabelRow]:
        nonlocal number
        number += 1
        task = replace(main, name=f"round {number}", labeler=asking)
        found = _pass(context, store, task, questions, f"round-{number}", judge)
        missing.extend(found.missing)
        seconds = noted["seconds"] + found.noted.get("seconds", 0.0)
        noted.update(found.noted | {"seconds": seconds})
        return found.rows

    rows = ranking.play(ask)
    result = _Rows(label_key(context, replace(main, labeler=asking)), rows, missing, noted)
    _warn(main, result, ranking.pairs)
    return result


def _make(context: Context, store: LabelStore, task: LabelTask, key: LabelKey, plan: Plan, judge: Judge) -> None:
    by_id = {pair.id: pair for pair in plan.pairs}
    done = {id for id, row in store.find(key, plan.pairs).items() if row["p"] is not None}
    labeler = context.create_labeler(task.labeler)
    title = "Labeling" if task.name == "label" else f"Labeling ({task.name})"
    bar = progress_bar(title, len(plan.pairs), len(done), "pairs")
    with counting(context, task, plan, judge) as note, bar as advance:
        for label in labeler.label(plan.pairs, judge, done):
            note()  # before the label, which may be the last one before a kill
            store.add(key, by_id[label.id], label)
            advance(1)


def _warn(task: LabelTask, result: _Rows, mine: list[Pair]) -> None:
    labeled = result.labeled
    low = sum(mass < LOW_MASS for mass in _masses(labeled))
    if low > MANY * 2 * len(labeled):
        say(
            f"Warning ({task.name}): in {low} of {2 * len(labeled)} answers the judge gave its candidates less than "
            f"{LOW_MASS:.0%} together. It may not understand the question: try another prompt, or a larger judge."
        )
    bias = result.position_bias(mine)
    if bias and bias["rate"] > MANY:
        say(
            f"Warning ({task.name}): in {bias['rate']:.0%} of the pairs the judge preferred the same position both "
            "times, whatever stood there."
        )


def _masses(labeled: dict[str, JudgedRow]) -> list[float]:
    """What the judge gave to its candidates together, of every answer."""
    both = ((row["mass_12"], row["mass_21"]) for row in labeled.values())
    return [mass for masses in both for mass in masses if mass is not None]


def _reasons(skipped: dict[str, int]) -> str:
    return "; ".join(f"{count} pairs: {reason}" for reason, count in skipped.items())


def _of_shard(context: Context, rows: _Rows, pairs: list[Pair]) -> LabelResults:
    mine = context.shard.of(pairs)
    return rows.numbers(mine) | {"shard": str(context.shard)}


def _judged_by_people(context: Context) -> list[Pair] | None:
    """The pairs of label.calibration, read and checked before the judge's first answer; None without the key."""
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
    pairs: list[Pair],
    labeled: dict[str, JudgedRow],
    judged: list[Pair] | None,
) -> tuple[Calibration | None, dict[str, Any] | None]:
    """Fit to what people judged; report before and after, on it and on the run's own pairs.

    The fit is None where cross-validation does not show that it helps.
    """
    if judged is None:
        return None, None
    own = {pair_key(pair) for pair in pairs}
    rows = _of_judged(context, store, tasks, jury, judged)
    known = [pair for pair in judged if pair.id in rows]
    observed, human = [rows[pair.id] for pair in known], [pair.human for pair in known]
    found: dict[str, Any] = {"used": False, "pairs": len(known)}
    found["shared_with_run"] = sum(pair_key(pair) in own for pair in known)
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
            "run": _on_run(fitted, pairs, labeled, {pair_key(pair) for pair in known}),
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
    """The labels of what people judged: the main labeler's, or a jury's."""
    rows = {}
    for task in tasks if jury else tasks[:1]:
        name = "calibration" if task is tasks[0] else f"calibration of {task.name}"
        rows[task.name] = _rows(context, store, replace(task, name=name), judged, "calibration")
    final = next(iter(rows.values()))
    if jury is not None:
        ids = [pair.id for pair in judged]
        final = _together(rows, jury.joined({name: of.rows for name, of in rows.items()}, ids))
    return final.labeled


def _why_unused(crossed: dict[str, Any] | None) -> str | None:
    """The one-standard-error rule (Breiman et al. 1984): a fit costs something, so its gain must not be mere noise."""
    if crossed is None:
        return "all judged pairs are of one prompt, so it cannot be cross-validated"
    if crossed["gain"] > crossed["standard_error"]:
        return None
    before, after = (crossed[when]["log_loss"] for when in ("before", "after"))
    return (
        f"cross-validation does not show that it helps (log-loss {before:.3f} before, {after:.3f} after, "
        f"standard error of the difference {crossed['standard_error']:.3f})"
    )


def _on_run(fitted: Calibration, pairs: list[Pair], labeled: dict[str, JudgedRow], seen: set[str]) -> dict[str, Any]:
    """What a calibration makes of the run's own pairs that people judged, without those that it was fitted to."""
    unseen = [p for p in pairs if p.id in labeled and p.human in (1, 2) and pair_key(p) not in seen]
    human, prompts = [p.human for p in unseen], [prompt_key(p.prompt) for p in unseen]
    before, after = [labeled[p.id]["p"] for p in unseen], [fitted.apply(labeled[p.id]) for p in unseen]
    return {
        when: {"agreement": agreement(p, human, prompts), "ece": calibration_error(p, human)}
        for when, p in (("before", before), ("after", after))
    }


def _comparison(rows: dict[str, _Rows], pairs: list[Pair]) -> dict[str, Any]:
    """Each labeler's numbers, and whether it agrees with people more or less often than the first."""
    first = next(iter(rows.values())).labeled
    table = {}
    for name, one in rows.items():
        numbers, labeled = one.numbers(pairs), one.labeled
        common = [p for p in pairs if p.id in labeled and p.id in first and p.human in (1, 2)]
        table[name] = {k: dict(numbers)[k] for k in _COMPARED} | {
            "against_first": compare_agreement(
                [labeled[p.id]["p"] for p in common],
                [first[p.id]["p"] for p in common],
                [p.human for p in common],
            )
        }
    return table


_COMPARED = ("labeler", "judge", "labeled", "agreement", "position_bias", "mass", "ece", "pairs_per_second")
