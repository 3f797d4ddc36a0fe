"""Compares TRL's group trainers' results on padded prompts with plain forward passes, before training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from trl_rlaif.distributed import failing_together
from trl_rlaif.generation import seeded
from trl_rlaif.models.forward import as_responses, model_inputs
from trl_rlaif.models.kernels import autocast
from trl_rlaif.rl import verification
from trl_rlaif.rl.rollouts import generate, response_lengths
from trl_rlaif.types import RehearsalPair, Responses

if TYPE_CHECKING:
    from trl_rlaif.rl.grpo_rloo.scoring import GroupScorer

# Number of prompts considered, and length of the responses to some of them.
_PROMPTS, _TOKENS = 64, 16
_FIX = "Set algorithm: ppo, which finds a way to compute such models, or use another model."


@torch.no_grad()
def verify(scorer: GroupScorer, logprobs: Callable[[Any, Any, int], torch.Tensor], *, samples: bool) -> None:
    """Sample a few short responses to the shortest prompts, padded to the longest, and compare log-probabilities.

    The random state is preserved.

    Args:
        scorer: Its trainer's prompts and models are used.
        logprobs: TRL's own: of input_ids (B, S) and attention_mask (B, S), those of the last T tokens, (B, T) float32.
        samples: Whether the model itself draws the responses.

    Raises:
        UserError: They differ from plain forward passes by more than rounding explains.
    """
    args, accelerator, policy, roles = scorer.args, scorer.accelerator, scorer.shared.peft, scorer.role_models
    training = policy.training
    with failing_together(accelerator), seeded(args.seed, "verification"):
        policy.eval()
        responses, sampled = _sampled(scorer)
        inputs = model_inputs(*responses.sequences(slice(None)))
        found = [sampled]
        for part in ("policy", "reference"):
            with roles.role(part):
                ids, mask = inputs["input_ids"], inputs["attention_mask"]
                found.append(logprobs(ids, mask, responses.response_ids.shape[1]))
        own = verification.deviations(roles, responses, tuple(found), args, accelerator.device, args.temperature)
        policy.train(training)
        limit = verification.tolerance(roles, args)
        # TRL takes no log-probabilities from sampling.
        sampled_well = not samples or own.sampling <= max(limit, verification.MOST)
        if not (sampled_well and own.forward_within(limit)):
            raise verification.error(type(roles.model("policy")).__name__, own, limit, fix=_FIX)


def _sampled(scorer: GroupScorer) -> tuple[Responses, torch.Tensor]:
    """Responses, with the log-probabilities recorded while sampling; the prompts are the same in all processes."""
    args, device, reader = scorer.args, scorer.accelerator.device, scorer.reader
    ends, pad_id = reader.end_ids, reader.tokenizer.pad_token_id
    prompts = sorted(scorer.selection.prompts[:_PROMPTS]["input_ids"], key=len)
    chosen = [*prompts[:-1][: verification.ROWS - 1], prompts[-1]]
    responses = as_responses([RehearsalPair("", "", None, None, "", ids, [0]) for ids in chosen], device)
    with scorer.role_models.role("policy"), autocast(args, device):
        response_ids, logprobs = generate(
            scorer.role_models.model("policy"),
            responses.prompt_ids,
            responses.prompt_mask,
            max_new_tokens=min(_TOKENS, args.response_length),
            temperature=args.temperature,
            pad_id=pad_id,
            stop_id=ends,
        )
    lengths, _ = response_lengths(response_ids, stop_ids=ends, pad_id=pad_id)
    return replace(responses, response_ids=response_ids, lengths=lengths), logprobs
