"""Prepares the section rl for its trainers: settings, prompts, rewards, selectors; and the results they share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_rlaif.algorithms import ALGORITHMS
from trl_rlaif.files import write_atomically
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.pipeline.artifacts import REHEARSAL, SELECTION_MAP
from trl_rlaif.pipeline.named_functions import load_function
from trl_rlaif.pipeline.training import settings_of
from trl_rlaif.recipe import prompt_folder
from trl_rlaif.recipe.inputs import read_rehearsal
from trl_rlaif.validation import Origin, tagged

if TYPE_CHECKING:
    from datasets import Dataset

    from trl_rlaif.models.shared_model import SharedBase
    from trl_rlaif.pipeline.context import Context
    from trl_rlaif.recipe import Recipe
    from trl_rlaif.rl.ppo.config import PPOConfig

# Checkpoints per run if the recipe sets no save_steps: a kill loses at most a tenth of the updates.
_SAVES = 10


def config(context: Context) -> PPOConfig:
    """PPO's settings: the recipe's, over its algorithm's preset and defaults for this run."""
    from trl_rlaif.rl.ppo.config import PPOConfig

    section = context.recipe.rl
    known = {field.name for field in dataclasses.fields(PPOConfig)}
    # PPOConfig lacks the keys of the GRPO and RLOO trainers.
    written = {key: value for key, value in section.config.items() if key in known}
    arguments = dict(ALGORITHMS[section.algorithm].preset) | context.trainer_arguments("rl", written) | saving(written)
    # The default, as in TRL, is no stop token; a policy that should learn to stop needs one.
    if not {"stop_token_id", "stop_tokens"} & set(arguments):
        arguments.setdefault("stop_token", "eos")
    model = context.recipe.model
    defaults = {"num_sample_generations": 0, "reasoning": model.reasoning, "reasoning_tags": model.reasoning_tags}
    with settings_of(context.recipe, "rl"):
        return PPOConfig(**defaults | arguments, reward_weights=section.reward_weights)


def saving(written: dict[str, Any]) -> dict[str, Any]:
    """When to save, if the recipe does not say: a kill loses at most a tenth of the updates."""
    if "save_strategy" in written:
        return {}
    defaults = {"save_steps": 1 / _SAVES, "save_total_limit": 2}
    return {"save_strategy": "steps"} | {key: value for key, value in defaults.items() if key not in written}


def prompts(context: Context, base: Any, room: int) -> tuple[Dataset, dict[str, int]]:
    """The prompts that leave room for a response of ``room`` tokens, and the number skipped by reason."""
    from datasets import Dataset

    found, tokens, skipped = context.encoded_prompts(context.recipe.data.prompts, room, base)
    rows = [
        {"id": p.id, "prompt": context.chat(p.prompt), "category": p.category, "input_ids": ids}
        for p, ids in zip(found, tokens, strict=True)
    ]
    extra = set.intersection(*(set(p.extra) for p in found)) | _columns_read(context)
    for row, prompt in zip(rows, found, strict=True):
        row |= {name: prompt.extra.get(name) for name in extra - row.keys()}
    return Dataset.from_list(rows), skipped


def _columns_read(context: Context) -> set[str]:
    """Columns that labelers among the rewards read; a prompt may lack them."""
    section = context.recipe.label
    prompt = JudgePrompt.load(prompt_folder(section.prompt if section else "general"))
    labelers = map(context.create_labeler, context.recipe.reward_labelers.values())
    return {name for labeler in labelers for name in labeler.columns(prompt)}


def rehearsal_dataset(context: Context) -> Dataset | None:
    from datasets import Dataset

    if context.recipe.rl.rehearsal is None:
        return None
    rows = read_rehearsal(context.recipe, chat=bool(context.tokenizer.chat_template))
    return Dataset.from_list([{"prompt": context.chat(row["prompt"]), "completion": row["completion"]} for row in rows])


def selectors(context: Context) -> list[Any]:
    """The recipe's data selectors."""
    return [context.create("data_selector", ref) for ref in context.recipe.rl.selectors]


def reward_functions(context: Context, shared: SharedBase) -> list[Any]:
    """All rewards except the reward model."""
    return [reward_function(context, name, shared) for name in context.recipe.rl.reward_names if name != "reward"]


def reward_function(context: Context, name: str, shared: SharedBase) -> Any:
    """The reward of a function or a labeler; a judge with the same model is the base without an adapter."""
    labelers = context.recipe.reward_labelers
    if name not in labelers:
        where = context.recipe.line(("rl", "rewards", context.recipe.rl.reward_names.index(name)))
        place, _, attribute = name.rpartition(":")
        origin = Origin(f"reward function '{attribute}' of {place}", where)
        with origin.blamed("its import"):
            return tagged(load_function(name), origin)
    section = context.recipe.label
    judge, prompt = (section.judge, section.prompt) if section else ("same", "general")
    labeler = context.create_labeler(labelers[name])
    labeler.judge = context.judges.load(judge, prompt, shared)
    return labeler


def keep_selection(context: Context, folder: Path) -> None:
    """Copy the rehearsed pairs and the map of the prompts out of the checkpoint folder."""
    for name in (REHEARSAL, SELECTION_MAP):
        found = folder / name
        if found.exists():
            write_atomically(context.folder / name, found.read_text(encoding="utf-8"))


def gpu_memory(recipe: Recipe) -> dict[str, Any]:
    """The stage's peak allocated GPU memory in bytes, predicted by `trl-rlaif memory` and measured; {} without CUDA."""
    import torch

    from trl_rlaif.memory import plan_memory

    if not torch.cuda.is_available():
        return {}
    plan = plan_memory(recipe)
    predicted = max(plan.predict(phase, stage) for stage, phase in plan.phases() if stage == "rl")
    return {"gpu_memory": {"predicted": predicted, "measured": torch.cuda.max_memory_allocated()}}


def of_rewards(history: list[dict[str, float]], unscored: int) -> dict[str, Any]:
    """Number of responses without a reward; and for each reward its weight, first and last mean, and last std."""
    found: dict[str, dict[str, float]] = {}
    for entry in history:
        for name in (key.removeprefix("score/") for key in entry if key.startswith("score/")):
            if f"rewards/{name}/std" not in entry:  # an update logged by an earlier version
                continue
            mean, std, weight = entry[f"score/{name}"], entry[f"rewards/{name}/std"], entry[f"rewards/{name}/weight"]
            found.setdefault(name, {"weight": weight, "mean_first": mean}).update(mean_last=mean, std_last=std)
    return {"unscored": unscored, "rewards": found}
