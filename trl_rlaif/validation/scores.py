"""The contract for a reward transform's scores and loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trl_rlaif.validation.blame import ContractViolation, Origin

if TYPE_CHECKING:
    import torch

    from trl_rlaif.types import PreferenceScores, ScoredBatch


def check_scores(found: Any, given: torch.Tensor) -> None:
    """Check that a transform returned finite float32 scores with the shape and device of the given ones.

    Raises:
        ContractViolation: It did not.
    """
    import torch

    if not isinstance(found, torch.Tensor):
        raise ContractViolation(f"returns a {type(found).__name__}", "Return a tensor: one score a response.")
    if found.shape != given.shape:
        raise ContractViolation(
            f"returns the shape {tuple(found.shape)} for {tuple(given.shape)}", "Return one score a response."
        )
    if found.dtype != torch.float32:
        raise ContractViolation(f"returns {found.dtype}", "Return float32 scores, with .float().")
    if found.device != given.device:
        raise ContractViolation(
            f"returns scores on {found.device} for {given.device}", "Return them with .to(scores.device)."
        )
    if not found.isfinite().all():
        raise ContractViolation(
            "returns scores that are not finite", "Guard divisions and logarithms: a spread may be 0."
        )


def check_loss(loss: Any) -> None:
    """Check that a transform's loss is a finite scalar tensor.

    Raises:
        ContractViolation: It is not.
    """
    import torch

    if _is_finite_scalar(loss):
        return
    shown = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) and loss.dim() else repr(loss)
    raise ContractViolation(
        f"gives {shown} as its loss", "Return a finite scalar tensor, the mean over the comparisons, or None."
    )


def _is_finite_scalar(loss: Any) -> bool:
    import torch

    return isinstance(loss, torch.Tensor) and not loss.dim() and bool(loss.isfinite())


def transform_call(
    method: str, origin: Origin, transform: Callable[..., Any], scores: torch.Tensor, batch: ScoredBatch
) -> torch.Tensor:
    """A method of a transform that maps scores, validated."""
    with origin.blamed(f"{method}()"):
        found = transform(scores, batch)
        check_scores(found, scores)
    return found


def loss_call(origin: Origin, loss: Callable[..., Any], scores: PreferenceScores) -> torch.Tensor | None:
    """``RewardTransform.loss`` of a component, validated."""
    with origin.blamed("loss()"):
        found = loss(scores)
        # The loss of a diverged model is not the transform's fault. The scores are read only if needed, since each
        # read waits for the GPU.
        sound = found is None or _is_finite_scalar(found)
        diverged = not sound and not (scores.chosen.isfinite().all() and scores.rejected.isfinite().all())
        if found is not None and not diverged:
            if not sound:
                check_loss(found)
            if scores.chosen.requires_grad and not found.requires_grad:
                fix = "Compute it from scores.chosen and scores.rejected, without detach()."
                raise ContractViolation("gives a loss without gradient", fix)
    return found
