"""Measures forgetting during the stage rl, on the sets of the section evaluate and as the stage evaluate does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from trl_rlaif.evaluation.forgetting import ForgettingTracker
from trl_rlaif.evaluation.judge_panel import asking, judge_of
from trl_rlaif.generation import derived_seed
from trl_rlaif.pipeline.answers import rewards_of, sources
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.stages.evaluate import longest_response
from trl_rlaif.recipe.sections import FORGET_SET

if TYPE_CHECKING:
    from transformers import Trainer

    from trl_rlaif.encoding import PromptLike
    from trl_rlaif.models.shared_model import SharedBase

# Default interval, as a fraction of the run: ten measurements, as many as checkpoints.
EVERY = 0.1


def attach(context: Context, trainer: Trainer, shared: SharedBase, **own: Any) -> ForgettingTracker | None:
    """Make a trainer measure the recipe's sets while it trains; None if the recipe does not ask for it.

    Call it after attaching the callback that writes metrics.jsonl. A separate judge model stays in memory for the run.

    Args:
        own: Arguments that ForgettingTracker needs for a trainer that is not a PPOTrainer.
    """
    section = context.recipe.evaluate
    if section is None or section.track_every == 0 or (section.track_every is None and FORGET_SET not in section.sets):
        return None
    stop = section.stop_on_forgetting

    def score(prompt_ids: list[list[int]], completion_ids: list[list[int]], **others: Any) -> list[float]:
        return rewards_of(context, shared, prompt_ids, completion_ids)

    tracker = ForgettingTracker(
        trainer,
        {name: _drawn(context, shared, name, source) for name, source in sources(context.recipe).items()},
        asking(context, judge_of(context, shared), "Judging what is forgotten", context.recipe.evaluate.judge),
        every=section.track_every or EVERY,
        score=score if "reward" in shared.heads else None,
        stop_below={} if stop is None else {FORGET_SET: 0.5 - stop},
        max_new_tokens=longest_response(context.recipe),
        batch_size=section.batch_size,
        divides=True,
        **own,
    )
    trainer.add_callback(tracker)
    return tracker


def numbers(tracker: ForgettingTracker | None) -> dict[str, Any]:
    """For the results of rl: ``forgetting`` by set, and ``stopped`` if that ended the run."""
    if tracker is None:
        return {}
    found = {"forgetting": tracker.numbers()}
    return found if tracker.stopped is None else found | {"stopped": tracker.stopped}


def _drawn(context: Context, shared: SharedBase, name: str, source: str) -> list[PromptLike]:
    """A random sample of a set's prompts, in the base's chat format and the set's order."""
    recipe = context.recipe
    length, model = longest_response(context.recipe), shared.model
    prompts, _, _ = context.encoded_prompts(source, length, model, "eval_prompts")
    if len(prompts) > recipe.evaluate.track_prompts:
        generator = np.random.default_rng(derived_seed(recipe.run.seed, "track", name))
        chosen = sorted(generator.choice(len(prompts), recipe.evaluate.track_prompts, replace=False).tolist())
        prompts = [prompts[i] for i in chosen]
    return [context.chat(prompt.prompt) for prompt in prompts]
