"""What a stage is: what it is made from, what it leaves in the run's folder, what it says, and what it needs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from trl_rlaif.distributed import dividing, is_first, wait
from trl_rlaif.pipeline.inputs import Inputs, learned, model_files, selected, written

if TYPE_CHECKING:
    from trl_rlaif.memory.parts import MemoryRun
    from trl_rlaif.memory.plan import Part
    from trl_rlaif.pipeline.context import Context
    from trl_rlaif.recipe import Recipe

# What every stage computes with, and how the policy is asked and its response is read.
BASE = ("run.seed", "model.path", "model.dtype", "model.quantization", "model.matmul_precision",
        "model.chat_template_kwargs")  # fmt: skip
READING = ("data.instruction", "model.reasoning", "model.reasoning_tags", "rl.stop_tokens",
           "rl.stop_token_id")  # fmt: skip
GROUPING = ("data.category", "data.clusters")
# What the section evaluate says of measurements while rl runs; evaluate itself does not depend on it.
TRACKING = ("evaluate.track_every", "evaluate.track_prompts", "evaluate.stop_on_forgetting")


def previous(stage: str) -> str:
    """How a stage's inputs name a stage of the run that this one goes on from."""
    return f"the previous run's {stage}"


class Amounts(NamedTuple):
    """How much a run has to do.

    Args:
        prompts, pairs, held_out: How many there are, of all evaluated sets together.
        tokens: Of a prompt, on average, with its template.
    """

    prompts: int
    pairs: int
    held_out: int
    tokens: float


# A token of a response is drawn with all weights read for a few rows: about as long as two of a prompt take. A backward
# pass through frozen layers takes as long as the forward pass.
DRAWN, TRAINED = 2, 2
# Tokens that a judge's question adds to the prompt and the responses, in both orders.
QUESTION = 80


class Stage:
    """One stage of a run. What it does is imported when it runs, so that asking for the rest costs nothing.

    Args:
        name: Also its section's.
        outputs: What it leaves behind: files and folders of the run's folder. They go where the stage is redone.
        companions: What it reads or writes besides, which goes along when another run takes the stage over.
        without: Settings of its section that change nothing of its outputs.
        trains: It is configured by a trainer's arguments.
        always: It is made again whenever anything else in the folder has been: it costs little, and shows all.
        prepares: Something that is trained needs it, or follows from it; it comes before the stage rl.
        divides: Several processes divide its batches; else each of them has rows of its own.
        alone: Of several processes the first one does it.
        one_bar: Its first progress bar is all that it does.
        told: Of what it logs, what ``trl-rlaif status`` tells.
        defaults: Arguments of its trainer that are not the trainer's own defaults; the recipe's take precedence.
    """

    name: ClassVar[str]
    outputs: ClassVar[tuple[str, ...]] = ()
    companions: ClassVar[tuple[str, ...]] = ()
    without: ClassVar[tuple[str, ...]] = ()
    trains: ClassVar[bool] = False
    always: ClassVar[bool] = False
    prepares: ClassVar[bool] = False
    divides: ClassVar[bool] = True
    alone: ClassVar[bool] = False
    one_bar: ClassVar[bool] = True
    told: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[Mapping[str, Any]] = {}

    # ---- What it is made from -------------------------------------------------------------------------

    def is_active(self, recipe: Recipe) -> bool:
        """Whether a recipe runs it."""
        return getattr(recipe, self.name) is not None

    def settings(self, recipe: Recipe) -> tuple[str, ...]:
        """The keys and sections that its outputs depend on."""
        return (*BASE, self.name)

    def files(self, recipe: Recipe) -> dict[str, dict[str, str] | None]:
        """The files that its outputs depend on, by key; None where there is none."""
        return {}

    def columns(self, recipe: Recipe) -> tuple[str, ...]:
        """Of which sources it reads columns, as ``data.columns`` calls them."""
        return ()

    def after(self, recipe: Recipe) -> tuple[str, ...]:
        """The stages that its outputs depend on, if they are active."""
        return ()

    def inputs(self, recipe: Recipe, fingerprints: Mapping[str, str]) -> Inputs:
        """All that its outputs depend on.

        Args:
            fingerprints: Of the stages before it that are active.
        """
        files = {key: file for key, file in self.files(recipe).items() if file}
        settings = self.relevant(recipe, written(recipe))
        columns = {f"data.columns of {source}": recipe.data.columns_of(source) for source in self.columns(recipe)}
        settings |= {key: value for key, value in columns.items() if value}
        stages = {name: fingerprints[name] for name in self.after(recipe) if name in fingerprints}
        return Inputs(settings, files | model_files(settings), stages)

    def relevant(self, recipe: Recipe, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a recipe's settings that its outputs depend on; files are compared by their content."""
        found = selected(settings, self.settings(recipe), (*self.without, *self.files(recipe)))
        return learned(self.name, found) if self.trains else found

    # ---- What it does ---------------------------------------------------------------------------------

    def run(self, context: Context) -> Mapping[str, Any]:
        """Make its outputs, and return its final numbers (trl_rlaif.pipeline.results.Results).

        Of several processes all run it, and the first one writes. With the numbers comes what judges on servers used.
        """
        from trl_rlaif.pipeline.usage import counted, usage_numbers

        if self.alone and not is_first():
            return {}
        with counted(context, self.name), dividing() if self.divides else nullcontext():
            numbers = dict(self.work(context.recipe)(context))
        if not self.alone:
            wait()  # until all have counted
        return {**numbers, **usage_numbers(context, self.name)}

    def work(self, recipe: Recipe) -> Callable[[Context], Mapping[str, Any]]:
        """The function that does it, imported now."""
        return importlib.import_module(f"trl_rlaif.pipeline.work.{self.name}").run

    def summary(self, numbers: Any) -> str:
        """What the line at its end, and ``trl-rlaif status``, say of these numbers, without its judges' tokens."""
        return ""

    def line(self, numbers: Mapping[str, Any]) -> str:
        """The same, with them."""
        from trl_rlaif.pipeline.usage import spent

        return ", ".join(filter(None, (self.summary(numbers), spent(numbers))))

    def cost(self, recipe: Recipe, amounts: Amounts) -> float | None:
        """Tokens that it computes, in forward passes of the base; None where it cannot tell."""
        return 0.0

    def memory(self, run: MemoryRun) -> list[Part]:
        """What it holds on a GPU, a part for each purpose; nothing where it needs none."""
        return []


def skipped(numbers: Mapping[str, Any]) -> str:
    """What was left out and why, in brackets; nothing where nothing was."""
    found = ", ".join(f"{n} {reason}" for reason, n in (numbers.get("skipped") or {}).items())
    return f" (skipped: {found})" if found else ""
