"""The stage sft: supervised fine-tuning of the adapter that later stages start from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.inputs import data_file
from trl_rlaif.pipeline.stage import BASE, Amounts, Stage

if TYPE_CHECKING:
    from trl_rlaif.memory.parts import MemoryRun
    from trl_rlaif.memory.plan import Part
    from trl_rlaif.recipe import Recipe

# Tokens per chunk of TRL's loss.
CHUNK = 256


class Sft(Stage):
    """An adapter, trained by TRL's SFTTrainer."""

    name = "sft"
    outputs = (artifacts.SFT, artifacts.checkpoints_of("sft"))
    trains = True
    prepares = True
    told = ("loss", "mean_token_accuracy")

    def is_active(self, recipe: Recipe) -> bool:
        return recipe.sft is not None and recipe.previous is None

    def settings(self, recipe: Recipe) -> tuple[str, ...]:
        return (*BASE, "model.lora", "sft")

    def files(self, recipe: Recipe) -> dict[str, dict[str, str] | None]:
        return {"sft.data": data_file(recipe.sft.data)}

    def columns(self, recipe: Recipe) -> tuple[str, ...]:
        return ("sft",)

    def cost(self, recipe: Recipe, amounts: Amounts) -> float | None:
        return None  # only its trainer knows the length of its rows

    def memory(self, run: MemoryRun) -> list[Part]:
        """Rows are assumed to be as long as max_length."""
        from trl_rlaif.memory.parts import trained, update

        rows = run.setting("sft", "per_device_train_batch_size")
        length = run.within(run.setting("sft", "max_length") or 1024)
        activations = run.activations("sft")
        chunked = run.setting("sft", "loss_type") in (None, "chunked_nll")
        chunk = min(CHUNK, rows * length) if chunked else rows * length
        head = activations.sft_head(chunk) if chunked else activations.head(chunk, gradient=True)
        checkpointing = bool(run.setting("sft", "gradient_checkpointing"))
        return [
            *run.base(),
            *trained(run, "sft", "adapter", run.adapter.tensors),
            *update(activations, rows, length, checkpointing, head, chunk),
        ]
