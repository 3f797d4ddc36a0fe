"""Checks a recipe against the configuration of its base model, without loading weights."""

from __future__ import annotations

from collections.abc import Iterator

from trl_rlaif.errors import Problem, UserError
from trl_rlaif.models.known import known_config
from trl_rlaif.models.loading import resolved
from trl_rlaif.recipe.parsing import Recipe


def check_base(recipe: Recipe) -> bool:
    """Check that the recipe's adapters and lengths fit its base model, without loading weights.

    A base whose configuration is not available locally is not checked: a Hub id without a network, a GGUF file that was
    never loaded (reading its configuration requires converting the whole model).

    Returns:
        Whether the configuration could be read.

    Raises:
        UserError: Its package or file is missing, transformers has no causal language model of this type, a length
            exceeds its context, or the adapters do not fit it.
    """
    path = resolved(recipe.model.path)
    if path is None:
        return False
    from transformers import AutoConfig  # the slower imports follow only if they are needed

    try:
        config = known_config(path) or AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError):
        return False
    _check_lengths(recipe, getattr(config.get_text_config(), "max_position_embeddings", None))
    import torch
    from transformers import AutoModelForCausalLM

    from trl_rlaif.models.adapters import fitted, lora_config

    if type(config) not in AutoModelForCausalLM._model_mapping:
        if "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
            return True
        raise UserError(
            f"transformers has no causal language model of the kind '{config.model_type}'.",
            where=recipe.line(("model", "path")),
            fix="Name a model that AutoModelForCausalLM loads.",
        )
    if not any(r.sft or r.reward or r.rl for r in (recipe, *recipe.variants.values())):
        return True
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    try:
        fitted(lora_config(recipe.model.lora), model)
    except UserError as error:
        problem = error.problems[0]
        where = recipe.line(("model", "lora", "target_modules"))
        raise UserError(problem.what, where=where, fix=problem.fix) from None
    return True


def _check_lengths(recipe: Recipe, context: int | None) -> None:
    """Check that responses leave room for a prompt in the model's context, in tokens."""
    problems = [
        Problem(
            f"'{key}' in section '{section}' is {length}; the model's context has {context} tokens in all.",
            each.line((section, key)),
            "Leave room for the prompt.",
        )
        for each in recipe.variants.values() or [recipe]
        for section, key, length in _lengths(each)
        if context is not None and length is not None and length >= context
    ]
    if problems:
        raise UserError.from_problems(list(dict.fromkeys(problems)))


def _lengths(recipe: Recipe) -> Iterator[tuple[str, str, int | None]]:
    if recipe.sample:
        yield "sample", "max_new_tokens", recipe.sample.max_new_tokens
    if recipe.rl:
        yield "rl", "response_length", recipe.rl.config.get("response_length")
        yield "rl", "max_completion_length", recipe.rl.config.get("max_completion_length")
    if recipe.evaluate:
        yield "evaluate", "max_new_tokens", recipe.evaluate.max_new_tokens
