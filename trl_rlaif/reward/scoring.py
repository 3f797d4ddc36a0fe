"""Scores of preference pairs by a sequence classification model, from padded or packed rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from trl_rlaif.batching import packed_batches, token_batches
from trl_rlaif.distributed import divided, undivided
from trl_rlaif.errors import UserError
from trl_rlaif.models.kernels import PairRows, sliding_windows, takes_masks, trainable_attention, trial
from trl_rlaif.models.sharding import is_shared_out
from trl_rlaif.models.shared_model import backbone, inner_model
from trl_rlaif.reward.collator import SoftPreferenceCollator
from trl_rlaif.reward.heads import active_head
from trl_rlaif.reward.packing import CHOSEN, PADDING, PREFIX, REJECTED, PackedRow, pack, packed_mask


class PairScorer:
    """Computes the scores of pairs; has the call signature of the model in TRL's trainer.

    It reads the last hidden states at the scored tokens. They come from a call of the model itself, so that its
    wrappers (DDP, autocast) take part.

    Args:
        model: Sequence classification model with a linear head ``score``, plain, PEFT or wrapped.
        unwrapped: The same without accelerate's wrappers.
        batch_tokens: Maximum tokens, padding included, of one forward pass over packed rows.
        as_rows: Concatenate packed pairs without padding; None: if the model supports it.
        parts: Receives the packed rows of each forward pass, longest first, and may split them further.
    """

    def __init__(
        self,
        model: nn.Module,
        unwrapped: nn.Module,
        batch_tokens: int,
        as_rows: bool | None = None,
        parts: Callable[[list[list[int]]], list[list[int]]] = list,
    ) -> None:
        self.model, self.unwrapped, self.batch_tokens, self.as_rows = model, unwrapped, batch_tokens, as_rows
        self.parts = parts
        self.expected: torch.Tensor | None = None
        self.windows: list[int | None] = []

    def __call__(self, **inputs: Any) -> SequenceClassifierOutput:
        """Scores of a batch from ``SoftPreferenceCollator``.

        Returns:
            ``logits``, (2B, 1) float32: chosen, then rejected. This object's ``expected`` is then e(x), (B,) float32,
            if the head has a second output.
        """
        hidden = self._packed(inputs) if "segments" in inputs else self._padded(inputs)
        found = self._head(hidden)
        prompt, chosen, rejected = found.unbind(1)
        self.expected = prompt[:, 1] if found.shape[-1] > 1 else None
        return SequenceClassifierOutput(logits=torch.cat((chosen, rejected))[:, :1])

    def _padded(self, inputs: dict[str, Any]) -> torch.Tensor:
        mask = inputs["attention_mask"]
        hidden = self._hidden(input_ids=inputs["input_ids"], attention_mask=mask)
        last = mask.cumsum(1).argmax(1)
        ends = hidden[torch.arange(len(hidden), device=hidden.device), last]
        chosen, rejected = ends.chunk(2)
        prompt = hidden[torch.arange(len(chosen), device=hidden.device), inputs["prompt_end"]]
        return torch.stack((prompt, chosen, rejected), 1)

    def _packed(self, inputs: dict[str, Any]) -> torch.Tensor:
        """(B, 3, H) hidden states at the ends of prompt, chosen and rejected.

        Either all pairs in one sequence, with attention per pair, or as a padded batch with a (B, 1, S, S) mask.
        """
        lengths = inputs["attention_mask"].sum(1).tolist()
        inner = inner_model(self.unwrapped)
        if _reads_rows(inner) if self.as_rows is None else self.as_rows:
            groups, compute = packed_batches(lengths, self.batch_tokens), self._behind_each_other
        elif any(sliding_windows(inner.config.get_text_config())):
            raise UserError("Packed pairs do not support this model's sliding windows here.", fix="packing=False")
        else:
            groups, compute = token_batches(lengths, self.batch_tokens, slack=0.8), self._below_each_other
        groups, found = self.parts(groups), []
        for group in groups:
            rows, width = torch.tensor(group, device=inputs["input_ids"].device), lengths[group[0]]
            ids, positions, segments = (inputs[k][rows, :width] for k in ("input_ids", "position_ids", "segments"))
            found.append(compute(ids, positions, segments, inputs["ends"][rows]))
        order = torch.tensor([i for group in groups for i in group]).argsort()
        return torch.cat(found)[order.to(found[0].device)]

    def _below_each_other(
        self, ids: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor, ends: torch.Tensor
    ) -> torch.Tensor:
        hidden = self._hidden(input_ids=ids, attention_mask=self._attention_mask(segments), position_ids=positions)
        return hidden[torch.arange(len(ends), device=ends.device)[:, None], ends]

    def _behind_each_other(
        self, ids: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor, ends: torch.Tensor
    ) -> torch.Tensor:
        """The same without padding: fewer and larger matrix products, and attention row by row."""
        kept = segments != PADDING
        kinds = [(segments == kind).sum(1).tolist() for kind in (PREFIX, CHOSEN, REJECTED)]
        rows = PairRows(list(zip(*kinds, strict=True)))
        hidden = self._hidden(
            input_ids=ids[kept][None],
            position_ids=positions[kept][None],
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),  # four-dimensional: no model builds its own
            packed_rows=rows,
        )
        self.windows = rows.windows
        starts = kept.sum(1).cumsum(0) - kept.sum(1)
        return hidden[0, starts[:, None] + ends]

    def _attention_mask(self, segments: torch.Tensor) -> torch.Tensor:
        mask, inner = packed_mask(segments), inner_model(self.unwrapped)
        if takes_masks(inner):
            return mask
        dtype = inner.get_input_embeddings().weight.dtype  # the others add it to the attention scores
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

    def _hidden(self, **inputs: Any) -> torch.Tensor:
        with trainable_attention(inner_model(self.unwrapped)), _last_hidden(backbone(self.unwrapped)) as caught:
            self.model(**inputs, use_cache=False)
        return caught[0]

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., H) to (..., outputs), at least float32."""
        score = active_head(self.unwrapped)
        found = score(hidden.to(score.weight.dtype))
        return found if found.dtype == torch.float64 else found.float()


@torch.no_grad()
def score_pairs(
    model: nn.Module, examples: Sequence[dict[str, Any]], collator: SoftPreferenceCollator, batch: int, tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Scores of a dataset's pairs.

    Args:
        examples: With ``chosen_ids`` and ``rejected_ids``.
        batch: Pairs per batch.
        tokens: Maximum tokens of one forward pass over packed rows.

    Returns:
        (chosen, rejected, expected), (N,) float32 each, on the CPU; the last one if the head has an e(x).
    """
    model.eval()
    scorer, device = PairScorer(model, model, tokens), next(model.parameters()).device

    def score(indices: range) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows = collator([examples[i] for i in indices])
        inputs = {name: x.to(device) for name, x in rows.items() if isinstance(x, torch.Tensor)}
        found = scorer(**inputs).logits[:, 0].view(2, -1).cpu()
        return found, None if scorer.expected is None else scorer.expected.cpu()

    everything = range(len(examples))
    with undivided() if is_shared_out(model) else nullcontext():
        scored = [of for _, of in divided([everything[i : i + batch] for i in everything[::batch]], score)]
    chosen, rejected = torch.cat([of for of, _ in scored], 1)
    expected = [of for _, of in scored if of is not None]
    return chosen, rejected, torch.cat(expected) if expected else None


@contextmanager
def _last_hidden(body: nn.Module) -> Iterator[list[torch.Tensor]]:
    """A list that collects the last hidden states of every forward pass inside."""
    caught: list[torch.Tensor] = []
    handle = body.register_forward_hook(lambda _module, _args, output: caught.append(output[0]))
    try:
        yield caught
    finally:
        handle.remove()


_reading: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _reads_rows(inner: nn.Module) -> bool:
    """Whether a model on a CPU scores concatenated pairs as it does plain sequences; tested once."""
    config = inner.config.get_text_config()
    if inner.device.type != "cpu" or not takes_masks(inner):
        return False
    if inner not in _reading:
        tried = None if getattr(config, "attention_chunk_size", None) else _tried(inner, as_rows=True)
        # A window is longer than the test rows: it must suffice that every layer reported its own.
        _reading[inner] = tried is not None and tried.windows == sliding_windows(config)
    return _reading[inner]


def can_pack(model: nn.Module, device: torch.device | None = None) -> bool:
    """Whether a model scores packed rows as it does plain ones; tested once on a few tokens.

    Some attention implementations accept no custom mask (FlashAttention) or see only a window of preceding tokens, and
    some models carry a recurrent state through the row.

    Args:
        device: Where it will run; None: the model's device.
    """
    inner = inner_model(model)
    if (device or inner.device).type == "cpu" and _reads_rows(inner):
        return True
    config = inner.config.get_text_config()
    if any(sliding_windows(config)) or getattr(config, "attention_chunk_size", None):
        return False  # the mask would have to include the window
    return _tried(model, as_rows=False) is not None


def _tried(model: nn.Module, *, as_rows: bool) -> PairScorer | None:
    """The scorer tested on a model, or None if its scores differ from those of plain sequences."""
    pairs = [([5, 9, 4, 7, 8], [5, 9, 4, 6, 3, 9]), ([4, 8, 3], [4, 7])]
    device = next(model.parameters()).device
    batch = {name: x.to(device) for name, x in pack([PackedRow.of(*pair) for pair in pairs], 0).items()}
    scorer = PairScorer(model, model, batch_tokens=2**20, as_rows=as_rows)
    with trial(model):
        try:
            found = scorer._packed(batch)[:, 1:]
            plain = [scorer._hidden(input_ids=torch.tensor([ids], device=device)) for pair in pairs for ids in pair]
            scorer._head(found)
        except Exception:  # whatever an architecture without support for such a mask or head raises
            return None
    expected = torch.stack([hidden[0, -1] for hidden in plain]).view_as(found)
    return scorer if (found - expected).norm() < 1e-4 * expected.norm() else None
