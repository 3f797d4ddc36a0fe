"""Commands that list recipes, components and keys, compare runs, write a first recipe and check the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from trl_rlaif.errors import UserError
from trl_rlaif.terminal import echo

app = typer.Typer()
recipes_app = typer.Typer(help="The recipes that come with the package.")


@recipes_app.callback(invoke_without_command=True)
def list_recipes(context: typer.Context) -> None:
    """List the recipes that come with the package."""
    if context.invoked_subcommand is not None:
        return
    from trl_rlaif.recipe import packaged_recipes

    for name, path in packaged_recipes().items():
        first = path.read_text(encoding="utf-8").splitlines()[0]
        echo(f"{name:<24}{first.lstrip('# ')}")


@recipes_app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="The recipe's name.")]) -> None:
    """Print a packaged recipe, to save and edit."""
    from trl_rlaif.recipe import packaged_recipes

    found = packaged_recipes()
    if name not in found:
        raise UserError(f"There is no packaged recipe '{name}'.", fix=f"There are: {', '.join(found)}.")
    echo(found[name].read_text(encoding="utf-8"), nl=False)


@app.command()
def plugins(
    name: Annotated[str | None, typer.Argument(help="List only components of this name.")] = None,
) -> None:
    """List the installed components: kind, name, distribution, version and options."""
    from trl_rlaif.errors import Problem
    from trl_rlaif.plugins import build_plugins, plugin_points
    from trl_rlaif.recipe.formatting import nearest_or_all

    broken: list[Problem] = []
    registry = [*build_plugins(plugin_points(), broken).registry]
    chosen = [found for found in registry if name in (None, found.name)]
    if not chosen and name is not None:
        names = sorted({found.name for found in registry})
        broken.insert(0, Problem(f"no component is called '{name}'.", "", nearest_or_all(name, names, "Installed")))
    for found in chosen:
        echo(f"{found.kind:<18}{found.name:<24}{found.distribution} {found.version}")
        for option, field in found.component.Options.model_fields.items():
            default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}"
            echo(f"    {option}: {default}. {field.description or ''}".rstrip())
    if broken:
        raise UserError.from_problems(broken)


def _schema() -> dict[str, Any]:
    from trl_rlaif.pipeline.stages import STAGES
    from trl_rlaif.plugins import installed_plugins
    from trl_rlaif.recipe.schema import recipe_schema

    return recipe_schema(installed_plugins().registry, {name: stage.defaults for name, stage in STAGES.items()})


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for completion and validation in editors."""
    import json

    echo(json.dumps(_schema(), indent=1))


@app.command()
def explain(
    key: Annotated[str, typer.Argument(help="Such as rl.kl_coef, label, or rl.transforms.advantage.margin.")],
) -> None:
    """Explain a recipe key: meaning, type, range and default."""
    from trl_rlaif.recipe.explaining import explain

    echo(explain(_schema(), key))


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="The folders of two runs or more.")],
    output: Annotated[Path | None, typer.Option(help="Write an HTML page, too, with curves and responses.")] = None,
) -> None:
    """Put finished runs side by side: settings that differ, win rates, and their difference on shared prompts."""
    from trl_rlaif.experiments.runs import compare_runs, described

    if output is not None and output.suffix != ".html":
        raise UserError("The page is HTML.", where=str(output), fix="Name a file that ends in .html.")
    comparison = compare_runs(folders)
    for line in described(comparison):
        echo(line)
    if output is not None:
        from trl_rlaif.report.build import write_comparison

        write_comparison(comparison, output)
        echo(f"Page: {output}")


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The new recipe.")] = Path("my_recipe.yaml"),
    model: Annotated[str | None, typer.Option(help="A Hub id, a folder, or package:NAME.")] = None,
    data: Annotated[str | None, typer.Option(help="Prompts to train on: a file or a dataset's Hub id.")] = None,
    gpu: Annotated[int | None, typer.Option(min=0, help="Memory of the card in GB; 0 for none.")] = None,
    goal: Annotated[Literal["labels", "dpo", "ppo", "grpo"] | None, typer.Option(help="What to produce.")] = None,
) -> None:
    """Write a first recipe that fits your card; asks four questions, or takes the answers as options."""
    import sys

    from trl_rlaif.plugins import installed_plugins
    from trl_rlaif.starting import GOALS, Answers, start

    if None in (model, data, gpu, goal) and not sys.stdin.isatty():
        fix = "Set --model, --data, --gpu and --goal."
        raise UserError("There is no terminal to ask questions on.", fix=fix)
    model = model or typer.prompt("Model (a Hub id or a folder)", default="Qwen/Qwen2.5-0.5B-Instruct", err=True)
    data = data or typer.prompt("Prompts (a file or a Hub id)", err=True)
    gpu = typer.prompt("Memory of the GPU in GB (0 for none)", type=int, default=8, err=True) if gpu is None else gpu
    if goal is None:
        for name, meaning in GOALS.items():
            echo(f"  {name:<8}{meaning}", err=True)
    while goal not in GOALS:
        goal = typer.prompt("Goal", default="ppo", err=True)
    for line in start(Answers(model, data, gpu, goal), path, installed_plugins()):
        echo(line)


@app.command()
def doctor(
    folder: Annotated[Path, typer.Argument(help="Folder that runs are written to.")] = Path("runs"),
) -> None:
    """Check this machine for a run: packages, plugins, device, memory, disks and the Hub, with advice."""
    from trl_rlaif.doctor import examine, report

    for line in report(examine(folder)):
        echo(line)
