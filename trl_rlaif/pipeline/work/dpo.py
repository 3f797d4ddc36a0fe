"""Direct preference optimization with TRL's DPOTrainer, on the preferences that would train a reward model."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_rlaif import distributed
from trl_rlaif.algorithms import ALGORITHMS
from trl_rlaif.compat.trl_version import check_trl
from trl_rlaif.errors import UserError
from trl_rlaif.evaluation import is_even
from trl_rlaif.files import write_folder
from trl_rlaif.hardware import use_one_gpu
from trl_rlaif.models.shared_model import TRL_REFERENCE, save_adapter, set_reference
from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.preferences import TIE, preferences_of_people
from trl_rlaif.pipeline.results import RlResults
from trl_rlaif.pipeline.training import settings_of, train_from_last
from trl_rlaif.progress import say

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

_ADAPTER = "default"


def run(context: Context) -> RlResults:
    """Train ``policy/`` on ``preferences/``; return its results."""
    started = time.monotonic()
    skipped = {}
    if context.recipe.label is None:
        skipped = preferences_of_people(context, "rl")
        distributed.wait()
    trainer, ignored = build_trainer(context)
    labels = _label_facts(context, soft="p" in trainer.train_dataset.column_names)
    if not labels["soft"] and labels["mean_confidence"] < 1:
        left_out = f" {labels['ties']} of them are ties, which are left out." if labels["ties"] else ""
        say(f"rl: this loss treats soft labels as certain; rl.loss_type: [sigmoid] learns from their p.{left_out}")
        if labels["ties"]:
            skipped[TIE] = skipped.get(TIE, 0) + labels["ties"]
    if ignored:
        say(f"rl: dpo ignores {', '.join(ignored)}.")
    output = train_from_last(context, trainer, "rl", "Training the policy")
    write_folder(context.folder / artifacts.POLICY, lambda folder: _save(context, trainer, folder))
    return _numbers(trainer) | {
        "updates": trainer.state.global_step,
        "pairs": len(trainer.train_dataset),
        "loss": output.training_loss,
        "labels": labels,
        "skipped": skipped,
        "ignored": ignored,
        "seconds": time.monotonic() - started,
    }


def build_trainer(context: Context) -> tuple[DPOTrainer, list[str]]:
    """The trainer for the recipe, and the keys of the section rl that it ignores."""
    check_trl()
    from peft import PeftModel
    from trl import DPOTrainer

    from trl_rlaif.models.adapters import fitted, train_in_float32, trained_values
    from trl_rlaif.models.sharding import hand_over
    from trl_rlaif.rl.soft_dpo import SoftDPOTrainer, takes_soft_labels

    config, ignored = trainer_config(context)
    soft = takes_soft_labels(config)
    dataset = _readable(_preferences(context), soft=soft)
    if all(map(is_even, _preferences(context)["p"])):
        raise UserError(
            "Every preference is a tie, from which dpo cannot learn.",
            where=context.recipe.line(("rl",)),
            fix="Add pairs with a better response, or use another judge.",
        )
    model = context.load_base(shared_out=True)
    adapter = fitted(context.lora, model)
    if context.start is not None:
        model = PeftModel.from_pretrained(model, context.start, is_trainable=True)
        adapter = None  # the policy continues the start's adapter; TRL keeps a frozen copy as reference
    values = trained_values(model)
    with settings_of(context.recipe, "rl"):
        trainer = (SoftDPOTrainer if soft else DPOTrainer)(
            model=model,
            args=config,
            train_dataset=context.with_template_kwargs(dataset),
            processing_class=context.tokenizer,
            peft_config=adapter,
        )
    train_in_float32(trainer, values)
    if context.reference != context.start:
        set_reference(trainer.model, TRL_REFERENCE, context.reference)
    with settings_of(context.recipe, "rl"):
        hand_over(trainer)
    return trainer, ignored


def _preferences(context: Context) -> Dataset:
    from datasets import load_from_disk

    return load_from_disk(str(context.folder / artifacts.PREFERENCES))


def _label_facts(context: Context, *, soft: bool) -> dict[str, Any]:
    """Statistics of the labels for results.json; 1 - mean_confidence is their mean label smoothing."""
    p = _preferences(context)["p"]
    confidence = sum(max(x, 1 - x) for x in p) / len(p)
    return {"soft": soft, "mean_confidence": confidence, "ties": sum(map(is_even, p))}


def _readable(dataset: Dataset, *, soft: bool) -> Dataset:
    """The preferences in the trainer's format; without ties if it treats labels as hard.

    A prompt's final assistant turn is moved to the beginning of both responses. TRL would open another turn after it;
    and the log-probabilities of a shared prefix cancel in the loss.
    """
    if not soft:
        dataset = dataset.select([i for i, p in enumerate(dataset["p"]) if not is_even(p)])
    dataset = dataset.select_columns(["prompt", "chosen", "rejected", *(["p"] if soft else [])])
    begun = [not isinstance(prompt, str) and prompt[-1]["role"] == "assistant" for prompt in dataset["prompt"]]
    return dataset.map(_joined, load_from_cache_file=False) if any(begun) else dataset


def _joined(row: dict[str, Any]) -> dict[str, Any]:
    last = row["prompt"][-1]
    if last["role"] != "assistant":
        return row
    responses = {key: last["content"] + row[key][0]["content"] for key in ("chosen", "rejected")}
    turns = {key: [{"role": "assistant", "content": text}] for key, text in responses.items()}
    return {"prompt": row["prompt"][:-1], **turns}


def trainer_config(context: Context) -> tuple[DPOConfig, list[str]]:
    """The trainer's settings, and the keys of the section rl that it ignores."""
    from trl import DPOConfig

    written = dict(context.recipe.rl.config)
    for ours, theirs in ALGORITHMS["dpo"].renamed.items():
        if ours in written:
            written.setdefault(theirs, written[ours])
            del written[ours]
    known = {field.name for field in dataclasses.fields(DPOConfig) if field.init}
    ignored = sorted(set(written) - known)
    own = {key: value for key, value in written.items() if key in known}
    with settings_of(context.recipe, "rl"):
        return use_one_gpu(DPOConfig(**context.trainer_arguments("rl", own))), ignored


def _save(context: Context, trainer: DPOTrainer, folder: Path) -> None:
    save_adapter(trainer.accelerator.unwrap_model(trainer.model), _ADAPTER, folder)
    context.tokenizer.save_pretrained(str(folder))


def _numbers(trainer: DPOTrainer) -> dict[str, Any]:
    """First and last logged metrics of the implicit reward, beta * log(policy / reference)."""
    logged = [entry for entry in trainer.state.log_history if "rewards/accuracies" in entry]
    if not logged:
        return {}
    return {f"{name}_{when}": entry[f"rewards/{key}"]
            for when, entry in (("first", logged[0]), ("last", logged[-1]))
            for name, key in (("accuracy", "accuracies"), ("margin", "margins"))}  # fmt: skip
