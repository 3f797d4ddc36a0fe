"""Supervised fine-tuning of a LoRA adapter with TRL's SFTTrainer; later stages start from it."""

from __future__ import annotations

import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_rlaif.compat.trl_version import check_trl
from trl_rlaif.data.finetuning import assistant_turns
from trl_rlaif.errors import UserError
from trl_rlaif.files import write_folder
from trl_rlaif.hardware import use_one_gpu
from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.results import SftResults
from trl_rlaif.pipeline.training import settings_of, train_from_last
from trl_rlaif.progress import say
from trl_rlaif.recipe.inputs import read_finetuning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig, SFTTrainer


def run(context: Context) -> SftResults:
    """Train ``sft/``; return its results."""
    started = time.monotonic()
    trainer = build_trainer(context)
    output = train_from_last(context, trainer, "sft", "Fine-tuning")
    write_folder(context.folder / artifacts.SFT, lambda folder: _save(trainer, folder))
    return {
        "rows": len(trainer.train_dataset),
        "loss_on": _loss_on(trainer),
        "loss": output.training_loss,
        "seconds": time.monotonic() - started,
    }


def build_trainer(context: Context) -> SFTTrainer:
    """The trainer for the recipe."""
    check_trl()
    from datasets import Dataset
    from trl import SFTTrainer

    from trl_rlaif.models.adapters import fitted, train_in_float32
    from trl_rlaif.models.sharding import hand_over

    written, tokenizer = context.recipe.sft.config, context.tokenizer
    rows, defaults = read_finetuning(context.recipe, chat=bool(tokenizer.chat_template)), {}
    chosen = {"assistant_only_loss", "completion_only_loss"} & written.keys()
    if "messages" in rows[0] and tokenizer.chat_template and not chosen:
        rows, marked = _taught(rows, context.recipe.sft.data), _marks_turns(tokenizer)
        defaults = {"assistant_only_loss": True} if marked else {}
        rows = rows if marked else assistant_turns(rows)
    base = context.load_base(shared_out=True)
    adapter, config = fitted(context.lora, base), trainer_config(context, defaults)
    with settings_of(context.recipe, "sft"):
        trainer = SFTTrainer(
            model=base,
            args=config,
            train_dataset=context.with_template_kwargs(Dataset.from_list(rows)),
            processing_class=tokenizer,
            peft_config=adapter,
        )
        train_in_float32(trainer, {})
        hand_over(trainer)
    return trainer


def trainer_config(context: Context, defaults: Mapping[str, Any] = types.MappingProxyType({})) -> SFTConfig:
    """The trainer's settings: the recipe's, over defaults that fit its data."""
    from trl import SFTConfig

    with settings_of(context.recipe, "sft"):
        arguments = context.trainer_arguments("sft", context.recipe.sft.config)
        return use_one_gpu(SFTConfig(**{**defaults, **arguments}))


def _taught(rows: list[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    """The conversations with an assistant turn: a policy is trained on these turns, not on the user's."""
    kept = [row for row in rows if assistant_turns([row])]
    if not kept:
        raise UserError("No conversation has an assistant turn.", where=source)
    if len(kept) < len(rows):
        say(f"sft: {len(rows) - len(kept)} of {len(rows)} conversations are left out: they have no assistant turn.")
    return kept


def _marks_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template, or TRL's training version of it, marks assistant turns including their end token."""
    from jinja2 import TemplateError

    try:
        from trl.chat_template_utils import (
            get_training_chat_template,
            has_generation_markers,
            is_chat_template_stop_token_trained,
        )

        marked = has_generation_markers(tokenizer.chat_template)
        template = None if marked else get_training_chat_template(tokenizer)
    except (ImportError, ValueError, TemplateError):  # an older TRL, or a template that it does not know
        return False
    return is_chat_template_stop_token_trained(tokenizer, chat_template=template)


def _loss_on(trainer: SFTTrainer) -> str:
    if trainer.args.assistant_only_loss:
        return "assistant turns"
    return "completions" if trainer.completion_only_loss else "all tokens"


def _save(trainer: Any, folder: Path) -> None:
    trainer.save_model(str(folder))
