"""An adapter for a judge: its training pairs, its training, and its evaluation on held-out pairs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trl_rlaif.components import Labeler
from trl_rlaif.data.overlap import prompt_key, split_by_group
from trl_rlaif.errors import UserError
from trl_rlaif.evaluation import agreement, calibration_error, position_bias, standard_error
from trl_rlaif.files import to_line, write_atomically, write_folder
from trl_rlaif.labels import LabelStore
from trl_rlaif.labels.store import pair_key
from trl_rlaif.memory.settings import setting
from trl_rlaif.models.shared_model import active_adapter, save_adapter
from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.inputs import BATCH
from trl_rlaif.pipeline.preferences import HUMAN_P
from trl_rlaif.pipeline.results import JudgeResults
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.training import settings_of, train_from_last
from trl_rlaif.progress import progress_bar, say
from trl_rlaif.recipe.inputs import read_judged
from trl_rlaif.teaching import Lesson, make_contrasts
from trl_rlaif.types import Label

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import TrainingArguments

    from trl_rlaif.judging.local import LocalJudge
    from trl_rlaif.teaching.trainer import JudgeTrainer

PEOPLE, LABELS, ALL = "people", "labels", "all"
# The adapter's name on the judge's model.
_ADAPTER = "judge"


def run(context: Context) -> JudgeResults:
    """Train ``judge/`` and write ``lessons.jsonl``; return whether the adapter helps."""
    started = time.monotonic()
    labeler = context.create_labeler(context.recipe.teaching_labeler)
    taught, held_out, skipped = _lessons(context, labeler)
    if not taught or not held_out:
        return _nothing_taught(context, taught, skipped) | {"seconds": time.monotonic() - started}
    judge = context.judges.untaught()
    peft = _with_adapter(context, judge)
    trainer, too_long = _trainer(context, judge, labeler, peft, taught, held_out)
    train_from_last(context, trainer, "judge", "Teaching the judge")
    peft.eval()
    before = _asked(labeler, judge, held_out, "Before", active_adapter(peft, None))
    after = _asked(labeler, judge, held_out, "After", nullcontext())
    numbers: Any = _numbers(taught, held_out, before, after)
    if not numbers["used"]:
        _warn(numbers["reason"])
    write_atomically(context.folder / artifacts.LESSONS, "".join(map(to_line, _rows(taught, held_out, before, after))))
    write_folder(context.folder / artifacts.JUDGE, lambda folder: _save(trainer, judge, folder))
    best = trainer.state.best_model_checkpoint
    return {
        "judge": judge.name,
        "labeler": context.recipe.teaching_labeler.name,
        "taught": len(taught),
        "held_out": len(held_out),
        "skipped": skipped | too_long,
        "steps": trainer.state.global_step,
        "best_step": int(best.rpartition("-")[2]) if best else None,
        **numbers,
        "seconds": time.monotonic() - started,
    }


# ---- Training pairs -------------------------------------------------------------------------------------


def _lessons(context: Context, labeler: Labeler) -> tuple[list[Lesson], list[Lesson], dict[str, int]]:
    """Training and held-out pairs, which share no prompt; and the number skipped by reason."""
    section, seed = context.recipe.judge, context.recipe.run.seed
    known, skipped = _judged(context, labeler)
    own = context.pairs() if section.contrasts else []
    prompts = [*(prompt_key(lesson.pair.prompt) for lesson in known), *(prompt_key(pair.prompt) for pair in own)]
    parts = []
    for indices, share in zip(split_by_group(prompts, section.eval_fraction, seed),
                              (1 - section.eval_fraction, section.eval_fraction), strict=True):  # fmt: skip
        responses = [own[i - len(known)] for i in indices if i >= len(known)]
        count = round(share * section.max_contrasts)
        contrasts = make_contrasts(responses, section.contrasts, count, seed) if responses else []
        made = [Lesson(pair, HUMAN_P[pair.human], pair.category) for pair in contrasts]
        parts.append([known[i] for i in indices if i < len(known)] + made)
    return parts[0], parts[1], skipped


def _nothing_taught(context: Context, taught: Sequence[Lesson], skipped: dict[str, int]) -> JudgeResults:
    """Too few pairs do not stop a run that has sampled its responses: the judge stays untaught."""
    reason = "no pair is held out" if taught else "the responses yield no contrasts, and there are no other pairs"
    _warn(reason)
    write_atomically(context.folder / artifacts.LESSONS, "")
    labeler = context.recipe.teaching_labeler.name
    return {"labeler": labeler, "taught": 0, "held_out": 0, "skipped": skipped, "used": False, "reason": reason}


def _warn(reason: str) -> None:
    say(f"Warning: the taught adapter is not used: {reason}. The judge is asked without it.")


def _judged(context: Context, labeler: Labeler) -> tuple[list[Lesson], dict[str, int]]:
    """Pairs with human choices, and pairs with another judge's stored labels; and the number skipped by reason."""
    section, found, skipped = context.recipe.judge, [], Counter[str]()
    if section.pairs:
        loaded = read_judged(context.recipe)
        skipped.update(loaded.skip_counts())
        for pair in loaded.items:
            if pair.human in HUMAN_P:
                found.append(Lesson(pair, HUMAN_P[pair.human], PEOPLE))
            else:
                skipped["tie" if pair.human == 0 else "no human choice"] += 1
    if section.labels:
        folder = RunFolder(section.labels)
        setup, columns = (folder.results_of("label").get(key) for key in ("setup", "columns"))
        store = LabelStore(folder / artifacts.LABELS)
        for pair in context.pairs(folder):
            row: Any = store.get(setup, pair_key(pair, columns or ())) or {}
            if row.get("p") is None:
                skipped["no label"] += 1
            else:
                ratings = _ratings(row, labeler) if row["labeler"] == context.recipe.teaching_labeler.name else None
                found.append(Lesson(pair, row["p"], LABELS, ratings))
    return found, dict(skipped)


def _ratings(row: dict[str, Any], labeler: Labeler) -> tuple[list[float], list[float]] | None:
    """A stored label's ratings; None unless they have one entry per candidate of the labeler."""
    both = [row.get(name) or () for name in ("ratings_1", "ratings_2")]
    return tuple(both) if {len(one) for one in both} == {len(labeler.candidates)} else None


# ---- Training -------------------------------------------------------------------------------------------


def trainer_config(context: Context) -> TrainingArguments:
    """The trainer's settings: the recipe's, and those for early stopping."""
    from transformers import TrainingArguments

    section = context.recipe.judge
    often = 1 / section.evaluations
    stopping = {
        "eval_strategy": "steps", "eval_steps": often, "save_strategy": "steps", "save_steps": often,
        "save_total_limit": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
    }  # fmt: skip
    with settings_of(context.recipe, "judge"):
        arguments = context.trainer_arguments("judge", section.config)
        rows = setting(context.recipe, "judge", BATCH[0])
        arguments.setdefault("per_device_eval_batch_size", rows)
        return TrainingArguments(**arguments | stopping | {"remove_unused_columns": False})


def _with_adapter(context: Context, judge: LocalJudge) -> PeftModel:
    """The judge's model with a new, active adapter."""
    from peft import get_peft_model

    from trl_rlaif.models.adapters import fitted
    from trl_rlaif.models.loading import keep_gradients

    config = fitted(context.lora, judge.model)
    return get_peft_model(keep_gradients(judge.model), config, adapter_name=_ADAPTER)


def _trainer(
    context: Context,
    judge: LocalJudge,
    labeler: Labeler,
    peft: PeftModel,
    taught: Sequence[Lesson],
    held_out: Sequence[Lesson],
) -> tuple[JudgeTrainer, dict[str, int]]:
    """The trainer, and the number of pairs that were too long for it."""
    from datasets import Dataset
    from transformers import EarlyStoppingCallback

    from trl_rlaif.teaching.trainer import JudgeTrainer, tokenized

    section, datasets, too_long = context.recipe.judge, [], 0
    for lessons in (taught, held_out):
        rows, left_out = tokenized(lessons, labeler, judge, section.max_length)
        if not rows:
            raise UserError(
                "Every question is longer than judge.max_length or the judge's context.",
                where=context.recipe.line(("judge",)),
                fix="Raise max_length, or give shorter responses.",
            )
        datasets.append(Dataset.from_list(rows))
        too_long += left_out
    ending = labeler.questions(taught[0].pair, judge.prompt)[0].ending
    with settings_of(context.recipe, "judge"):
        trainer = JudgeTrainer(
            peft, trainer_config(context), train_dataset=datasets[0], eval_dataset=datasets[1], labeler=labeler,
            candidates=judge.candidates(labeler.candidates, ending), pad_id=judge.pad_id,
        )  # fmt: skip
    trainer.add_callback(EarlyStoppingCallback(section.patience))
    return trainer, {"longer than max_length": too_long} if too_long else {}


def _save(trainer: JudgeTrainer, judge: LocalJudge, folder: Path) -> None:
    save_adapter(trainer.model, _ADAPTER, folder)
    judge.tokenizer.save_pretrained(str(folder))


# ---- Evaluation -----------------------------------------------------------------------------------------


def _asked(
    labeler: Labeler, judge: LocalJudge, lessons: Sequence[Lesson], when: str, role: AbstractContextManager
) -> list[Label]:
    """The labeler's labels of held-out pairs."""
    pairs = [replace(lesson.pair, id=str(i)) for i, lesson in enumerate(lessons)]
    with role, progress_bar(f"{when} teaching: held-out pairs", len(pairs), unit="pairs") as advance:
        found = {}
        for label in labeler.label(pairs, judge):
            found[label.id] = label
            advance(1)
    return [found[pair.id] for pair in pairs]


def _numbers(
    taught: Sequence[Lesson], held_out: Sequence[Lesson], before: Sequence[Label], after: Sequence[Label]
) -> dict[str, Any]:
    """Whether the adapter is used, and the metrics by source and overall."""
    counts = Counter(lesson.source for lesson in taught)
    sources = {
        name: {"taught": counts[name] or len(taught)} | _figures(held_out, before, after, name)
        for name in (ALL, *dict.fromkeys(lesson.source for lesson in (*taught, *held_out)))
    }
    kept = [i for i in range(len(held_out)) if before[i].p is not None and after[i].p is not None]
    gains = [held_out[i].loss(before[i]) - held_out[i].loss(after[i]) for i in kept]
    gain = float(np.mean(gains)) if gains else 0.0
    error = standard_error(gains, [prompt_key(held_out[i].pair.prompt) for i in kept])
    reason = None
    if error is None:
        reason = "what is held out is of a single prompt, or could not be judged"
    elif gain <= error:  # the one-standard-error rule (Breiman et al. 1984)
        reason = (
            f"on {len(kept)} held-out pairs the log-loss falls by {gain:.3f}, and the standard error of that is "
            f"{error:.3f}"
        )
    return {"sources": sources, "gain": gain, "standard_error": error, "used": reason is None, "reason": reason}


def _figures(lessons: Sequence[Lesson], before: Sequence[Label], after: Sequence[Label], source: str) -> dict[str, Any]:
    kept = [
        i for i, lesson in enumerate(lessons)
        if source in (ALL, lesson.source) and before[i].p is not None and after[i].p is not None
    ]  # fmt: skip
    better = [1 if lessons[i].p > 0.5 else 2 for i in kept]
    prompts = [prompt_key(lessons[i].pair.prompt) for i in kept]
    found: dict[str, Any] = {"held_out": len(kept)}
    for when, labels in (("before", before), ("after", after)):
        p = [labels[i].p for i in kept]
        p_12, p_21 = [labels[i].p_12 for i in kept], [labels[i].p_21 for i in kept]
        found[when] = {
            "agreement": agreement(p, better, prompts),
            "position_bias": None if None in p_12 + p_21 else position_bias(p_12, p_21, prompts),
            "ece": calibration_error(p, better),
            "log_loss": float(np.mean([lessons[i].loss(labels[i]) for i in kept])) if kept else None,
        }
    return found


def _rows(
    taught: Sequence[Lesson], held_out: Sequence[Lesson], before: Sequence[Label], after: Sequence[Label]
) -> list[dict[str, Any]]:
    def row(lesson: Lesson, **more: Any) -> dict[str, Any]:
        pair = lesson.pair
        texts = {"prompt": pair.prompt, "response_1": pair.response_1, "response_2": pair.response_2}
        ratings = dict(zip(("ratings_1", "ratings_2"), lesson.ratings or (), strict=False))
        return {**texts, "p": lesson.p, **ratings, "source": lesson.source, **more}

    said = zip(held_out, before, after, strict=True)
    return [row(lesson, held_out=False) for lesson in taught] + [
        row(lesson, held_out=True, before=first.p, after=second.p) for lesson, first, second in said
    ]
