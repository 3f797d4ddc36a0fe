"""Direct preference optimization with TRL's DPOTrainer, on the preferences that a reward model would learn from."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_rlaif import several
from trl_rlaif.artifacts import write_folder
from trl_rlaif.progress import say
from trl_rlaif.roles import save_adapter
from trl_rlaif.stages import rl
from trl_rlaif.stages.context import Context
from trl_rlaif.stages.label import preferences_of_people
from trl_rlaif.stages.sft import last_checkpoint
from trl_rlaif.trl_version import check_trl

if TYPE_CHECKING:
    from trl import DPOConfig, DPOTrainer

# DPO's beta is the price of KL to the start in the very objective that PPO maximizes (Rafailov et al. 2023, eq. 3).
_BY_ANOTHER_NAME = {"kl_coef": "beta"}
_ADAPTER = "default"


def run(context: Context) -> dict[str, Any]:
    """Train ``policy/`` on ``preferences/``; return its final numbers."""
    started = time.monotonic()
    if context.recipe.label is None:
        preferences_of_people(context, "rl")
        several.wait()
    trainer, ignored = build_trainer(context)
    if ignored:
        say(f"rl: dpo makes no use of {', '.join(ignored)}.")
    callback = context.callback("rl", "Training the policy")
    callback.attach(trainer)
    try:
        output = trainer.train(resume_from_checkpoint=last_checkpoint(trainer.args.output_dir))
    finally:
        callback.close()
    write_folder(context.folder / "policy", lambda folder: _save(context, trainer, folder))
    return _numbers(trainer) | {
        "updates": trainer.state.global_step,
        "pairs": len(trainer.train_dataset),
        "loss": output.training_loss,
        "ignored": ignored,
        "seconds": time.monotonic() - started,
    }


def build_trainer(context: Context) -> tuple[DPOTrainer, list[str]]:
    """The trainer that the recipe describes, and the keys of the recipe's section that it makes no use of."""
    check_trl()
    from datasets import load_from_disk
    from peft import PeftModel
    from trl import DPOTrainer

    from trl_rlaif.adapters import fitted

    config, ignored = _config(context)
    dataset = load_from_disk(str(context.folder / "preferences"))
    model = context.load_base()
    adapter = fitted(context.lora, model)
    if context.start is not None:
        model = PeftModel.from_pretrained(model, context.start, is_trainable=True)
        adapter = None  # the policy begins as the start's, of which TRL keeps a frozen copy as reference
    trainer = DPOTrainer(
        model=model,
        args=config,
        train_dataset=dataset.select_columns(["prompt", "chosen", "rejected"]),
        processing_class=context.tokenizer,
        peft_config=adapter,
    )
    return trainer, ignored


def _config(context: Context) -> tuple[DPOConfig, list[str]]:
    from trl import DPOConfig

    written = dict(context.recipe.rl.config)
    for ours, theirs in _BY_ANOTHER_NAME.items():
        if ours in written:
            written.setdefault(theirs, written[ours])
            del written[ours]
    known = {field.name for field in dataclasses.fields(DPOConfig) if field.init}
    ignored = sorted(set(written) - known)
    own = {key: value for key, value in written.items() if key in known}
    lean = {"gradient_checkpointing": rl.on_gpu()}
    return DPOConfig(**lean | context.trainer_arguments("rl", own)), ignored


def _save(context: Context, trainer: DPOTrainer, folder: Path) -> None:
    save_adapter(trainer.accelerator.unwrap_model(trainer.model), _ADAPTER, folder)
    context.tokenizer.save_pretrained(str(folder))


def _numbers(trainer: DPOTrainer) -> dict[str, Any]:
    """What the log says of the implicit reward, beta * log(policy / start), first and last."""
    logged = [entry for entry in trainer.state.log_history if "rewards/accuracies" in entry]
    if not logged:
        return {}
    return {f"{name}_{when}": entry[f"rewards/{key}"]
            for when, entry in (("first", logged[0]), ("last", logged[-1]))
            for name, key in (("accuracy", "accuracies"), ("margin", "margins"))}  # fmt: skip
