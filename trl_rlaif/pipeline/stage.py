"""The stages of a run, in order: what each is made from, and what it leaves in the run's folder."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trl_rlaif.pipeline.inputs import Inputs, data_file, learned, prompt_file, selected, written
from trl_rlaif.recipe import Recipe
from trl_rlaif.recipe.sections import FORGET_SET

if TYPE_CHECKING:
    from trl_rlaif.pipeline.context import Context

# What every stage computes with, what adapters are trained, and how a response of the policy is read.
BASE = ("run.seed", "model.path", "model.dtype", "model.quantization", "model.matmul_precision",
        "model.chat_template_kwargs")  # fmt: skip
READING = ("model.reasoning", "model.reasoning_tags", "rl.stop_tokens", "rl.stop_token_id")
GROUPING = ("data.category", "data.clusters")
# What the section evaluate says of measurements while rl runs; evaluate itself does not depend on it.
TRACKING = ("evaluate.track_every", "evaluate.track_prompts", "evaluate.stop_on_forgetting")


class Stage:
    """One stage of a run.

    Args:
        name: Also its section's.
        outputs: What it leaves behind: files and folders of the run's folder. They go where the stage is redone.
        companions: What it reads or writes besides, which goes along when another run takes the stage over.
        without: Settings of its section that change nothing of its outputs.
        trains: It is configured by a trainer's arguments.
        always: It is made again whenever a run gets there: it costs little, and what it shows may have changed.
    """

    name = ""
    outputs: tuple[str, ...] = ()
    companions: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    trains = False
    always = False

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
        return Inputs(settings, files, stages)

    def run(self, context: Context) -> dict[str, Any]:
        """Make its outputs, and return its final numbers."""
        return importlib.import_module(f"trl_rlaif.pipeline.stages.{self.name}").run(context)

    def relevant(self, recipe: Recipe, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a recipe's settings that its outputs depend on; files are compared by their content."""
        found = selected(settings, self.settings(recipe), (*self.without, *self.files(recipe)))
        return learned(self.name, found) if self.trains else found


class Sft(Stage):
    name = "sft"
    outputs = ("sft", "checkpoints/sft")
    trains = True

    def settings(self, recipe: Recipe) -> tuple[str, ...]:
        return (*BASE, "model.lora", "sft")

    def files(self, recipe: Recipe) -> dict[str, dict[str, str] | None]:
        return {"sft.data": data_file(recipe.sft.data)}

    def columns(self, recipe: Recipe) -> tuple[str, ...]:
        return ("sft",)


class Sample(Stage):
    """Pairs from the data take its place."""

    name = "sample"
    outputs = ("pairs.jsonl", "pairs.partial.jsonl")

    def is_active(self, recipe: Recipe) -> bool:
        return recipe.sample is not None or bool(recipe.data.pairs)

    def settings(self, recipe: Recipe) -> tuple[str, ...]:
        if recipe.data.pairs:
            return ("run.seed", "model.path", "data.format", "data.scored_pairs", "data.category")
        return (*BASE, *READING, *GROUPING, "sample")

    def files(self, recipe: Recipe) -> dict[str, dict[str, str] | None]:
        key = "pairs" if recipe.data.pairs else "prompts"
        return {f"data.{key}": data_file(getattr(recipe.data, key))}

    def columns(self, recipe: Recipe) -> tuple[str, ...]:
        return ("pairs" if recipe.data.pairs else "prompts",)

    def after(self, recipe: Recipe) -> tuple[str, ...]:
        return () if recipe.data.pairs else ("sft",)


class Label(Stage):
    name = "label"
    # labels.jsonl stays: its lines are found by what determined them (labels/store.py).
    outputs = ("preferences",)
    companions = ("labels.jsonl",)
    without = ("label.batch_tokens", "label.precision")

    def files(self, recipe: Recipe) -> dict[str, dict[str, str] | None]:
        section = recipe.label
        prompts = {"label.prompt": section.prompt}
        prompts |= {f"label.compare.{name}.prompt": other.prompt for name, other in section.compare.items()}
        found: dict[str, dict[str, str] | None] = {key: prompt_file(name) for key, name in prompts.items() if name}
        return found | {"label.calibration": data_file(section.calibration) if section.calibration else None}

    def columns(self, recipe: Recipe) -> tuple[str, ...]:
        return ("calibration",) if recipe.label.calibration else ()

    def after(self, recipe: Recipe) -> tuple[str, ...]:
        return ("sample",)


class Reward(Stage):
    name = "reward"
    outputs = ("reward", "reward_scores.jsonl", "checkpoints/reward")
    companions = ("preferences",)
    without = ("reward.packing", "reward.batch_tokens")
    trains = True

    def settings(self, recipe: Recipe) -> tuple[str, ...]:
        return (*BASE, "model.lora", "reward")

    def after(self, recipe: Recipe) -> tuple[str, ...]:
        start = ("sft",) if recipe.reward.policies else ()
        return (*start, "label" if recipe.label else "sample")


class Rl(Stage):
    name = "rl"
    outputs = ("policy", "rehearsal.jsonl", "selection_map.jsonl", "checkpoints/rl")
    companions = ("preferences",)
    trains = True

    def settings(self, recipe: Recipe) -> tuple[str, ...]:
        keys = (*BASE, *READING, *GROUPING, "model.lora", "rl")
        if "direct" in recipe.rl.reward_names:
            keys += ("label.judge", "label.labeler")
        if self._can_stop(recipe):
            keys += (*TRACKING, "evaluate.judge", "evaluate.max_new_tokens")
        return keys

    def files(self, recipe: Recipe) -> dict[str, dict[str, str] | None]:
        section = recipe.rl
        found: dict[str, dict[str, str] | None] = {}
        if section.rehearsal:
            found["rl.rehearsal"] = data_file(section.rehearsal)
        if section.algorithm != "dpo":
            found["data.prompts"] = data_file(recipe.data.prompts)
        for number, name in enumerate(section.reward_names, 1):
            place = _source_of(name.rpartition(":")[0])
            if place:
                found[f"rl.rewards {number} ({name.rpartition(':')[2]})"] = data_file(place)
        if "direct" in section.reward_names:
            found["label.prompt"] = prompt_file(recipe.label.prompt if recipe.label else "general")
        if self._can_stop(recipe):
            found[f"evaluate.sets.{FORGET_SET}"] = data_file(recipe.evaluate.sets[FORGET_SET])
            found["evaluate.prompt"] = prompt_file(judge_prompt(recipe))
        return found

    def columns(self, recipe: Recipe) -> tuple[str, ...]:
        evaluated = ("eval_prompts",) if self._can_stop(recipe) else ()
        return ("prompts", "rehearsal", *evaluated)

    def after(self, recipe: Recipe) -> tuple[str, ...]:
        if recipe.rl.algorithm == "dpo":
            return ("sft", "label" if recipe.label else "sample")
        return ("sft", "reward") if self._uses_reward(recipe) else ("sft",)

    @staticmethod
    def _can_stop(recipe: Recipe) -> bool:
        return recipe.evaluate is not None and recipe.evaluate.stop_on_forgetting is not None

    @staticmethod
    def _uses_reward(recipe: Recipe) -> bool:
        """Whether the reward model scores, or a transform has the state of its training."""
        trained = {ref.name for ref in recipe.reward.transforms} if recipe.reward else set()
        return "reward" in recipe.rl.reward_names or bool(trained & {ref.name for ref in recipe.rl.transforms})


class Evaluate(Stage):
    name = "evaluate"
    outputs = ("samples.jsonl",)
    without = TRACKING

    def settings(self, recipe: Recipe) -> tuple[str, ...]:
        keys = (*BASE, *READING, *GROUPING, "evaluate")
        if recipe.evaluate.max_new_tokens is None and "response_length" not in recipe.rl.config:
            keys += ("sample.max_new_tokens",)
        return keys

    def files(self, recipe: Recipe) -> dict[str, dict[str, str] | None]:
        section = recipe.evaluate
        prompts = {"evaluate.prompt": judge_prompt(recipe), "evaluate.harmless": section.harmless}
        prompts |= {f"evaluate.judges.{name}.prompt": judge.prompt for name, judge in section.judges.items()}
        sets = {f"evaluate.sets.{name}": source for name, source in section.sets.items()}
        sets = sets or {"data.eval_prompts": recipe.data.eval_prompts}
        found = {key: prompt_file(name) for key, name in prompts.items() if name}
        return found | {key: data_file(source) for key, source in sets.items()}

    def columns(self, recipe: Recipe) -> tuple[str, ...]:
        return ("eval_prompts",)

    def after(self, recipe: Recipe) -> tuple[str, ...]:
        return ("sft", "rl", "reward") if "reward" in recipe.rl.reward_names else ("sft", "rl")


class Report(Stage):
    name = "report"
    outputs = ("report.html", "report")
    always = True

    def settings(self, recipe: Recipe) -> tuple[str, ...]:
        return ()

    def after(self, recipe: Recipe) -> tuple[str, ...]:
        return tuple(stage.name for stage in STAGES if stage is not self)


def _source_of(place: str) -> str | None:
    """The file of a reward function's ``path/to/file.py`` or ``package.module``; None where there is none."""
    if place.endswith(".py"):
        return place
    try:
        found = importlib.util.find_spec(place) if place else None
    except (ImportError, ValueError):
        found = None
    return found.origin if found is not None and found.has_location else None


def judge_prompt(recipe: Recipe) -> str:
    """The prompt of the main judge of ``evaluate``."""
    return recipe.evaluate.prompt or (recipe.label.prompt if recipe.label else "general")


STAGES: tuple[Stage, ...] = (Sft(), Sample(), Label(), Reward(), Rl(), Evaluate(), Report())


def active_stages(recipe: Recipe) -> dict[str, Stage]:
    """The stages that a recipe runs, in order, by name."""
    return {stage.name: stage for stage in STAGES if stage.is_active(recipe)}


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """Of each active stage's inputs, as a new run has them."""
    found: dict[str, str] = {}
    for name, stage in active_stages(recipe).items():
        found[name] = stage.inputs(recipe, found).fingerprint
    return found
