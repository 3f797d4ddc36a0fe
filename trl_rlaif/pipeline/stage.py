"""The interface of a stage: its inputs, its outputs in the run's folder, its messages, and its resource needs."""

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

# Settings of every computation, and those for prompting the policy and parsing its responses.
BASE = ("run.seed", "model.path", "model.dtype", "model.quantization", "model.matmul_precision",
        "model.chat_template_kwargs")  # fmt: skip
READING = ("data.instruction", "model.reasoning", "model.reasoning_tags", "rl.stop_tokens",
           "rl.stop_token_id")  # fmt: skip
GROUPING = ("data.category", "data.clusters")
# Settings of the section evaluate for measurements during rl; evaluate itself does not depend on them.
TRACKING = ("evaluate.track_every", "evaluate.track_prompts", "evaluate.stop_on_forgetting")


def previous(stage: str) -> str:
    """The name, in a stage's inputs, of a stage of the run that this one continues."""
    return f"the previous run's {stage}"


class Amounts(NamedTuple):
    """The workload of a run.

    Args:
        prompts, pairs, held_out: Their numbers; held_out are the prompts of all evaluation sets together.
        tokens: Mean per prompt, with its template.
    """

    prompts: int
    pairs: int
    held_out: int
    tokens: float


# Decoding reads all weights for a few rows: a response token takes about as long as two prompt tokens. A backward pass
# through frozen layers takes as long as the forward pass.
DRAWN, TRAINED = 2, 2
# Tokens that a judge's question adds to the prompt and the responses, in both orders.
QUESTION = 80


class Stage:
    """One stage of a run. Its implementation is imported when it runs; everything else is cheap.

    Args:
        name: Its name, and that of its section.
        outputs: Its files and folders in the run's folder. They are moved away if the stage is redone.
        companions: Other files that it reads or writes, which are copied when another run adopts the stage.
        without: Settings of its section that do not affect its outputs.
        trains: It is configured by a trainer's arguments.
        always: It is redone whenever another stage was: it is cheap, and shows all others.
        prepares: It comes before the stage rl: it trains a model, or training needs it.
        divides: Several processes divide its batches; otherwise each has its own rows.
        alone: Only the first of several processes runs it.
        one_bar: Its first progress bar covers all its work.
        told: Its logged metrics that ``trl-rlaif status`` shows.
        defaults: Arguments of its trainer that differ from the trainer's defaults; the recipe's take precedence.
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

    # ---- Inputs ---------------------------------------------------------------------------------------

    def is_active(self, recipe: Recipe) -> bool:
        """Whether a recipe includes it."""
        return getattr(recipe, self.name) is not None

    def settings(self, recipe: Recipe) -> tuple[str, ...]:
        """The keys and sections that its outputs depend on."""
        return (*BASE, self.name)

    def files(self, recipe: Recipe) -> dict[str, dict[str, str] | None]:
        """The files that its outputs depend on, by key; None for a key without a file."""
        return {}

    def columns(self, recipe: Recipe) -> tuple[str, ...]:
        """The sources of which it reads columns, as named in ``data.columns``."""
        return ()

    def after(self, recipe: Recipe) -> tuple[str, ...]:
        """The stages that its outputs depend on, if they are active."""
        return ()

    def inputs(self, recipe: Recipe, fingerprints: Mapping[str, str]) -> Inputs:
        """Everything that its outputs depend on.

        Args:
            fingerprints: Of the active stages before it.
        """
        files = {key: file for key, file in self.files(recipe).items() if file}
        settings = self.relevant(recipe, written(recipe))
        columns = {f"data.columns of {source}": recipe.data.columns_of(source) for source in self.columns(recipe)}
        settings |= {key: value for key, value in columns.items() if value}
        stages = {name: fingerprints[name] for name in self.after(recipe) if name in fingerprints}
        return Inputs(settings, files | model_files(settings), stages)

    def relevant(self, recipe: Recipe, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe's settings that its outputs depend on; without files, which are compared by content."""
        found = selected(settings, self.settings(recipe), (*self.without, *self.files(recipe)))
        return learned(self.name, found) if self.trains else found

    # ---- Work -----------------------------------------------------------------------------------------

    def run(self, context: Context) -> Mapping[str, Any]:
        """Make its outputs, and return its results (trl_rlaif.pipeline.results.Results), with its judge servers' usage.

        All processes run it, or the first one only if ``alone``; the first one writes.
        """
        from trl_rlaif.pipeline.usage import counted, usage_numbers

        if self.alone and not is_first():
            return {}
        with counted(context, self.name), dividing() if self.divides else nullcontext():
            numbers = dict(self.work(context.recipe)(context))
        if not self.alone:
            wait()  # until all have stored their usage
        return {**numbers, **usage_numbers(context, self.name)}

    def work(self, recipe: Recipe) -> Callable[[Context], Mapping[str, Any]]:
        """The function that does the work, imported on this call."""
        return importlib.import_module(f"trl_rlaif.pipeline.work.{self.name}").run

    def summary(self, numbers: Any) -> str:
        """Its results as a line, shown at its end and by ``trl-rlaif status``, without its judges' tokens."""
        return ""

    def line(self, numbers: Mapping[str, Any]) -> str:
        """The same, with its judges' tokens."""
        from trl_rlaif.pipeline.usage import spent

        return ", ".join(filter(None, (self.summary(numbers), spent(numbers))))

    def cost(self, recipe: Recipe, amounts: Amounts) -> float | None:
        """Tokens that it computes, in forward passes of the base; None if unknown."""
        return 0.0

    def memory(self, run: MemoryRun) -> list[Part]:
        """Its GPU memory, one part per purpose; empty if it needs none."""
        return []


def skipped(numbers: Mapping[str, Any]) -> str:
    """The skipped rows by reason, in parentheses; empty if there are none."""
    found = ", ".join(f"{n} {reason}" for reason, n in (numbers.get("skipped") or {}).items())
    return f" (skipped: {found})" if found else ""
