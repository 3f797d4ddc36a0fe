"""RewardTrainer: TRL's trainer with soft labels and reward transforms."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.utils import gather_object
from peft import PeftModel
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import RewardTrainer as TrlRewardTrainer

from trl_rlaif.compat.training_loop import resumable
from trl_rlaif.components import RewardTransform
from trl_rlaif.distributed import equal_parts
from trl_rlaif.encoding import usable_tokenizer
from trl_rlaif.errors import UserError
from trl_rlaif.hardware import use_one_gpu
from trl_rlaif.models.adapters import fitted, train_in_float32, trained_values
from trl_rlaif.models.classifier import weightless
from trl_rlaif.models.kernels import training_kernels, used
from trl_rlaif.models.safe_training import safe_training
from trl_rlaif.models.sharding import hand_over
from trl_rlaif.models.shared_model import inner_model
from trl_rlaif.reward.collator import SoftPreferenceCollator, prompt_end
from trl_rlaif.reward.heads import add_expected
from trl_rlaif.reward.losses import soft_preference_loss
from trl_rlaif.reward.scoring import PairScorer, can_pack
from trl_rlaif.run_identity import SameRun, named
from trl_rlaif.states import load_state, save_state
from trl_rlaif.stopping import ended_row, stop_ids
from trl_rlaif.types import PreferenceScores
from trl_rlaif.validation import validated

logger = logging.getLogger(__name__)

# Optional columns that the loss reads, besides those of TRL's trainer.
COLUMNS = ("p", "category", "prompt_length", "chosen_log_ratios", "rejected_log_ratios")

# The transforms' states in a checkpoint, one list per process.
TRANSFORMS = "reward_transforms.pt"


class RewardTrainer(TrlRewardTrainer):
    """Drop-in for ``trl.RewardTrainer``.

    With a column ``p``, the probability in [0, 1] that ``chosen`` is preferred, labels are soft (Lee et al. 2023,
    section 3.1). Without it and without transforms, the loss is TRL's.

    If the model supports it, a pair is computed as one row with the responses' shared prefix only once; TRL's trainer
    computes every prompt twice, and pads. The numbers are the same.

    A score is read at the end of a turn, as in PPOTrainer. TRL's trainer reads it at the last token of a row, which may
    be text that the chat template adds after the turn, such as a line break, or, if the padding token also ends turns,
    at the token before the end.

    Args:
        *args, **kwargs: All arguments of ``trl.RewardTrainer``.
        reward_transforms: Reward transforms; at most one of them may define its own loss.
        packing: None packs pairs if the model supports it and no data_collator is given; True requires it.
        batch_tokens: Maximum tokens, padding included, per forward pass over packed pairs. A batch is split into parts
            of similar length.
        score_at_end: False reads scores where TRL's trainer does. A dataset with ``chosen_ids`` is used as it is; for a
            transform that reads e(x), it should also have ``prompt_length``.

    Raises:
        UserError: A ``p`` is missing or outside [0, 1]; packing is True but not supported; LoRA does not work on the
            target modules; or, during training, a transform's loss is not a finite scalar.
    """

    def __init__(
        self,
        *args: Any,
        reward_transforms: Sequence[RewardTransform] = (),
        packing: bool | None = None,
        batch_tokens: int = 8192,
        score_at_end: bool = True,
        **kwargs: Any,
    ) -> None:
        self.reward_transforms, self.batch_tokens = [validated(t) for t in reward_transforms], batch_tokens
        self.score_at_end = score_at_end
        model = kwargs["model"] if "model" in kwargs else args[0]
        if isinstance(model, str):
            model = weightless(model)  # TRL's trainer then finds its class
        if kwargs.get("peft_config") is not None:
            kwargs["peft_config"] = fitted(kwargs["peft_config"], model)
        values = trained_values(model)
        super().__init__(*args, **kwargs)
        train_in_float32(self, values)
        self._same_run = SameRun(self, **named("reward_transforms", self.reward_transforms))
        self.add_callback(self._same_run)
        own_collator = kwargs.get("data_collator") is None and (len(args) < 3 or args[2] is None)
        if score_at_end and own_collator and self.processing_class.eos_token_id is not None:
            # Also the model's: a plain transformers class that loads it finds a row's end by it.
            pad_id = usable_tokenizer(self.processing_class).pad_token_id
            inner_model(self.model).config.get_text_config().pad_token_id = pad_id
        if any(transform.needs_expected for transform in self.reward_transforms):
            add_expected(self.model)
        if own_collator:
            self.data_collator = SoftPreferenceCollator(
                pad_token_id=self.processing_class.pad_token_id,
                pad_to_multiple_of=self.args.pad_to_multiple_of,
                packed=packing is not False and self._can_pack(insist=packing is True),
            )
        if isinstance(self.model, PeftModel):
            hand_over(self)

    def create_accelerator_and_postprocess(self) -> None:
        """As in TRL's trainer, on one GPU in each process."""
        use_one_gpu(self.args)
        super().create_accelerator_and_postprocess()

    def _can_pack(self, *, insist: bool) -> bool:
        if not insist and not used("packing", self.args.device):
            return False
        if can_pack(self.model, self.args.device):  # where it is trained: it may still be elsewhere
            if self.args.ddp_broadcast_buffers is None and self.accelerator.ddp_handler is not None:
                # DDP would synchronize in every forward pass, and processes make different numbers of them.
                # The models' buffers (rotary frequencies) are the same everywhere.
                self.accelerator.ddp_handler.broadcast_buffers = False
            return True
        what = f"{type(inner_model(self.model)).__name__} cannot be trained on packed pairs"
        if insist:
            raise UserError(f"{what}.", fix="Leave out packing=True.")
        logger.info("%s; every prompt is computed twice.", what)
        return False

    def _prepare_dataset(self, dataset: Any, processing_class: Any, *args: Any, **kwargs: Any) -> Any:
        if "p" in (getattr(dataset, "column_names", None) or ()):
            bad = [i for i, p in enumerate(dataset["p"]) if p is None or not 0 <= p <= 1]
            if bad:
                raise UserError(
                    f"{len(bad)} rows have no label p in [0, 1]; the first is row {bad[0]} (counted from 0), "
                    f"with {dataset[bad[0]]['p']}."
                )
        tokenized = "chosen_ids" in (getattr(dataset, "column_names", None) or next(iter(dataset)))
        dataset = super()._prepare_dataset(dataset, processing_class, *args, **kwargs)
        if tokenized:
            return dataset
        reads_prompts = any(transform.needs_expected for transform in self.reward_transforms)

        def completed(row: dict[str, Any]) -> dict[str, Any]:
            sides = ("chosen_ids", "rejected_ids") if self.score_at_end else ()
            ended = {name: ended_row(row[name], processing_class) for name in sides}
            # Without it, the prompt would be the whole shared prefix, and answers often start alike.
            return ended | (prompt_end(row, processing_class) if reads_prompts else {})

        return dataset.map(completed)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        # The length is for the sampler that groups by it, which sees only the columns kept here.
        for column in (*COLUMNS, self.args.length_column_name):
            if column not in self._signature_columns:
                self._signature_columns.append(column)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's; if it groups rows by length, several processes together take the same batches as a single one."""
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.batch_size *= self.accelerator.num_processes
        return sampler

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in TRL's trainer. Under bfloat16 autocast, a PeftModel's frozen linear layers are cast to it meanwhile.

        Raises:
            UserError: ``resume_from_checkpoint`` belongs to a run with other settings or data.
            RunError: A gradient is not finite.
        """
        checkpoint = kwargs.get("resume_from_checkpoint", args[0] if args else None)
        if isinstance(checkpoint, str | Path):
            self._same_run.compare(Path(checkpoint))
        # FSDP gathers a layer's weights when that layer itself is called, and requires one dtype.
        sharded = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        bf16 = self.accelerator.mixed_precision == "bf16"
        kernels = training_kernels(self.model, bf16=bf16, packed=True, sharded=sharded)
        with safe_training(self), kernels:
            return resumable(self, partial(super().train, *args, **kwargs))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.reward_transforms:
            states = gather_object([[transform.state_dict() for transform in self.reward_transforms]])
            if self.args.should_save:
                folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
                save_state(states, folder / TRANSFORMS)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.reward_transforms and (Path(checkpoint) / TRANSFORMS).exists():
            states = load_state(Path(checkpoint) / TRANSFORMS)
            mine = states[min(self.accelerator.process_index, len(states) - 1)]  # fewer processes may have written it
            for transform, state in zip(self.reward_transforms, mine, strict=True):
                transform.load_state_dict(state)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss and metrics; with soft labels or a transform, their loss."""
        own = {name: inputs.pop(name, None) for name in ("p", "category", "chosen_log_ratios", "rejected_log_ratios")}
        parts = partial(equal_parts, self.accelerator)
        scorer = PairScorer(model, self.accelerator.unwrap_model(model), self.batch_tokens, parts=parts)
        reads_padding = "prompt_end" in inputs and self.processing_class.pad_token_id in stop_ids(self.processing_class)
        reads_padding = reads_padding and self.score_at_end
        if "segments" not in inputs and not any(t.needs_expected for t in self.reward_transforms) and not reads_padding:
            inputs.pop("prompt_end", None)
            scorer = model  # exactly as in TRL's trainer
        loss, outputs = super().compute_loss(scorer, inputs, True, num_items_in_batch)
        if own["p"] is not None or self.reward_transforms:
            chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
            p = torch.ones_like(chosen) if own["p"] is None else own["p"].to(chosen.dtype)
            scores = PreferenceScores(
                chosen,
                rejected,
                p,
                own["category"] or [None] * len(chosen),
                getattr(scorer, "expected", None),
                own["chosen_log_ratios"],
                own["rejected_log_ratios"],
            )
            loss = self.preference_loss(scores, inputs.get("margin", 0.0))
            self._log_soft_metrics(scores, "train" if self.model.training else "eval")
        return (loss, outputs) if return_outputs else loss

    def preference_loss(self, scores: PreferenceScores, margin: torch.Tensor | float = 0.0) -> torch.Tensor:
        """The transforms' loss, if one defines any, else the soft-label loss; a scalar with gradient."""
        own = [loss for t in self.reward_transforms if (loss := t.loss(scores)) is not None]
        if len(own) > 1:
            raise UserError("Two reward transforms define their own loss.", fix="Name only one of them.")
        loss = own[0] if own else soft_preference_loss(scores.chosen, scores.rejected, scores.p, margin)
        if self.args.center_rewards_coefficient is not None:
            # Eq. 2 of arXiv 2312.09244, as in TRL's trainer.
            centre = ((scores.chosen + scores.rejected) ** 2).mean()
            loss = loss + self.args.center_rewards_coefficient * centre
        return loss

    @torch.no_grad()
    def _log_soft_metrics(self, scores: PreferenceScores, mode: str) -> None:
        """Agreement with the label's choice, unless it is a tie; equal scores count half. TRL's counts ``chosen``."""
        same = (scores.chosen - scores.rejected).sign() * (scores.p - 0.5).sign()
        agree = ((1 + same) / 2).where(scores.p != 0.5, torch.nan).nanmean()
        found = self.accelerator.gather(agree).nanmean().item()
        if not math.isnan(found):
            self._metrics[mode]["label_agreement"].append(found)
