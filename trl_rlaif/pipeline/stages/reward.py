"""The stage reward: a LoRA adapter with a score head, trained on the preferences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.stage import BASE, TRAINED, Amounts, Stage, previous, skipped

if TYPE_CHECKING:
    from trl_rlaif.memory.parts import MemoryRun
    from trl_rlaif.memory.plan import Part
    from trl_rlaif.pipeline.results import RewardResults
    from trl_rlaif.recipe import Recipe


class Reward(Stage):
    """A reward model, and its scores of held-out pairs."""

    name = "reward"
    outputs = (artifacts.REWARD, artifacts.REWARD_SCORES, artifacts.checkpoints_of("reward"))
    companions = (artifacts.PREFERENCES,)
    without = ("reward.packing", "reward.batch_tokens")
    trains = True
    prepares = True
    told = ("loss", "accuracy", "margin")
    # Batches of similar length: otherwise half of all tokens would be padding on mixed prompts.
    defaults = {"train_sampling_strategy": "group_by_length"}

    def settings(self, recipe: Recipe) -> tuple[str, ...]:
        return (*BASE, "model.lora", "reward", *(("rounds.earlier",) if recipe.previous else ()))

    def after(self, recipe: Recipe) -> tuple[str, ...]:
        start = ("sft",) if recipe.reward.policies else ()
        return (*start, "label" if recipe.label else "sample", previous("label"), previous("reward"))

    def summary(self, numbers: RewardResults) -> str:
        if numbers.get("accuracy") is None:
            return ""
        low, high = numbers["accuracy_interval"]
        return f"accuracy {numbers['accuracy']:.0%} on held-out pairs ({low:.0%} to {high:.0%}){skipped(numbers)}"

    def cost(self, recipe: Recipe, amounts: Amounts) -> float | None:
        response = recipe.sample.max_new_tokens if recipe.sample else amounts.tokens
        epochs = recipe.reward.config.get("num_train_epochs", 3)
        return TRAINED * epochs * amounts.pairs * (amounts.tokens + 2 * response)

    def memory(self, run: MemoryRun) -> list[Part]:
        """Each pair gives two rows, one per response."""
        from trl_rlaif.memory.parts import backward, trained

        recipe = run.recipe
        rows = 2 * run.setting("reward", "per_device_train_batch_size")
        longest = run.setting("reward", "max_length")
        if recipe.sample is not None:
            made = run.prompt + recipe.sample.max_new_tokens
            longest = made if longest is None else min(made, longest)
        length = run.within(longest or 1024)
        checkpointing = bool(run.setting("reward", "gradient_checkpointing"))
        return [
            *run.base(head=False),
            *trained(run, "reward", "adapter and head", (*run.adapter.tensors, run.shape.hidden), head=False),
            *backward(run.activations("reward"), rows, length, checkpointing),
        ]
