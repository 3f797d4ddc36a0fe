"""The command `trl-rlaif`: arguments and exit codes."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from trl_rlaif import __version__, distributed, interrupts
from trl_rlaif.cli_lists import app as lists_app
from trl_rlaif.cli_lists import recipes_app
from trl_rlaif.errors import Interrupted, TrlRlaifError, UserError
from trl_rlaif.quiet import quiet_libraries
from trl_rlaif.terminal import echo, escaped

if TYPE_CHECKING:
    from trl_rlaif.plugins import Plugins
    from trl_rlaif.recipe import Recipe

app = typer.Typer(
    help="Align language models with AI feedback.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(recipes_app, name="recipes")
app.add_typer(lists_app)

RecipeArgument = Annotated[str, typer.Argument(help="Path of a recipe, or name of a packaged one.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key: --set rl.kl_coef=0.1 (repeatable).")
]
FolderArgument = Annotated[Path, typer.Argument(help="Folder of a run.")]


def _version(asked: bool) -> None:
    if asked:
        echo(f"trl-rlaif {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Align language models with AI feedback."""
    context.obj = {"debug": debug}


@app.command()
def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    output: Annotated[Path | None, typer.Option(help="The run's folder. Default: runs/NAME.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in this folder; unchanged stages are kept.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Redo stages whose inputs have changed without asking.")] = False,
    only: Annotated[
        str | None, typer.Option(help="Run only these stages: --only label,reward; with rounds: --only 2/label.")
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(help="Label part i of n (--shard i/n) and stop; join the labels.jsonl files afterwards."),
    ] = None,
) -> None:
    """Run a recipe: from prompts to an aligned policy and a report."""
    parsed, plugins = _parsed(recipe, set_)
    from trl_rlaif import hardware
    from trl_rlaif.experiments import run_comparison
    from trl_rlaif.pipeline.artifacts import REPORT
    from trl_rlaif.pipeline.pushing import push_asked
    from trl_rlaif.pipeline.runner import run_recipe
    from trl_rlaif.pipeline.stages import check_processes
    from trl_rlaif.pipeline.trial import try_settings
    from trl_rlaif.progress import say

    place, command = output or Path("runs") / parsed.run.name, shlex.join(["trl-rlaif", *sys.argv[1:]])
    stages = [stage.strip() for stage in only.split(",")] if only else []
    check_processes(parsed, stages)
    sections = [each.rl for each in parsed.variants.values() or [parsed]]
    if not any(rl and rl.config.get("vllm_enable_sleep_mode") for rl in sections):  # older vLLM refuses both together
        hardware.let_memory_grow()
    if parsed.variants and (stages or shard):
        raise UserError(
            f"A recipe with 'compare' runs as a whole, without {'--only' if stages else '--shard'}.",
            fix="Leave it out; --resume skips what is complete.",
        )
    if not resume and not stages:
        _check_inputs(parsed, plugins)
        for each in parsed.variants.values() or [parsed]:
            try_settings(each, plugins)
    start = run_comparison if parsed.variants else partial(run_recipe, only=stages, shard=shard)
    try:
        folder = start(parsed, plugins, place, resume=resume, command=command, confirm=None if yes else _confirm)
    except KeyboardInterrupt:  # typer would exit silently
        raise Interrupted("Stopped. Finished work is kept: add --resume to continue.") from None
    say(f"The run is in {folder.path}")
    if (folder / REPORT).exists():
        say(f"Report: {folder / REPORT}")
    if shard is None:
        push_asked(parsed, folder.path, stages)
    distributed.leave()


@app.command()
def label(
    recipe: RecipeArgument,
    set_: SetOption = None,
    output: Annotated[Path | None, typer.Option(help="The run's folder. Default: runs/NAME.")] = None,
    export_batch: Annotated[
        Path | None, typer.Option(help="Write the judge's requests for unlabeled pairs to this file.")
    ] = None,
    import_batch: Annotated[
        list[Path] | None, typer.Option(help="Import the answers in this file as labels of the run (repeatable).")
    ] = None,
) -> None:
    """Label through OpenAI-style batch files; ``run --resume`` then continues with the labels."""
    from trl_rlaif.pipeline import batch_files

    if (export_batch is None) == (not import_batch):
        fix = "Labels are made online by: trl-rlaif run RECIPE --only label."
        raise UserError("Give either --export-batch or --import-batch.", fix=fix)
    parsed, plugins = _parsed(recipe, set_)
    place = output or Path("runs") / parsed.run.name
    if export_batch is not None:
        pairs, requests = batch_files.export_batch(parsed, plugins, place, export_batch)
        echo(f"{export_batch}: {requests:,} requests for {pairs:,} pairs without a label.")
        return
    echo(batch_files.describe(batch_files.import_batch(parsed, plugins, place, import_batch or [])))


def _confirm(message: str) -> bool:
    """Ask on the terminal; without one, the answer is no. Only the first process asks, and ends all after a no."""
    if not distributed.is_first():
        return True
    return sys.stdin.isatty() and sys.stderr.isatty() and typer.confirm(escaped(f"{message}\nRedo them?"), err=True)


@app.command()
def check(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Check a recipe and its model's configuration, without weights: exit code 0, or 2 with a fix for each error."""
    parsed, plugins = _parsed(recipe, set_)
    from trl_rlaif.pipeline.checks import check_trainers
    from trl_rlaif.pipeline.stages import active_stages

    _check_inputs(parsed, plugins)
    check_trainers(parsed, plugins)
    if not parsed.variants:
        often = f", in {parsed.rounds.number} rounds" if parsed.rounds and parsed.rounds.number > 1 else ""
        echo(f"{parsed.source}: good. Stages: {', '.join(active_stages(parsed))}{often}")
        return
    echo(f"{parsed.source}: good. Variants:")
    for name, variant in parsed.variants.items():
        echo(f"    {name}: {', '.join(active_stages(variant))}")


def _parsed(recipe: str, overrides: list[str] | None) -> tuple[Recipe, Plugins]:
    """Parse a recipe with the installed plugins, which are imported only if the recipe exists."""
    from trl_rlaif.recipe.paths import find_recipe

    find_recipe(recipe)
    from trl_rlaif.plugins import installed_plugins
    from trl_rlaif.recipe import parse_recipe

    plugins = installed_plugins()
    return parse_recipe(recipe, overrides=overrides or (), registry=plugins.registry), plugins


def _check_inputs(parsed: Recipe, plugins: Plugins) -> None:
    """Check the inputs of the recipe or of each variant, and warn about prompts both held out and trained on."""
    from trl_rlaif.pipeline.checks import check_functions, check_prompts, check_ranking, check_sampler
    from trl_rlaif.pipeline.lineage import check_previous
    from trl_rlaif.pipeline.pushing import check_pushes
    from trl_rlaif.progress import say
    from trl_rlaif.recipe.inputs import SMALL_FILE, check_data, overlap_warning, prompt_overlaps

    warnings: dict[str, None] = {}
    check_pushes(parsed)
    for each in parsed.variants.values() or [parsed]:
        check_previous(each)
        check_data(each)
        check_functions(each)
        check_ranking(each, plugins)
        check_sampler(each, plugins)
        check_prompts(each, plugins)
        warnings |= dict.fromkeys(map(overlap_warning, prompt_overlaps(each, largest=SMALL_FILE)))
    for warning in warnings:
        say(warning)


@app.command()
def memory(
    recipe: RecipeArgument,
    set_: SetOption = None,
    gpu: Annotated[int | None, typer.Option(min=1, help="Check only a card with this much memory, in GB.")] = None,
) -> None:
    """Predict the GPU memory that a recipe needs, part by part, and the cards that it fits; loads no weights."""
    parsed, _ = _parsed(recipe, set_)
    from trl_rlaif.memory import describe

    echo(describe(parsed, gpu))


@app.command("draft-rubrics")
def draft_rubrics(
    recipe: RecipeArgument,
    set_: SetOption = None,
    output: Annotated[Path, typer.Option(help="A .jsonl file; prompts that it already has are kept unchanged.")] = Path(
        "rubrics.jsonl"
    ),
    prompt: Annotated[
        str, typer.Option(help="A packaged prompt, or a folder, with draft.txt and draft.jinja.")
    ] = "general",
    tries: Annotated[int, typer.Option(min=1, help="Maximum number of drafts per prompt until one can be parsed.")] = 3,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0: greedy decoding.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum draft length in tokens.")] = 384,
    batch_size: Annotated[int, typer.Option(min=1, help="Drafts per batch.")] = 16,
) -> None:
    """Have the judge write a rubric for each of a recipe's prompts, into a file for you to edit."""
    from trl_rlaif.drafting import DraftOptions, counted, dropped_of
    from trl_rlaif.drafting import draft_rubrics as draft

    parsed, plugins = _parsed(recipe, set_)
    options = DraftOptions(prompt, tries, temperature, max_new_tokens, batch_size)
    try:
        found = draft(parsed, plugins, output, options)
    except KeyboardInterrupt:  # typer would exit silently
        raise Interrupted("Stopped. Drafts are kept: run it again to continue.") from None
    echo(f"{output}: {found.drafted} rubrics drafted, {found.kept} found there or in the data and kept as they are.")
    if found.dropped:
        echo(f"{dropped_of(output)}: {found.dropped.total()} prompts dropped ({counted(found.dropped)}).")


@app.command()
def export(
    folder: FolderArgument,
    what: Annotated[Literal["policy", "reward", "judge"], typer.Option(help="The model to export.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge base and adapter into one model.")] = False,
    to: Annotated[Literal["folder", "hub"], typer.Option(help="Destination; hub needs --repo.")] = "folder",
    output: Annotated[Path | None, typer.Option(help="The new folder. Default: RUN/exports/WHAT.")] = None,
    repo: Annotated[str | None, typer.Option(help="Hub repository, user/model; a new one is private.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    base: Annotated[
        str | None, typer.Option(help="Hub id of the base, if the run loaded it from a local path.")
    ] = None,
) -> None:
    """Export a model that a run has trained: adapter or merged model, with tokenizer and model card."""
    from trl_rlaif.export import ExportOptions, export_model

    if (to == "hub") != (repo is not None):
        raise UserError("--to hub and --repo belong together.", fix="Write --to hub --repo user/model, or neither.")
    found = export_model(folder, what, ExportOptions(merge, output, repo, public, base))
    for place in filter(None, (found.folder, found.url)):
        echo(f"{what}: {place}")
    if found.difference is not None:
        echo(f"Its outputs match those of base and adapter within {found.difference:.1g} (relative).")
    elif found.base is None:
        echo("The adapter needs a base that others do not have: name its Hub id with --base, or add --merge.")


@app.command()
def rewardbench(
    folder: FolderArgument,
    data: Annotated[str, typer.Argument(help="A file, a folder, or a Hub id such as allenai/reward-bench-2:test.")],
    json_: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
    scores: Annotated[Path | None, typer.Option(help="Write the scores of every row to this .jsonl file.")] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per forward pass.")] = 8192,
) -> None:
    """Measure a run's reward model on preferences in RewardBench's format: accuracy by subset."""
    from trl_rlaif.files import to_json
    from trl_rlaif.rewardbench import describe, run_benchmark

    found = run_benchmark(folder, data, batch_tokens=batch_tokens, scores=scores)
    echo(to_json(found), nl=False) if json_ else echo(describe(found))


@app.command("new-plugin")
def new_plugin(
    name: Annotated[str, typer.Argument(help="Distribution name of the plugin, such as my-words.")],
    kind: Annotated[str, typer.Option(help="labeler, reward-transform, data-selector or pair-sampler.")] = "labeler",
    output: Annotated[Path | None, typer.Option(help="The new folder. Default: ./NAME.")] = None,
) -> None:
    """Scaffold a plugin: a package that pip installs, with a component and its test."""
    from trl_rlaif.scaffold import create_plugin

    folder = create_plugin(name, kind, output)
    place = shlex.quote(str(folder))
    echo(f"The plugin is in {folder}. Try it:\n    cd {place}\n    pip install -e '.[test]'\n    pytest")


@app.command()
def report(folder: FolderArgument) -> None:
    """Rebuild report.html from a run's folder."""
    from trl_rlaif.report.build import write_report

    echo(write_report(folder))


@app.command()
def status(
    folder: FolderArgument,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every 2 s until the run ends.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Show the progress of a run from another terminal; only reads its folder."""
    from trl_rlaif.status import show

    show(folder, watch=watch, as_json=json_)


@app.command()
def rate(
    folder: FolderArgument,
    rater: Annotated[
        str | None, typer.Option(help="Name of the rater. Default: your user name; with --result: all raters.")
    ] = None,
    set_: Annotated[str | None, typer.Option("--set", help="Rate only this set.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Local port. Default: a free one.")] = 0,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only print the page's address.")] = False,
    result: Annotated[bool, typer.Option("--result", help="Print the result of the votes, without the page.")] = False,
) -> None:
    """Rate responses yourself, blind, on a local web page; votes are kept in the run's folder."""
    from trl_rlaif.rating import describe, people_results, rate_run

    if not result:
        rate_run(folder, rater=rater, only=set_, port=port, browser=not no_browser)
    echo(describe(people_results(folder, rater=rater if result else None, only=set_)))


def main() -> None:
    """Entry point: one message on stderr for an error, a traceback only with --debug."""
    debug = "--debug" in sys.argv
    quiet_libraries()
    try:
        with interrupts.listening():
            app()
    except TrlRlaifError as error:
        if debug:
            raise
        _stop(str(error), error.exit_code)
    except OSError as error:
        if debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _stop(f"{where}{error.strerror or error} Finished work is kept: continue with --resume.", 1)
    except Exception as error:
        if debug:
            raise
        if distributed.lost_another(error):
            _stop("Another process of this run has ended. Finished work is kept: continue with --resume.", 1)
        _stop(f"{type(error).__name__}: {error}\nAdd --debug after trl-rlaif for the traceback.", 1)


def _stop(message: str, code: int) -> None:
    distributed.let_the_first_tell()
    echo(f"trl-rlaif: {message}", err=True)
    distributed.end_with(code)
    raise SystemExit(code)
