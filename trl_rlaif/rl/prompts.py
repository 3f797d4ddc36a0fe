"""From prompt datasets in TRL's formats (text, conversational, tokenized) to batches for the rollout."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trl_rlaif.batching import pad_rows
from trl_rlaif.encoding import as_rendered, encode_prompt, is_rendered
from trl_rlaif.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_MODEL_COLUMNS = ("input_ids", "attention_mask")


def tokenize_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    num_proc: int | None = None,
) -> Dataset:
    """Add ``input_ids`` to a dataset with a ``prompt`` column; drop prompts that are too long.

    Args:
        dataset: ``prompt`` as text or as messages (TRL's standard and conversational prompt-only
            formats), or ``input_ids`` already. Texts that all start like the chat template were rendered by it.
        tokenizer: With a chat template, if the prompts are conversational. A column ``chat_template_kwargs`` holds
            its variables.
        max_length: Maximum prompt length in tokens, or None for no limit.

    Raises:
        UserError: Both columns are missing, the dataset is empty, a row has no prompt, or every prompt is
            too long.
    """
    if len(dataset) == 0:
        raise UserError("The prompt dataset is empty.")
    if "input_ids" not in dataset.column_names:
        if "prompt" not in dataset.column_names:
            raise UserError(
                f"The prompt dataset has the columns {', '.join(dataset.column_names)}, and neither 'prompt' "
                "nor 'input_ids'.",
                fix="Rename the column that holds the prompts to 'prompt'.",
            )
        empty = [i for i, prompt in enumerate(dataset["prompt"]) if not prompt]
        if empty:
            raise UserError(f"{len(empty)} rows have no prompt; the first is row {empty[0]} (counted from 0).")
        rendered = all(is_rendered(prompt, tokenizer) for prompt in dataset["prompt"])
        if rendered:
            logger.warning("The prompts start with control tokens and are treated as rendered by the chat template.")

        def encoded(row: dict[str, Any]) -> dict[str, list[int]]:
            prompt = as_rendered(row["prompt"], tokenizer) if rendered else row["prompt"]
            kwargs = row.get("chat_template_kwargs")
            return {"input_ids": encode_prompt(tokenizer, prompt, chat_template_kwargs=kwargs)}

        dataset = dataset.map(encoded, num_proc=num_proc, desc="Tokenizing prompts")
    if max_length is None:
        return dataset
    kept = [i for i, ids in enumerate(dataset["input_ids"]) if len(ids) <= max_length]
    if not kept:
        raise UserError(
            f"Every prompt is longer than {max_length} tokens.",
            fix="Raise max_prompt_length or shorten them.",
        )
    if len(kept) < len(dataset):
        logger.warning(
            "%d of %d prompts are longer than %d tokens and are left out.",
            len(dataset) - len(kept), len(dataset), max_length,
        )  # fmt: skip
        dataset = dataset.select(kept)
    return dataset


@dataclass
class PromptCollator:
    """Pads ``input_ids`` on the left and keeps the other columns as lists.

    A batch holds input_ids (B, P) int64, attention_mask (B, P) int64, ``prompt`` (B entries, decoded from
    the ids where the dataset has no such column) and ``columns`` (name to B entries).
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids, mask = pad_rows((row["input_ids"] for row in rows), self.tokenizer.pad_token_id, left=True)
        mask = mask.long()
        if "attention_mask" in rows[0]:
            mask = pad_rows((row["attention_mask"] for row in rows), left=True)[0]
        prompts = (
            [row["prompt"] for row in rows]
            if "prompt" in rows[0]
            else self.tokenizer.batch_decode([row["input_ids"] for row in rows], skip_special_tokens=True)
        )
        names = [name for name in rows[0] if name not in (*_MODEL_COLUMNS, "prompt")]
        columns = {name: [row[name] for row in rows] for name in names}
        return {"input_ids": ids, "attention_mask": mask, "prompt": prompts, "columns": columns}


class BatchStream:
    """Endless batches, one shuffled pass over the data after another, which can be resumed exactly.

    At the start of a pass the dataloader draws its order from torch's global generator, as in TRL's trainer;
    so the state is that generator's at the start of the pass, and the number of batches taken since. With
    several processes accelerate gives the order its own generator, whose state is kept as well.
    """

    def __init__(self, dataloader: Any) -> None:
        self.restart(dataloader)

    def restart(self, dataloader: Any) -> None:
        """Take the batches from another dataloader from here on."""
        self.dataloader = dataloader
        self._iterator: Any = None
        self._start, self._taken = self._generators(), 0

    def __next__(self) -> dict[str, Any]:
        if self._iterator is None:
            self._begin()
        try:
            batch = next(self._iterator)
        except StopIteration:
            if self._taken == 0:
                raise UserError(
                    "There are fewer prompts than one batch holds.",
                    fix="Lower per_device_train_batch_size or gradient_accumulation_steps.",
                ) from None
            self._begin()
            batch = next(self._iterator)
        self._taken += 1
        return batch

    def _begin(self) -> None:
        self._start, self._taken = self._generators(), 0
        self._iterator = iter(self.dataloader)

    def _generators(self) -> dict[str, torch.Tensor]:
        states = {"start": torch.get_rng_state()}
        if self._order is not None:
            states["order"] = self._order.get_state()
        return states

    @property
    def _order(self) -> torch.Generator | None:
        return getattr(self.dataloader, "synchronized_generator", None)

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, for this process."""
        return {"batches": {**self._start, "taken": self._taken}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position in the data. Disturbs torch's global generator; set that afterwards."""
        place = state["batches"]
        torch.set_rng_state(place["start"])
        if self._order is not None and "order" in place:  # a single process has none
            self._order.set_state(place["order"])
        self._iterator, self._taken = None, 0
        self._start = self._generators()
        if not place["taken"]:  # a pass begins with its first batch, and draws its order then
            return
        self._begin()
        for _ in range(place["taken"]):
            next(self)
