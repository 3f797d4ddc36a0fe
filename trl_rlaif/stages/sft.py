"""Supervised fine-tuning of a LoRA adapter with TRL's SFTTrainer: the start of everything after it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from trl_rlaif.artifacts import write_folder
from trl_rlaif.data import load_rows
from trl_rlaif.errors import UserError
from trl_rlaif.stages.context import Context
from trl_rlaif.trl_version import check_trl

_FORMATS = ({"messages"}, {"prompt", "completion"}, {"text"})


def run(context: Context) -> dict[str, Any]:
    """Train ``sft/`` and return its final numbers."""
    check_trl()
    from trl import SFTConfig, SFTTrainer

    from trl_rlaif.adapters import fitted

    section = context.recipe.sft
    started = time.monotonic()
    dataset = _dataset(section.data)
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


def _dataset(source: str) -> Any:
    from datasets import Dataset

    rows = load_rows(source)
    columns = set(rows[0])
    wanted = next((form for form in _FORMATS if form <= columns), None)
    if wanted is None:
        raise UserError(
            f"Fine-tuning data needs 'messages', 'prompt' and 'completion', or 'text'; this has "
            f"{', '.join(sorted(columns))}.",
            where=source,
        )
    bad = [i for i, row in enumerate(rows, 1) if not all(row.get(column) for column in wanted)]
    if bad:
        raise UserError(f"{len(bad)} rows lack {' or '.join(sorted(wanted))}; the first is row {bad[0]}.", where=source)
    return Dataset.from_list([{column: row[column] for column in wanted} for row in rows])


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint of a TRL trainer, or None."""
    from transformers.trainer_utils import get_last_checkpoint

    return get_last_checkpoint(str(folder)) if Path(folder).is_dir() else None
