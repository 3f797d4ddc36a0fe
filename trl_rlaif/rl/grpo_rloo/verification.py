"""Compares what TRL's group trainers compute of padded prompts with plain forward passes, before they train."""

from __future__ import annotations

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
    from trl_rlaif.rl.grpo_rloo.trainer import RehearsalMixin

# How many prompts are looked at, and how long responses to some of them are.
_PROMPTS, _TOKENS = 64, 16
_FIX = "Set algorithm: ppo, which finds a way to compute such models, or use another model."


@torch.no_grad()
def verify(trainer: RehearsalMixin) -> None:
    """Sample a few short responses to the shortest prompts, padded to the longest, and compare log-probabilities.

    Random numbers are left as they were.

    Raises:
        UserError: Rounding does not explain how far they are from plain forward passes.
    """
    model = trainer.scorer.role_models.model("policy")
    training = trainer.model.training
    with failing_together(trainer.accelerator), seeded(trainer.args.seed, "verification"):
        trainer.model.eval()
        responses, sampled = _sampled(trainer, model)
        found = sampled, *(_logprobs(trainer, part, responses) for part in ("policy", "reference"))
        device, temperature = trainer.accelerator.device, trainer.args.temperature
        found = verification.deviations(
            trainer.scorer.role_models,
            responses,
            found,
            trainer.args,
            device,
            temperature,
        )
        trainer.model.train(training)
        limit = verification.tolerance(trainer.scorer.role_models, trainer.args)
        # TRL takes no log-probabilities from sampling; with vLLM, the model does not sample.
        sampled_well = found.sampling <= max(limit, verification.MOST) or getattr(trainer, "use_vllm", False)
        if not (sampled_well and found.forward_within(limit)):
            raise verification.error(type(model).__name__, found, limit, fix=_FIX)


def _sampled(trainer: RehearsalMixin, model: Any) -> tuple[Responses, torch.Tensor]:
    """Responses, with the log-probabilities recorded while sampling; of which prompts, is the same in all processes."""
    scorer, args, tokenizer = trainer.scorer, trainer.args, trainer.processing_class
    prompts = sorted(scorer.selection.prompts[:_PROMPTS]["input_ids"], key=len)
    chosen = [*prompts[:-1][: verification.ROWS - 1], prompts[-1]]
    responses = as_responses(
        [RehearsalPair("", "", None, None, "", ids, [0]) for ids in chosen], trainer.accelerator.device
    )
    with scorer.role_models.role("policy"), autocast(args, trainer.accelerator.device):
        response_ids, logprobs = generate(
            model,
            responses.prompt_ids,
            responses.prompt_mask,
            max_new_tokens=min(_TOKENS, args.max_completion_length),
            temperature=args.temperature,
            pad_id=tokenizer.pad_token_id,
            stop_id=scorer.reader.end_ids,
        )
    lengths, _ = response_lengths(response_ids, stop_ids=scorer.reader.end_ids, pad_id=tokenizer.pad_token_id)
    return replace(responses, response_ids=response_ids, lengths=lengths), logprobs


def _logprobs(trainer: RehearsalMixin, part: str, responses: Responses) -> torch.Tensor:
    """(B, T) float32, by TRL's own forward pass."""
    inputs = model_inputs(*responses.sequences(slice(None)))
    with trainer.scorer.role_models.role(part):
        found = trainer._get_per_token_logps_and_entropies(
            trainer.model, inputs["input_ids"], inputs["attention_mask"], responses.response_ids.shape[1]
        )
    return found[0]
