"""Supervised fine-tuning of a LoRA adapter with TRL's SFTTrainer: the start of everything after it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from trl_rlaif.artifacts import write_folder
from trl_rlaif.recipe.inputs import read_finetuning
from trl_rlaif.stages.context import Context
from trl_rlaif.trl_version import check_trl


def run(context: Context) -> dict[str, Any]:
    """Train ``sft/`` and return its final numbers."""
    check_trl()
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from trl_rlaif.adapters import fitted

    section = context.recipe.sft
    started = time.monotonic()
    rows = read_finetuning(context.recipe, chat=bool(context.tokenizer.chat_template))
    dataset = context.with_template_kwargs(Dataset.from_list(rows))
    arguments = context.trainer_arguments("sft", section.config)
    base = context.load_base()
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(**arguments),
        train_dataset=dataset,
        processing_class=context.tokenizer,
        peft_config=fitted(context.lora, base),
    )
    callback = context.callback("sft", "Fine-tuning")
    callback.attach(trainer)
    try:
        output = trainer.train(resume_from_checkpoint=last_checkpoint(arguments["output_dir"]))
    finally:
        callback.close()
    write_folder(context.folder / "sft", lambda folder: _save(trainer, folder))
    return {"rows": len(dataset), "loss": output.training_loss, "seconds": time.monotonic() - started}


def _save(trainer: Any, folder: Path) -> None:
    trainer.save_model(str(folder))


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint of a TRL trainer, or None."""
    from transformers.trainer_utils import get_last_checkpoint

    return get_last_checkpoint(str(folder)) if Path(folder).is_dir() else None
