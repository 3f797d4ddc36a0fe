"""The sections ``reward`` and ``rl``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from trl_rlaif.algorithms import ALGORITHMS
from trl_rlaif.recipe.formatting import shown
from trl_rlaif.recipe.sections.values import Component, DataPath, Named, Number, Reward, Section, Text

# Keys of ``rl`` that decide when failing rewards stop a run, and do not affect training. A stopped run may be resumed
# with other values.
STOPPING_LIMITS = ("max_failed", "reward_timeout")


def one_weight(value: str | dict[str, float]) -> str | dict[str, float]:
    """Reject an entry of ``rl.rewards`` that names several rewards, or none."""
    if isinstance(value, dict) and len(value) != 1:
        raise ValueError("Write each reward as an entry of its own: [{reward: 1.0}, {direct: 0.5}].")
    return value


def reward_name(entry: Any) -> Any:
    """The reward that an entry of ``rl.rewards`` names: ``name`` or ``{name: weight}``."""
    return next(iter(entry)) if isinstance(entry, dict) and len(entry) == 1 else entry


def reward_weight(entry: str | dict[str, float]) -> float:
    """The weight of an entry of ``rl.rewards``."""
    return 1.0 if isinstance(entry, str) else next(iter(entry.values()))


def distinct_rewards(entries: list[str | dict[str, float]]) -> list[str | dict[str, float]]:
    """Reject a reward that is listed twice: each has one weight."""
    weights: dict[str, list[float]] = {}
    for entry in entries:
        weights.setdefault(reward_name(entry), []).append(reward_weight(entry))
    for name, given in weights.items():
        if len(given) > 1:
            raise ValueError(f"{shown(name)} is listed {len(given)} times. Write it once: {{{name}: {sum(given):g}}}.")
    return entries


def some_weight(entries: list[str | dict[str, float]]) -> list[str | dict[str, float]]:
    """Reject weights with which every score would be 0."""
    if not any(map(reward_weight, entries)):
        raise ValueError(
            "Every reward has the weight 0, which only logs it. Give at least one of them another weight: "
            f"[{{{reward_name(entries[0])}: 1.0}}]."
        )
    return entries


class RewardSection(Section):
    """``reward``: train the reward model. Accepts the other keys of RewardConfig."""

    transforms: list[Component] = Field(default_factory=list, description="Reward transforms, in order.")
    eval_fraction: Number = Field(0.1, ge=0, le=0.9, description="Fraction of the preferences held out, by prompt.")
    policies: list[Annotated[Text, Named("policy")]] = Field(
        default_factory=list,
        description="Other policies that wrote the responses: adapter folders, or 'base'. Their likelihoods give the "
        "importance weights of 'advantage'.",
    )
    packing: bool | None = Field(
        None, description="Compute a pair as one row with a shared prompt; null: if the model supports it."
    )
    batch_tokens: int = Field(8192, ge=1, description="Tokens of packed pairs per forward pass.")
    config: dict[str, Any] = Field(default_factory=dict, description="Fields of trl.RewardConfig.")


class RlSection(Section):
    """``rl``: reinforcement learning. Accepts the other keys of PPOConfig, and those of TRL's
    configuration if ``algorithm`` is one of TRL's trainers."""

    algorithm: Literal[tuple(ALGORITHMS)] = Field(  # type: ignore[valid-type]
        "ppo",
        description="'reinforce' is PPO with one pass over each batch and no clipped ratio (Lee et al. 2023); other "
        "keys override its presets. 'rloo' and 'grpo' are TRL's trainers with the rewards, transforms and selectors of "
        "this section. 'rejection_sampling' fine-tunes on the responses that the selectors accept (Dong et al. 2023): "
        "num_train_epochs iterations with num_ppo_epochs passes each. 'dpo' is TRL's "
        "DPOTrainer on the preferences (Rafailov et al. 2023): no rewards, no sampling; its beta is kl_coef.",
    )
    rewards: Annotated[
        list[Annotated[Reward | dict[Reward, Number], AfterValidator(one_weight)]],
        AfterValidator(distinct_rewards),
        AfterValidator(some_weight),
    ] = Field(
        default_factory=lambda: ["reward"], min_length=1,
        description="Sources of reward: 'reward' (the reward model), a labeler such as 'direct' or 'rubric' (the "
        "judge), or module:function; with weights: [{reward: 1.0}, {direct: 0.5}]. Weight 0 only logs a reward.",
    )  # fmt: skip
    labelers: list[Component] = Field(
        default_factory=list,
        description="Options of labelers in rewards, such as [{rubric: {column: checks}}]; else label.labeler's.",
    )
    transforms: list[Component] = Field(default_factory=list, description="Reward transforms, in order.")
    selectors: list[Component] = Field(default_factory=list, description="Data selectors, in order.")
    rehearsal: DataPath | None = Field(
        None,
        description="Your own prompts and completions to rehearse: a file, a folder or a Hub id.",
    )
    config: dict[str, Any] = Field(default_factory=dict, description="Fields of PPOConfig.")

    @property
    def reward_names(self) -> list[str]:
        """The rewards without their weights."""
        return [reward_name(entry) for entry in self.rewards]

    @property
    def reward_weights(self) -> list[float] | None:
        """Their weights, in PPOConfig's order: the reward model first. None if the recipe has none."""
        if all(isinstance(entry, str) for entry in self.rewards):
            return None
        entries = sorted(self.rewards, key=lambda entry: reward_name(entry) != "reward")
        return [reward_weight(entry) for entry in entries]
