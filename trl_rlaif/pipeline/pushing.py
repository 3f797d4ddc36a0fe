"""``push_to_hub`` in a recipe: pushes trained models at the end of a run, with the results on the model card."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trl_rlaif.distributed import is_first
from trl_rlaif.errors import RunError, UserError
from trl_rlaif.models.loading import hub_id
from trl_rlaif.progress import say
from trl_rlaif.recipe import Recipe

if TYPE_CHECKING:
    from trl_rlaif.pipeline.trained import What

_SECTIONS: dict[str, What] = {"judge": "judge", "reward": "reward", "rl": "policy"}


def check_pushes(recipe: Recipe) -> None:
    """Reject, before any computation, pushes that others could not load.

    Raises:
        UserError: The base is a local model, or the recipe compares variants.
    """
    for section in _asking(recipe):
        where = recipe.line((section, "push_to_hub"))
        if recipe.variants:
            fix = "Leave it out; `trl-rlaif export RUN/variants/NAME --to hub` pushes one."
            raise UserError("The variants of a comparison are not pushed.", where=where, fix=fix)
        model = recipe.judge.model if section == "judge" and recipe.judge else "same"
        path = recipe.model.path if isinstance(model, str) else model.path
        if hub_id(path) is None:
            raise UserError(
                f"The adapter needs the base {path}, which others do not have.",
                where=where,
                fix="Leave it out; `trl-rlaif export --to hub` pushes with --base or --merge.",
            )


def push_asked(recipe: Recipe, folder: Path, only: Collection[str] = ()) -> None:
    """Push the models whose sections set ``push_to_hub``.

    Args:
        recipe: The completed run's recipe.
        folder: The run's folder.
        only: The stages that were run; empty for all.

    Raises:
        UserError, RunError: As in ``export_model``.
    """
    asking = [*_asking(recipe)] if is_first() else []
    if asking:
        from trl_rlaif.export import ExportOptions, export_model
    for section in asking:
        if only and section not in only:
            continue
        config, what = getattr(recipe, section).config, _SECTIONS[section]
        repo = config.get("hub_model_id") or f"{recipe.run.name}-{what}"
        options = ExportOptions(repo=repo, public=config.get("hub_private_repo") is False)
        try:
            found = export_model(folder, what, options)
        except RunError as error:
            fix = f"The run is complete. Push it with: trl-rlaif export {folder} --what {what} --to hub --repo {repo}"
            raise RunError(error.problems[0].what, where=error.problems[0].where, fix=fix) from error
        say(f"{what}: {found.url}")


def _asking(recipe: Recipe) -> Iterator[str]:
    sections = ((name, getattr(recipe, name)) for name in _SECTIONS)
    return (name for name, section in sections if section is not None and section.config.get("push_to_hub"))
