"""Scores of preference pairs by a sequence classification model, from padded or from packed rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from trl_rlaif.compute import cpu_attention
from trl_rlaif.reward.collator import SoftPreferenceCollator
from trl_rlaif.reward.heads import active_head
from trl_rlaif.reward.packing import PackedRow, pack, packed_mask, row_groups
from trl_rlaif.roles import backbone, inner_model


class PairScorer:
    """A model that is asked for the scores of pairs; called as TRL's trainer calls its model.

    It reads the last hidden states at the tokens that carry a score. The model itself is called for them, so that
    what wraps it (DDP, autocast) takes part.

    Args:
        model: Sequence classification model with a linear head ``score``, plain, PEFT or wrapped.
        unwrapped: The same without what accelerate put around it.
        batch_tokens: Most tokens, padding counted, of one forward pass over packed rows.
    """

    def __init__(self, model: nn.Module, unwrapped: nn.Module, batch_tokens: int) -> None:
        self.model, self.unwrapped, self.batch_tokens = model, unwrapped, batch_tokens
        self.expected: torch.Tensor | None = None

    def __call__(self, **inputs: Any) -> SequenceClassifierOutput:
        """Scores of a batch of ``SoftPreferenceCollator``'s.

        Returns:
            ``logits``, (2B, 1) float32: chosen, then rejected. ``expected`` of this object is then e(x), (B,) float32,
            where the head gives a second number.
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
        """(B, 3, H) hidden states at the ends of prompt, chosen and rejected."""
        lengths = inputs["attention_mask"].sum(1).tolist()
        groups = row_groups(lengths, self.batch_tokens)
        found = []
        for group in groups:
            rows = torch.tensor(group, device=inputs["input_ids"].device)
            ids, positions, segments = (
                inputs[name][rows, : lengths[group[0]]] for name in ("input_ids", "position_ids", "segments")
            )
            mask = self._attention_mask(segments)
            hidden = self._hidden(input_ids=ids, attention_mask=mask, position_ids=positions)
            found.append(hidden[torch.arange(len(rows), device=rows.device)[:, None], inputs["ends"][rows]])
        order = torch.tensor([i for group in groups for i in group]).argsort()
        return torch.cat(found)[order.to(found[0].device)]

    def _attention_mask(self, segments: torch.Tensor) -> torch.Tensor:
        mask, inner = packed_mask(segments), inner_model(self.unwrapped)
        if inner.config._attn_implementation in ("sdpa", cpu_attention.NAME):
            return mask
        dtype = inner.get_input_embeddings().weight.dtype  # the others add it to the scores
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

    def _hidden(self, **inputs: torch.Tensor) -> torch.Tensor:
        with _last_hidden(backbone(self.unwrapped)) as caught:
            self.model(**inputs, use_cache=False)
        return caught[0]

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., H) to (..., outputs), of at least float32."""
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
        batch: Pairs at once.
        tokens: Most tokens of one forward pass over packed rows.

    Returns:
        (chosen, rejected, expected), (N,) float32 each, on the CPU; the last one where the head has an e(x).
    """
    model.eval()
    scorer, device = PairScorer(model, model, tokens), next(model.parameters()).device
    scores, expected = [], []
    for start in range(0, len(examples), batch):
        rows = collator([examples[i] for i in range(start, min(start + batch, len(examples)))])
        inputs = {name: x.to(device) for name, x in rows.items() if isinstance(x, torch.Tensor)}
        scores.append(scorer(**inputs).logits[:, 0].view(2, -1).cpu())
        if scorer.expected is not None:
            expected.append(scorer.expected.cpu())
    chosen, rejected = torch.cat(scores, 1)
    return chosen, rejected, torch.cat(expected) if expected else None


@contextmanager
def _last_hidden(body: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Filled with the last hidden states of every forward pass inside."""
    caught: list[torch.Tensor] = []
    handle = body.register_forward_hook(lambda _module, _args, output: caught.append(output[0]))
    try:
        yield caught
    finally:
        handle.remove()


@torch.no_grad()
def can_pack(model: nn.Module) -> bool:
    """Whether a model gives packed rows the scores of plain ones, tried out once on a few tokens.

    Some attentions take no mask of their own (FlashAttention), or see only a window of the tokens before, and some
    models keep a state that runs through the row.
    """
    config = inner_model(model).config.get_text_config()
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return False  # the mask would have to know the window
    pairs = [([5, 9, 4, 7, 8], [5, 9, 4, 6, 3, 9]), ([4, 8, 3], [4, 7])]
    device = next(model.parameters()).device
    batch = {name: x.to(device) for name, x in pack([PackedRow.of(*pair) for pair in pairs], 0).items()}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        scorer = PairScorer(model, model, batch_tokens=2**20)
        found = scorer._packed(batch)[:, 1:]
        plain = [scorer._hidden(input_ids=torch.tensor([ids], device=device)) for pair in pairs for ids in pair]
        scorer._head(found)
    except Exception:  # whatever an architecture raises that takes no such mask, or has no such head
        return False
    finally:
        for module, training in modes.items():
            module.training = training
    expected = torch.stack([hidden[0, -1] for hidden in plain]).view_as(found).float()
    # Below float32 rounding alone makes a difference; what a wrong mask makes is larger by far.
    tolerance = 1e-4 if found.dtype == torch.float32 and not getattr(model, "is_quantized", False) else 0.05
    return bool((found.float() - expected).norm() < tolerance * expected.norm())
