"""Compares a rollout's log-probabilities with plain forward passes: one sequence at a time, no padding, no cache."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from trl_rlaif.errors import UserError
from trl_rlaif.models.forward import token_logprobs
from trl_rlaif.models.kernels import HEAD_ELEMENTS, autocast
from trl_rlaif.models.role_models import RoleModels
from trl_rlaif.models.shared_model import inner_model
from trl_rlaif.types import Responses

ROWS = 4
_SCORES = HEAD_ELEMENTS // 4  # of one row that are alive at once, in several copies
# Mean differences in nats that rounding explains. With tiny random models of 60 families, which amplify it, and with
# SmolLM2-135M, the largest were 2e-5 in float32 and 0.1 in bfloat16; faults of padding or of the cache made 1e-3 to 2.
_LEAST = 2e-4
_EPSILONS = 32
# Beyond this, the responses are no longer the policy's, whatever their log-probabilities are.
MOST = _EPSILONS * torch.finfo(torch.bfloat16).eps
PADDING = (
    "%s: log-probabilities differ from those of a plain forward pass by %s, in nats per token. From now on, batches "
    "hold prompts of equal length, without left padding, which is slower."
)
CACHE = (
    "%s: log-probabilities differ from those of a plain forward pass by %s, in nats per token. From now on, they are "
    "computed by a separate forward pass."
)
_MATMUL = {"high": 2.0**-10, "medium": 2.0**-7}  # TF32 and bfloat16


@dataclass(frozen=True)
class Deviations:
    """Mean absolute differences between log-probabilities and those of plain forward passes, nats per token.

    They are differences of logits: multiplied by the temperature, by which logits are divided.

    Args:
        sampling: Of the log-probabilities recorded with the responses.
        policy: Of the policy's padded forward pass, as in a training step.
        reference: Of the reference's.
        tokens: Number of tokens.
    """

    sampling: float
    policy: float
    reference: float
    tokens: int

    def within(self, limit: float) -> bool:
        """Whether none is larger, or NaN."""
        return self.forward_within(limit) and self.sampling <= limit

    def forward_within(self, limit: float) -> bool:
        """The same for the forward passes only."""
        return self.policy <= limit and self.reference <= limit

    def __str__(self) -> str:
        return f"{self.sampling:.2g} while sampling, {self.policy:.2g} in the policy's forward pass, " + (
            f"{self.reference:.2g} in the reference's"
        )


def tolerance(role_models: RoleModels, args: Any) -> float:
    """The mean difference in nats per token that rounding explains, in the precision in use.

    32 units of the coarsest rounding: 0.25 in bfloat16 and NF4, 0.03 in float16 and TF32; 2e-4 in float32.
    """
    models: list[nn.Module] = [role_models.model(part) for part in ("policy", "reference")]
    dtypes = {p.dtype for model in models for p in model.parameters() if p.is_floating_point()}
    computed = (getattr(module, "compute_dtype", None) for model in models for module in model.modules())
    dtypes |= {dtype for dtype in computed if isinstance(dtype, torch.dtype)}  # of 4-bit layers
    if args.bf16:
        dtypes.add(torch.bfloat16)
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    return max(_LEAST, _EPSILONS * max(coarsest, _MATMUL.get(torch.get_float32_matmul_precision(), 0.0)))


def chosen_rows(responses: Responses) -> torch.Tensor:
    """The rows to compare, (at most 4,) int64 on the CPU: the shortest prompts, and the longest, to pad them to."""
    order = responses.by_length(torch.arange(len(responses.prompts)))
    return torch.cat((order[:-1][: ROWS - 1], order[-1:]))


@torch.no_grad()
def deviations(
    role_models: RoleModels,
    responses: Responses,
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    args: Any,
    device: torch.device,
    temperature: float,
) -> Deviations:
    """How far some rows' log-probabilities are from plain forward passes of the same models in the same precision.

    Args:
        found: (B, T) float32 each, of which the chosen rows are read: the policy's as recorded while sampling, the
            policy's by a forward pass, and the reference's.
        args: Whether bf16 autocast is on.
        temperature: Of all of them.
    """
    rows = chosen_rows(responses)
    sums, tokens = torch.zeros(3, dtype=torch.float64), 0
    for row in rows.tolist():
        with autocast(args, device):
            policy, reference = (
                _plain(role_models, part, responses, row, temperature) for part in ("policy", "reference")
            )
        for i, (logprobs, plain) in enumerate(zip(found, (policy, policy, reference), strict=True)):
            sums[i] += (logprobs[row, : len(plain)] - plain).abs().sum().cpu() * temperature
        tokens += len(policy)
    return Deviations(*(sums / max(1, tokens)).tolist(), tokens=tokens)


def worst(own: Deviations, accelerator: Accelerator) -> Deviations:
    """The largest deviations of all processes; NaN is the largest."""
    every = torch.tensor(gather_object([(own.sampling, own.policy, own.reference, own.tokens)]))
    return Deviations(*every[:, :3].amax(0).tolist(), tokens=int(every[:, 3].sum()))


def error(name: str, found: Deviations, limit: float, *, fix: str = "") -> UserError:
    """For a model whose log-probabilities stay wrong whatever is tried."""
    return UserError(
        f"{name}: log-probabilities of {found.tokens} sampled tokens differ from those of a plain forward pass by "
        f"{found}, in nats per token; rounding explains {limit:.2g}. A policy cannot learn from them. The fault is in "
        f"transformers {transformers.__version__} or TRL, in the code for this model.",
        fix=fix
        or ("Set generation: vllm, or use" if found.forward_within(limit) else "Use")
        + " another version of transformers, or another model.",
    )


def _plain(role_models: RoleModels, part: str, responses: Responses, row: int, temperature: float) -> torch.Tensor:
    """(n,) float32 log-probabilities of a row's response, or of its beginning if the vocabulary is large."""
    with role_models.role(part):
        model = inner_model(role_models.model(part))
        most = max(16, _SCORES // model.config.get_text_config().vocab_size)
        response = responses.response_ids[row, : min(responses.response_lengths[row], most)]
        first = responses.prompt_ids.shape[1] - responses.prompt_lengths[row]
        ids = torch.cat((responses.prompt_ids[row, first:], response))[None]
        # The logits of a long prompt would take more memory than a training step does.
        known = "logits_to_keep" in inspect.signature(model.forward).parameters
        keep = {"logits_to_keep": len(response) + 1} if known else {}
        logits = model(input_ids=ids, use_cache=False, **keep).logits[:, -len(response) - 1 : -1]
        return token_logprobs(logits, response[None], temperature)[0]
