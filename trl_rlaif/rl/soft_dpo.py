"""DPOTrainer on soft labels: TRL's own smooths all labels by one constant, or takes them as certain."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from trl import DPOConfig, DPOTrainer

from trl_rlaif.errors import RunError
from trl_rlaif.reward.losses import soft_preference_loss


def takes_soft_labels(config: DPOConfig) -> bool:
    """Whether the loss is plain DPO, the logistic loss of one difference: other losses have no p."""
    plain = config.loss_type == ["sigmoid"] and not config.loss_weights and not config.use_weighting
    return plain and not getattr(config, "use_liger_kernel", False)  # its fused loss does not expose the differences


class SoftDPOTrainer(DPOTrainer):
    """TRL's trainer with a column ``p``, the probability in [0, 1] that ``chosen`` is preferred.

    L = -[p log s(h) + (1 - p) log s(-h)] with h = beta * (log-ratio of chosen - log-ratio of rejected) and s the
    sigmoid: DPO (Rafailov et al. 2023, eq. 7) with a label smoothing of 1 - p for each pair. For p = 1, it is exactly
    TRL's loss.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.data_collator = partial(_with_labels, self.data_collator)  # picklable, for a data loader's workers

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "p" not in self._signature_columns:
            self._signature_columns.append("p")

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss plus the labels' term (1 - p) h, since log s(-h) = log s(h) - h.

        Raises:
            RunError: TRL does not compute its loss in the way that this relies on.
        """
        p, beta = inputs.pop("p"), self.beta
        self.beta = _Remembering(beta)  # TRL first multiplies it with the difference
        try:
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            products = self.beta.products
        finally:
            self.beta = beta
        loss = found[0] if return_outputs else found
        self._check(products, loss)
        loss = loss + ((1 - p.to(loss)) * products[0]).mean()
        return (loss, found[1]) if return_outputs else loss

    def _check(self, products: list[torch.Tensor], loss: torch.Tensor) -> None:
        """Check that the first product gives TRL's loss; a router's loss (MoE) is added to it."""
        if products and (self.aux_loss_enabled or _is_loss_of(products[0].detach(), loss)):
            return
        raise RunError(
            "This release of TRL computes DPO's loss in a way that does not support soft labels.",
            fix="Install TRL 1.12 to 1.16, or use rl.loss_type: [hinge], which treats every label as certain.",
        )


def _is_loss_of(h: torch.Tensor, loss: torch.Tensor) -> bool:
    hard = soft_preference_loss(h, torch.zeros_like(h), torch.ones_like(h))
    return torch.allclose(hard, loss.detach().to(hard), rtol=1e-3, equal_nan=True)


class _Remembering(float):
    """A number that records the products it takes part in."""

    products: list[Any]

    def __new__(cls, value: float) -> _Remembering:
        number = super().__new__(cls, value)
        number.products = []
        return number

    def __mul__(self, other: Any) -> Any:
        self.products.append(float(self) * other)
        return self.products[-1]


def _with_labels(
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]], examples: list[dict[str, Any]]
) -> dict[str, Any]:
    return collator(examples) | {"p": torch.tensor([example["p"] for example in examples])}
