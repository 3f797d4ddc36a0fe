"""Run folders with random adapters instead of trained ones: quick to make, for any model family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from helpers.recipes import tiny_recipe
from trl_rlaif.models.loading import ModelSpec, load_model, load_tokenizer
from trl_rlaif.models.shared_model import save_adapter
from trl_rlaif.pipeline import machine, runner
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.reward.heads import add_expected

STAGES = {"policy": "rl", "reward": "reward", "judge": "judge"}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def make_run(folder: Path, model: str, /, **sections: Any) -> RunFolder:
    """A run folder with its recipe and nothing else."""
    folder.mkdir(exist_ok=True)
    recipe = tiny_recipe(folder, model, **sections)
    run = RunFolder(folder / "out")
    runner.prepare(recipe, run, "trl-rlaif run tiny", machine.machine_of(run))
    return run


def add_trained(
    run: RunFolder, what: str, *, advantage: bool = False, quantization: str = "none", **lora: Any
) -> RunFolder:
    """Complete the stage that trains ``what``, with a random adapter and, for a reward model, a random head."""
    section, scores = run.recipe()["model"], what == "reward"
    torch.manual_seed(len(what))
    base = load_model(ModelSpec(section["path"], section["dtype"], quantization), num_labels=1 if scores else None)
    kind = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if scores else {"task_type": "CAUSAL_LM"}
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **kind, **lora}))
    if advantage:
        add_expected(model)
    _randomize(model)
    if scores:
        model.save_pretrained(run / what)
    else:
        save_adapter(model, "default", run / what)
    load_tokenizer(section["path"]).save_pretrained(run / what)
    run.begin(STAGES[what], "made by a test")
    run.complete(STAGES[what], "made by a test")
    return run


@torch.no_grad()
def _randomize(model: PeftModel) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.2)
