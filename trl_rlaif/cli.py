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

RecipeArgument = Annotated[str, typer.Argument(help="A recipe's path, or the name of a packaged one.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key: --set rl.kl_coef=0.1 (repeatable).")
]
FolderArgument = Annotated[Path, typer.Argument(help="A run's folder.")]


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
        bool, typer.Option("--resume", help="Resume the run in this folder; what has not changed is kept.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Redo, without asking, the stages whose inputs have changed.")
    ] = False,
    only: Annotated[
        str | None, typer.Option(help="Run these stages alone: --only label,reward; of a round: --only 2/label.")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(help="Label share i of n (--shard i/n) and end there; join labels.jsonl afterwards.")
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
    except KeyboardInterrupt:  # typer would end without a word
        raise Interrupted("Stopped. What was done is kept: add --resume to go on.") from None
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
        Path | None, typer.Option(help="Write the judge's requests for the pairs without a label into this file.")
    ] = None,
    import_batch: Annotated[
        list[Path] | None, typer.Option(help="Read the answers from this file into the run's labels (repeatable).")
    ] = None,
) -> None:
    """Label through OpenAI-style batch files; then ``run --resume`` goes on with the labels."""
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
    """Ask on the terminal; without one the answer is no. Of several processes the first one asks, and ends all."""
    if not distributed.is_first():
        return True
    return sys.stdin.isatty() and sys.stderr.isatty() and typer.confirm(escaped(f"{message}\nRedo them?"), err=True)


@app.command()
def check(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Check a recipe and its model's configuration, without weights: exit code 0, or 2 with what to write instead."""
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
    """A recipe, and the plugins that are installed, which are imported only where it is found."""
    from trl_rlaif.recipe.paths import find_recipe

    find_recipe(recipe)
    from trl_rlaif.plugins import installed_plugins
    from trl_rlaif.recipe import parse_recipe

    plugins = installed_plugins()
    return parse_recipe(recipe, overrides=overrides or (), registry=plugins.registry), plugins


def _check_inputs(parsed: Recipe, plugins: Plugins) -> None:
    """Try what the recipe or each of its variants names, and warn of prompts that are held out and trained on."""
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
    gpu: Annotated[int | None, typer.Option(min=1, help="Look at a card of so many GB alone.")] = None,
) -> None:
    """Predict what a recipe needs on a GPU, part by part, and which cards hold it; no weights are loaded."""
    parsed, _ = _parsed(recipe, set_)
    from trl_rlaif.memory import describe

    echo(describe(parsed, gpu))


@app.command("draft-rubrics")
def draft_rubrics(
    recipe: RecipeArgument,
    set_: SetOption = None,
    output: Annotated[Path, typer.Option(help="A .jsonl file; prompts that it has are kept as they are.")] = Path(
        "rubrics.jsonl"
    ),
    prompt: Annotated[
        str, typer.Option(help="A packaged prompt, or a folder, with draft.txt and draft.jinja.")
    ] = "general",
    tries: Annotated[int, typer.Option(min=1, help="Drafts of a prompt, until one can be read.")] = 3,
    temperature: Annotated[float, typer.Option(min=0, help="Of the drafts; 0 writes the likeliest one.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest draft.")] = 384,
    batch_size: Annotated[int, typer.Option(min=1, help="Drafts written at once.")] = 16,
) -> None:
    """Have the judge write a rubric for each of a recipe's prompts, into a file for you to edit."""
    from trl_rlaif.drafting import DraftOptions, counted, dropped_of
    from trl_rlaif.drafting import draft_rubrics as draft

    parsed, plugins = _parsed(recipe, set_)
    options = DraftOptions(prompt, tries, temperature, max_new_tokens, batch_size)
    try:
        found = draft(parsed, plugins, output, options)
    except KeyboardInterrupt:  # typer would end without a word
        raise Interrupted("Stopped. What was drafted is kept: run it again to go on.") from None
    echo(f"{output}: {found.drafted} rubrics drafted, {found.kept} found there or in the data and kept as they are.")
    if found.dropped:
        echo(f"{dropped_of(output)}: {found.dropped.total()} prompts dropped ({counted(found.dropped)}).")


@app.command()
def export(
    folder: FolderArgument,
    what: Annotated[Literal["policy", "reward", "judge"], typer.Option(help="Which of the run's models.")],
    merge: Annotated[bool, typer.Option("--merge", help="One whole model, base and adapter together.")] = False,
    to: Annotated[Literal["folder", "hub"], typer.Option(help="Where to; hub needs --repo.")] = "folder",
    output: Annotated[Path | None, typer.Option(help="The new folder. Default: RUN/exports/WHAT.")] = None,
    repo: Annotated[str | None, typer.Option(help="The Hub's repository, user/model; made private if new.")] = None,
    public: Annotated[bool, typer.Option("--public", help="A new repository is public.")] = False,
    base: Annotated[str | None, typer.Option(help="The base's Hub id, where the run read it from a file.")] = None,
) -> None:
    """Write what a run has trained for others to load: adapter or whole model, tokenizer and model card."""
    from trl_rlaif.export import ExportOptions, export_model

    if (to == "hub") != (repo is not None):
        raise UserError("--to hub and --repo belong together.", fix="Write --to hub --repo user/model, or neither.")
    found = export_model(folder, what, ExportOptions(merge, output, repo, public, base))
    for place in filter(None, (found.folder, found.url)):
        echo(f"{what}: {place}")
    if found.difference is not None:
        echo(f"It answers as base and adapter do, within {found.difference:.1g} (relative).")
    elif found.base is None:
        echo("The adapter belongs on a base that others do not have: name it with --base, or add --merge.")


@app.command()
def rewardbench(
    folder: FolderArgument,
    data: Annotated[str, typer.Argument(help="A file, a folder, or a Hub id such as allenai/reward-bench-2:test.")],
    json_: Annotated[bool, typer.Option("--json", help="One line of JSON, for machines.")] = False,
    scores: Annotated[Path | None, typer.Option(help="A .jsonl file for the scores of every row.")] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of one forward pass.")] = 8192,
) -> None:
    """Measure a run's reward model on preferences in RewardBench's format: accuracy by subset."""
    from trl_rlaif.files import to_json
    from trl_rlaif.rewardbench import describe, run_benchmark

    found = run_benchmark(folder, data, batch_tokens=batch_tokens, scores=scores)
    echo(to_json(found), nl=False) if json_ else echo(describe(found))


@app.command("new-plugin")
def new_plugin(
    name: Annotated[str, typer.Argument(help="The plugin's name, as pip will know it: my-words.")],
    kind: Annotated[str, typer.Option(help="labeler, reward-transform, data-selector or pair-sampler.")] = "labeler",
    output: Annotated[Path | None, typer.Option(help="The new folder. Default: NAME in the current one.")] = None,
) -> None:
    """Write a plugin of your own to begin with: a folder that pip installs, with a component and its test."""
    from trl_rlaif.scaffold import create_plugin

    folder = create_plugin(name, kind, output)
    place = shlex.quote(str(folder))
    echo(f"The plugin is in {folder}. Try it:\n    cd {place}\n    pip install -e '.[test]'\n    pytest")


@app.command()
def report(folder: FolderArgument) -> None:
    """Build report.html again from a run's folder."""
    from trl_rlaif.report.build import write_report

    echo(write_report(folder))


@app.command()
def status(
    folder: FolderArgument,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every 2 s until the run ends.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="One line of JSON, for machines.")] = False,
) -> None:
    """Say what a run is doing, from another terminal; its folder is only read."""
    from trl_rlaif.status import show

    show(folder, watch=watch, as_json=json_)


@app.command()
def rate(
    folder: FolderArgument,
    rater: Annotated[str | None, typer.Option(help="Who rates. Default: your user name; with --result: all.")] = None,
    set_: Annotated[str | None, typer.Option("--set", help="Rate this set alone.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine. Default: a free one.")] = 0,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Print the page's address only.")] = False,
    result: Annotated[bool, typer.Option("--result", help="Print what the votes say, without the page.")] = False,
) -> None:
    """Judge the responses yourself, blind, in a local web page; the votes stay in the run's folder."""
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
        _stop(f"{where}{error.strerror or error} What was done is kept: --resume goes on.", 1)
    except Exception as error:
        if debug:
            raise
        if distributed.lost_another(error):
            _stop("Another process of this run has ended. What was done is kept: --resume goes on.", 1)
        _stop(f"{type(error).__name__}: {error}\nAdd --debug behind trl-rlaif for the traceback.", 1)


def _stop(message: str, code: int) -> None:
    distributed.let_the_first_tell()
    echo(f"trl-rlaif: {message}", err=True)
    distributed.end_with(code)
    raise SystemExit(code)
