"""Log-probabilities of responses under several policies: the importance weights of the Advantage Model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from trl_rlaif.batching import pad_rows, token_batches
from trl_rlaif.distributed import divided
from trl_rlaif.errors import UserError
from trl_rlaif.models.kernels import is_plain, token_logprobs_of
from trl_rlaif.models.shared_model import backbone, inner_model

if TYPE_CHECKING:
    from datasets import Dataset


@torch.no_grad()
def response_logprobs(
    model: Any, sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int], *, batch_tokens: int = 8192
) -> torch.Tensor:
    """Log-probabilities of whole responses.

    Args:
        model: Causal language model, plain or PEFT, in the desired role.
        sequences: N prompts with their responses, as tokens.
        prompt_lengths: Number of tokens of each prompt, at least 1.
        batch_tokens: Maximum tokens per forward pass, padding included.

    Returns:
        (N,) float64, nats: the sum over the response's tokens.
    """
    model.eval()
    inner, device = inner_model(model), next(model.parameters()).device
    found = torch.zeros(len(sequences), dtype=torch.float64)

    def of_batch(batch: list[int]) -> torch.Tensor:
        ids, mask = pad_rows(sequences[i] for i in batch)
        first = torch.tensor([prompt_lengths[i] for i in batch])
        wanted = mask & (torch.arange(mask.shape[1]) >= first[:, None])
        # Indices from the CPU's mask, to avoid a GPU sync. A token is predicted one position earlier.
        rows, columns = (x.to(device) for x in wanted.nonzero(as_tuple=True))
        ids, mask, before = ids.to(device), mask.to(device, torch.long), (rows, columns - 1)
        tokens = ids[rows, columns]
        if is_plain(inner):
            hidden = backbone(inner)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            logprobs, _ = token_logprobs_of(hidden[before], inner.get_output_embeddings(), tokens, 1.0)
        else:
            logits = inner(input_ids=ids, attention_mask=mask, use_cache=False).logits[before]
            logprobs = logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        sums = torch.zeros(wanted.shape, dtype=torch.float64, device=device)
        return sums.index_put((rows, columns), logprobs.double()).sum(1).cpu()

    for batch, summed in divided(token_batches([len(s) for s in sequences], batch_tokens), of_batch):
        found[batch] = summed
    return found


def add_log_ratios(dataset: Dataset, policy: Any, others: Sequence[Any], **options: Any) -> Dataset:
    """Add the columns ``chosen_log_ratios`` and ``rejected_log_ratios``: K numbers log pi(y|x) - log pi'_k(y|x) each.

    Takes one pass of K + 1 models over the data, before reward training.

    Args:
        dataset: Dataset with ``chosen_ids``, ``rejected_ids`` and ``prompt_length``.
        policy: The current policy: a causal language model, or a function that returns a context manager and a model
            (for a role of a SharedBase: ``lambda: (shared.role("policy"), shared.model)``).
        others: The K policies that wrote the responses, in the same form.
        **options: Options of ``response_logprobs``.

    Raises:
        UserError: A column is missing.
    """
    missing = {"chosen_ids", "rejected_ids", "prompt_length"} - set(dataset.column_names)
    if missing:
        raise UserError(f"The dataset has no {' and no '.join(sorted(missing))}.", fix="Tokenize the pairs first.")
    lengths = list(dataset["prompt_length"])
    for name in ("chosen", "rejected"):
        sequences = list(dataset[f"{name}_ids"])
        own, *rest = (_under(model, sequences, lengths, options) for model in (policy, *others))
        ratios = torch.stack([own - other for other in rest], 1) if rest else own.new_zeros(len(own), 0)
        dataset = dataset.add_column(f"{name}_log_ratios", ratios.tolist())
    return dataset


def _under(model: Any, sequences: list[list[int]], lengths: list[int], options: dict[str, Any]) -> torch.Tensor:
    context, model = (nullcontext(), model) if isinstance(model, torch.nn.Module) else model()
    with context:
        return response_logprobs(model, sequences, lengths, **options)
