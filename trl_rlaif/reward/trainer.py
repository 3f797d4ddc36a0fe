"""RewardTrainer: TRL's, which also learns from soft labels and through reward transforms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from trl import RewardTrainer as TrlRewardTrainer

from trl_rlaif.components import RewardTransform
from trl_rlaif.errors import UserError
from trl_rlaif.events import PreferenceScores
from trl_rlaif.reward.collator import SoftPreferenceCollator
from trl_rlaif.reward.losses import soft_preference_loss


class RewardTrainer(TrlRewardTrainer):
    """Drop-in for ``trl.RewardTrainer``.

    A column ``p``, the probability in [0, 1] that ``chosen`` is preferred, makes the labels soft (Lee et
    al. 2023, section 3.1). Without it and without transforms the parent's loss is computed.

    Args:
        *args, **kwargs: Everything that the parent takes.
        reward_transforms: Components that bring a loss of their own; at most one of them may.

    Raises:
        UserError: A ``p`` is missing or lies outside [0, 1].
    """

    def __init__(self, *args: Any, reward_transforms: Sequence[RewardTransform] = (), **kwargs: Any) -> None:
        self.reward_transforms = list(reward_transforms)
        super().__init__(*args, **kwargs)
        if kwargs.get("data_collator") is None and (len(args) < 3 or args[2] is None):
            self.data_collator = SoftPreferenceCollator(
                pad_token_id=self.processing_class.pad_token_id,
                pad_to_multiple_of=self.args.pad_to_multiple_of,
            )

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if "p" in (getattr(dataset, "column_names", None) or ()):
            bad = [i for i, p in enumerate(dataset["p"]) if p is None or not 0 <= p <= 1]
            if bad:
                raise UserError(
                    f"{len(bad)} rows have no label p in [0, 1]; the first is row {bad[0]} (counted from 0), "
                    f"with {dataset[bad[0]]['p']}."
                )
        return super()._prepare_dataset(dataset, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        # The length is for the sampler that groups by it, which sees the dataset after this choice.
        for column in ("p", "category", self.args.length_column_name):
            if column not in self._signature_columns:
                self._signature_columns.append(column)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The parent's loss and metrics; with soft labels or a transform, the loss that they ask for."""
        p, categories = inputs.pop("p", None), inputs.pop("category", None)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if p is not None or self.reward_transforms:
            chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
            if p is None:
                p = torch.ones_like(chosen)
            scores = PreferenceScores(chosen, rejected, p.to(chosen.dtype), categories or [None] * len(chosen))
            loss = self.preference_loss(scores, inputs.get("margin", 0.0))
            self._log_soft_metrics(scores, "train" if self.model.training else "eval")
        return (loss, outputs) if return_outputs else loss

    def preference_loss(self, scores: PreferenceScores, margin: torch.Tensor | float = 0.0) -> torch.Tensor:
        """The transforms' loss, if one brings any, else the soft-label loss; a scalar with gradient."""
        own = [loss for t in self.reward_transforms if (loss := t.loss(scores)) is not None]
        if len(own) > 1:
            raise UserError("Two reward transforms bring a loss of their own.", fix="Name only one of them.")
        loss = own[0] if own else soft_preference_loss(scores.chosen, scores.rejected, scores.p, margin)
        if self.args.center_rewards_coefficient is not None:
            # Eq. 2 of arXiv 2312.09244, as in the parent.
            centre = ((scores.chosen + scores.rejected) ** 2).mean()
            loss = loss + self.args.center_rewards_coefficient * centre
        return loss

    @torch.no_grad()
    def _log_soft_metrics(self, scores: PreferenceScores, mode: str) -> None:
        """Agreement with the label's own choice, where it makes one; the parent's counts ``chosen`` always."""
        decided = scores.p != 0.5
        if decided.any():
            agree = ((scores.chosen > scores.rejected) == (scores.p > 0.5))[decided].float().mean()
            self._metrics[mode]["label_agreement"].append(self.accelerator.gather(agree).mean().item())
