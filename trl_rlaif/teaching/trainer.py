"""JudgeTrainer: an adapter is trained so that a judge's own questions lead to given labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer

from trl_rlaif.judging.candidates import Candidates
from trl_rlaif.judging.scoring import ContinuationScorer
from trl_rlaif.models.kernels import training_kernels
from trl_rlaif.models.shared_model import inner_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import TrainingArguments

    from trl_rlaif.components import Labeler
    from trl_rlaif.data import Pair
    from trl_rlaif.judging.local import LocalJudge

Row = dict[str, Any]


def tokenized(
    pairs: Sequence[Pair], p: Sequence[float], labeler: Labeler, judge: LocalJudge, longest: int | None = None
) -> tuple[list[Row], int]:
    """The judge's questions about pairs as tokens, each pair's together, with the label that they should lead to.

    Args:
        pairs, p: N pairs, and the probabilities that response_1 is preferred.
        labeler: Whose questions; it has ``candidates``.
        judge: Whose prompt and tokenizer.
        longest: Tokens that a question may have; the judge's context at most.

    Returns:
        Rows with ``contexts``, a token list for each question, ``p``, and ``length``, the tokens of all; and how many
        pairs are left out, since a question of theirs is longer.
    """
    if not pairs:
        return [], 0
    rows: list[Row] = []
    asked = [labeler.questions(pair, judge.prompt) for pair in pairs]
    known = judge.candidates(labeler.candidates, asked[0][0].ending)
    room = max(map(len, known.continuations))
    for questions, target in zip(asked, p, strict=True):
        contexts = [known.cut(judge.encode(question, question.ending)) for question in questions]
        if max(map(len, contexts)) + room <= min(longest or judge.max_length, judge.max_length):
            rows.append({"contexts": contexts, "p": target, "length": sum(map(len, contexts))})
    return rows, len(pairs) - len(rows)


class JudgeTrainer(Trainer):
    """Trains an adapter with the cross-entropy of exactly the distribution that the labeler reads.

    Questions are packed as in labeling, where the model allows it: what the questions about a pair begin with is
    computed once.

    Args:
        model: A PeftModel around a causal language model.
        args: Of transformers.
        train_dataset, eval_dataset: With the columns of ``tokenized``.
        labeler: Whose loss.
        candidates: What the questions are completed with, as the tokenizer spells it.
        pad_id: Any valid token id.
    """

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        *,
        train_dataset: Any,
        eval_dataset: Any,
        labeler: Labeler,
        candidates: Candidates,
        pad_id: int = 0,
    ) -> None:
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, data_collator=_collated
        )
        self.labeler, self.candidates = labeler, candidates
        longest = max(len(tokens) for of in (train_dataset, eval_dataset) for row in of["contexts"] for tokens in row)
        self.scorer = ContinuationScorer(inner_model(model), candidates.continuations, longest=longest, pad_id=pad_id)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with this package's kernels."""
        bf16 = self.accelerator.mixed_precision == "bf16"
        with training_kernels(self.model, bf16=bf16, packed=True):
            return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in transformers. Layers that gradient checkpointing computes again are packed as they were."""
        with self.scorer.kept_packed():
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the pairs."""
        groups, p = inputs["contexts"], inputs["p"]
        with self.accelerator.autocast():
            logprobs = self.scorer.logprobs(groups)
        distribution = self.candidates.distribution(logprobs)
        loss = self.labeler.teaching_loss(distribution.view(len(groups), -1, distribution.shape[-1]), p).mean()
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: Mapping[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """The loss alone."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None


def _collated(rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "contexts": [row["contexts"] for row in rows],
        "p": torch.tensor([row["p"] for row in rows], dtype=torch.float32),
    }
