"""The stage rl: the policy, trained by the recipe's algorithm."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from trl_rlaif.algorithms import ALGORITHMS
from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.inputs import data_file, prompt_file
from trl_rlaif.pipeline.stage import (
    BASE,
    DRAWN,
    GROUPING,
    QUESTION,
    READING,
    TRACKING,
    TRAINED,
    Amounts,
    Stage,
    previous,
    skipped,
)
from trl_rlaif.recipe.sections import FORGET_SET

if TYPE_CHECKING:
    from trl_rlaif.memory.parts import MemoryRun
    from trl_rlaif.memory.plan import Part
    from trl_rlaif.pipeline.context import Context
    from trl_rlaif.pipeline.results import RlResults
    from trl_rlaif.recipe import Recipe


class Rl(Stage):
    """The trained policy and PPO's value model; with selectors also the rehearsed pairs and the map of the prompts."""

    name = "rl"
    outputs = (
        artifacts.POLICY,
        artifacts.VALUE,
        artifacts.REHEARSAL,
        artifacts.SELECTION_MAP,
        artifacts.checkpoints_of("rl"),
    )
    companions = (artifacts.PREFERENCES,)
    trains = True
    divides = False
    told = (
        "objective/scores",
        "objective/kl",
        "rollout/length",
        "rejection/accepted",
        "loss",
        "loss/sft",
        "rewards/accuracies",
    )

    def settings(self, recipe: Recipe) -> tuple[str, ...]:
        keys = (*BASE, *READING, *GROUPING, "model.lora", "rl")
        if ALGORITHMS[recipe.rl.algorithm].samples:
            keys += ("data.max_prompts",)
        if recipe.reward_labelers:
            keys += ("label.judge", "label.labeler", "label.criteria")
        if recipe.previous:
            keys += ("rounds.reference",)
        if self._can_stop(recipe):
            keys += (*TRACKING, "evaluate.judge", "evaluate.max_new_tokens")
        return keys

    def files(self, recipe: Recipe) -> dict[str, dict[str, str] | None]:
        section = recipe.rl
        found: dict[str, dict[str, str] | None] = {}
        if section.rehearsal:
            found["rl.rehearsal"] = data_file(section.rehearsal)
        if ALGORITHMS[section.algorithm].samples:
            found["data.prompts"] = data_file(recipe.data.prompts)
        for number, name in enumerate(section.reward_names, 1):
            place = _source_of(name.rpartition(":")[0])
            if place:
                found[f"rl.rewards {number} ({name.rpartition(':')[2]})"] = data_file(place)
        if recipe.reward_labelers:
            found["label.prompt"] = prompt_file(recipe.label.prompt if recipe.label else "general")
        if self._can_stop(recipe):
            found[f"evaluate.sets.{FORGET_SET}"] = data_file(recipe.evaluate.sets[FORGET_SET])
            found["evaluate.prompt"] = prompt_file(recipe.evaluation_prompt)
        return found

    def columns(self, recipe: Recipe) -> tuple[str, ...]:
        evaluated = ("eval_prompts",) if self._can_stop(recipe) else ()
        return ("prompts", "rehearsal", *evaluated)

    def after(self, recipe: Recipe) -> tuple[str, ...]:
        if not ALGORITHMS[recipe.rl.algorithm].samples:
            return ("sft", previous("rl"), "label" if recipe.label else "sample")
        asked = ("rl", "evaluate") if self._can_stop(recipe) else ("rl",)
        taught = ("judge", previous("judge")) if recipe.asks_taught(*asked) else ()
        reward = ("reward",) if self._uses_reward(recipe) else ()
        return ("sft", previous("rl"), *taught, *reward)

    @staticmethod
    def _can_stop(recipe: Recipe) -> bool:
        return recipe.evaluate is not None and recipe.evaluate.stop_on_forgetting is not None

    @staticmethod
    def _uses_reward(recipe: Recipe) -> bool:
        """Whether the reward model scores, or a transform uses the state of its training."""
        trained = {ref.name for ref in recipe.reward.transforms} if recipe.reward else set()
        return "reward" in recipe.rl.reward_names or bool(trained & {ref.name for ref in recipe.rl.transforms})

    def work(self, recipe: Recipe) -> Callable[[Context], Mapping[str, Any]]:
        return ALGORITHMS[recipe.rl.algorithm].runner()

    def summary(self, numbers: RlResults) -> str:
        if "pairs" in numbers:
            return f"{numbers['pairs']} pairs{skipped(numbers)}"
        if "score_first" not in numbers:
            return ""
        kl = f", KL {numbers['kl_last']:.2f}" if "kl_last" in numbers else ""  # GRPO with kl_coef: 0 does not log it
        return f"score {numbers['score_first']:+.3f} -> {numbers['score_last']:+.3f}{kl}"

    def cost(self, recipe: Recipe, amounts: Amounts) -> float | None:
        """Responses, passes without gradient, updates and judges' questions; None without sampled episodes."""
        algorithm = ALGORITHMS[recipe.rl.algorithm]
        config = {**algorithm.preset, **recipe.rl.config}
        if not algorithm.samples or not config.get("total_episodes"):
            return None
        response = config.get("response_length", 53)
        row, trained = amounts.tokens + response, 1 if algorithm.groups or config.get("value") == "trunk" else 2
        passes = 3 + TRAINED * trained * config.get("num_ppo_epochs", 1 if algorithm.groups else 4)
        asked = len(recipe.reward_labelers) * (row + QUESTION)
        return config["total_episodes"] * (amounts.tokens + DRAWN * response + passes * row + asked)

    def memory(self, run: MemoryRun) -> list[Part]:
        """As for PPO on one base: generation, passes without gradient, update."""
        from trl_rlaif.memory.parts import judging, policy_training

        recipe = run.recipe
        parts = policy_training(run)
        if ALGORITHMS[recipe.rl.algorithm].config:
            run.notes.append(
                f"rl.algorithm: {recipe.rl.algorithm} is planned as PPO on the same base; TRL's trainer may differ."
            )
        if recipe.reward_labelers:
            parts += judging(run, recipe.label.judge if recipe.label else "same", alone=False)
        functions = [name for name in recipe.rl.reward_names if ":" in name]
        if functions:
            run.notes.append(f"What {', '.join(functions)} needs on the GPU is not counted.")
        return parts


def _source_of(place: str) -> str | None:
    """The file of a reward function's ``path/to/file.py`` or ``package.module``; None if there is none."""
    if place.endswith(".py"):
        return place
    try:
        found = importlib.util.find_spec(place) if place else None
    except (ImportError, ValueError):
        found = None
    return found.origin if found is not None and found.has_location else None
