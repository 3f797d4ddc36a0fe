"""The stage judge: an adapter that is trained on the judge's own questions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.inputs import data_file, prompt_file
from trl_rlaif.pipeline.stage import BASE, QUESTION, TRAINED, Amounts, Stage, skipped
from trl_rlaif.recipe import JudgeSection

if TYPE_CHECKING:
    from trl_rlaif.memory.parts import MemoryRun
    from trl_rlaif.memory.plan import Part
    from trl_rlaif.pipeline.results import JudgeResults
    from trl_rlaif.recipe import Recipe


class Judge(Stage):
    """An adapter of the judge, and the judge's answers on held-out pairs with and without it."""

    name = "judge"
    outputs = (artifacts.JUDGE, artifacts.LESSONS, artifacts.checkpoints_of("judge"))
    trains = True
    prepares = True
    told = ("loss", "eval_loss")
    # For a LoRA adapter trained on few pairs; the held-out loss may stop it earlier.
    defaults = {"learning_rate": 5e-4, "warmup_steps": 0.1, "num_train_epochs": 2}

    def is_active(self, recipe: Recipe) -> bool:
        return recipe.judge is not None and recipe.previous is None

    def settings(self, recipe: Recipe) -> tuple[str, ...]:
        return (*BASE, "model.lora", "judge", "label.labeler")

    def files(self, recipe: Recipe) -> dict[str, dict[str, str] | None]:
        section = recipe.judge
        found = {"judge.prompt": prompt_file(recipe.teaching_prompt)}
        if section.pairs:
            found["judge.pairs"] = data_file(section.pairs)
        for name in (artifacts.PAIRS, artifacts.LABELS) if section.labels else ():
            found[f"judge.labels ({name})"] = data_file(f"{section.labels}/{name}")
        return found

    def columns(self, recipe: Recipe) -> tuple[str, ...]:
        return ("judge",) if recipe.judge.pairs else ()

    def after(self, recipe: Recipe) -> tuple[str, ...]:
        return ("sample",) if recipe.judge.contrasts else ()

    def summary(self, numbers: JudgeResults) -> str:
        if not numbers["used"]:
            return f"not used: {numbers['reason']}"
        both = numbers["sources"]["all"]
        found = [f"{numbers['taught']} pairs"]
        for name, title in (("agreement", "right"), ("position_bias", "position bias")):
            before, after = ((both[when].get(name) or {}).get("rate") for when in ("before", "after"))
            if before is not None and after is not None:
                found.append(f"{title} {before:.0%} -> {after:.0%}")
        return ", ".join(found) + " on held-out pairs" + skipped(numbers)

    def cost(self, recipe: Recipe, amounts: Amounts) -> float | None:
        section, response = recipe.judge, recipe.sample.max_new_tokens if recipe.sample else amounts.tokens
        if section.model != "same" or section.pairs or section.labels:
            return None
        contrasts = min(section.max_contrasts, amounts.pairs * len(section.contrasts))
        epochs = section.config.get("num_train_epochs", self.defaults["num_train_epochs"])
        passes = TRAINED * epochs * (1 - section.eval_fraction) + section.eval_fraction * (section.evaluations + 2)
        return passes * contrasts * (amounts.tokens + QUESTION + 4 * response)

    def memory(self, run: MemoryRun) -> list[Part]:
        """Each pair gives two rows, one per order."""
        from trl_rlaif.memory.parts import backward, trained

        if isinstance(run.recipe.judge.model, JudgeSection):
            run.notes.append("The stage judge teaches a model of its own, and is not counted.")
            return []
        response = run.recipe.sample.max_new_tokens if run.recipe.sample else run.prompt
        rows = 2 * run.setting("judge", "per_device_train_batch_size")
        length = run.within(run.recipe.judge.max_length or run.prompt + QUESTION + 2 * response)
        checkpointing = bool(run.setting("judge", "gradient_checkpointing"))
        return [
            *run.base(),
            *trained(run, "judge", "adapter", run.adapter.tensors, head=False),
            *backward(run.activations("judge"), rows, length, checkpointing),
        ]
