"""RLOO and GRPO in several processes. Run as a script (tests/ on PYTHONPATH), this is one of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from helpers.processes import write_result
from helpers.recipes import write_recipe
from helpers.rewards import even_share
from trl_rlaif import distributed
from trl_rlaif.data import load_prompts
from trl_rlaif.models.sharding import is_shared_out
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.work.grpo_rloo import build_trainer
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import parse_recipe

TRAINERS = {"rloo": (RLOOTrainer, RLOOConfig), "grpo": (GRPOTrainer, GRPOConfig)}
NONE = {"sample": None, "label": None, "reward": None, "evaluate": None, "report": None}
SETTINGS = {
    "rewards": ["helpers.rewards:even_share"],
    "num_generations": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,  # for the whole run: each of two processes takes 2 x 2 responses per step
    "total_episodes": 24,
    "kl_coef": 0.1,
    "learning_rate": 1e-2,
    "save_strategy": "no",
}
REHEARSED = {"selectors": [{"selective_rehearsal": {"clusters": 2, "per_cluster": 2}}], "rehearsal_coef": 2.0}


def _seen(trainer: Any, parameters: Any) -> dict[str, Any]:
    logged = [row for row in trainer.state.log_history if "reward" in row]
    kept = {name.replace(".policy.", ".").replace(".default.", "."): p.detach().clone() for name, p in parameters}
    return {"metrics": logged, "parameters": {name: value for name, value in kept.items() if "lora_" in name}}


def _context(folder: Path, model: str, **sections: Any) -> Context:
    distributed.wait()  # no process still reads the files rewritten below
    if distributed.is_first():
        folder.mkdir(exist_ok=True)
        write_recipe(folder, model, **NONE | sections)
    distributed.wait()
    recipe = parse_recipe(folder / "recipe.yaml", registry=installed_plugins().registry)
    return Context(recipe, RunFolder(folder / "out"), installed_plugins())


def ours(folder: Path, model: str, algorithm: str, **rl: Any) -> dict[str, Any]:
    """Three steps of a recipe's trainer."""
    set_seed(7)
    trainer, _, _ = build_trainer(_context(folder, model, rl=SETTINGS | rl | {"algorithm": algorithm}))
    scorer = trainer.scorer
    if scorer.selection.selectors:
        scorer.selection.take(scorer.selection.choose(0))
        trainer.train_dataset = scorer.selection.prompts
    trainer.train()
    found = _seen(trainer, ((n, p) for n, p in scorer.shared.peft.named_parameters() if ".policy." in n))
    return found | {
        "pairs": [pair.response for pair in scorer.rehearsal.pairs],
        "shared_out": is_shared_out(trainer.model),
    }


def plain_trainer(context: Context, folder: Path, algorithm: str, **options: Any) -> Any:
    """TRL's own trainer on a recipe's prompts and model."""
    trainer_class, config_class = TRAINERS[algorithm]
    prompts = [p.prompt for p in load_prompts(str(folder / "train.jsonl"), category="category").items]
    model = context.recipe.model.path
    set_seed(7)
    return trainer_class(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=[even_share],
        args=config_class(
            str(folder / "plain"), beta=0.1, num_generations=2, max_completion_length=8, seed=7, bf16=False,
            gradient_checkpointing=False, report_to="none", save_strategy="no", use_cpu=True, logging_steps=1,
            **options,
        ),
        train_dataset=Dataset.from_dict({"prompt": [context.chat(p) for p in prompts]}),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip


def plain(folder: Path, model: str, algorithm: str) -> dict[str, Any]:
    """The same with TRL's own trainer."""
    context = _context(folder, model, rl=SETTINGS | {"algorithm": algorithm})
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = plain_trainer(context, folder, algorithm, max_steps=3, learning_rate=1e-2, **sizes)
    trainer.train()
    return _seen(trainer, trainer.accelerator.unwrap_model(trainer.model).named_parameters())


def main(output: str, model: str) -> None:
    """Each process writes its results to ``output/RANK.pt``."""
    torch.set_num_threads(1)
    folder, found = Path(output), {}
    for name in TRAINERS:
        found[name] = {
            "ours": ours(folder / name, model, name),
            "plain": plain(folder / name, model, name),
            "rehearsed": ours(folder / f"{name}-rehearsed", model, name, **REHEARSED),
        }
    write_result(folder, found)


if __name__ == "__main__":
    main(*sys.argv[1:])
