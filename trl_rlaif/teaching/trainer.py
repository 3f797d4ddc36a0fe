"""JudgeTrainer: trains an adapter so that a judge's own prompts lead to given labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from trl_rlaif.distributed import average_gradients, divided
from trl_rlaif.judging.candidates import Candidates
from trl_rlaif.judging.scoring import ContinuationScorer
from trl_rlaif.models.kernels import training_kernels
from trl_rlaif.models.sharding import share_out
from trl_rlaif.models.shared_model import inner_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import TrainingArguments

    from trl_rlaif.components import Labeler
    from trl_rlaif.judging.local import LocalJudge
    from trl_rlaif.teaching.lessons import Lesson

Row = dict[str, Any]


def tokenized(
    lessons: Sequence[Lesson], labeler: Labeler, judge: LocalJudge, longest: int | None = None
) -> tuple[list[Row], int]:
    """The judge's prompts for pairs as tokens, grouped by pair, with the target label.

    Args:
        lessons: N pairs with their targets.
        labeler: Writes the prompts; it has ``candidates``.
        judge: Its prompt template and tokenizer are used.
        longest: Maximum tokens of a prompt, at most the judge's context.

    Returns:
        Rows with ``contexts``, one token list per prompt, ``p`` and ``ratings`` as in Lesson, and ``length``, their
        total tokens; and the number of pairs left out because one of their prompts is longer.
    """
    if not lessons:
        return [], 0
    rows: list[Row] = []
    asked = [labeler.questions(lesson.pair, judge.prompt) for lesson in lessons]
    known = judge.candidates(labeler.candidates, asked[0][0].ending)
    room = max(map(len, known.continuations))
    for questions, lesson in zip(asked, lessons, strict=True):
        contexts = [known.cut(judge.encode(question, question.ending)) for question in questions]
        if max(map(len, contexts)) + room <= min(longest or judge.max_length, judge.max_length):
            row: Row = {"contexts": contexts, "length": sum(map(len, contexts)), "p": lesson.p}
            rows.append(row | {"ratings": lesson.ratings})
    return rows, len(lessons) - len(rows)


class JudgeTrainer(Trainer):
    """Trains an adapter with the cross-entropy of the exact distribution that the labeler reads.

    Prompts are packed as in labeling, if the model supports it: the shared prefix of a pair's prompts is computed
    once.

    Args:
        model: A PeftModel around a causal language model.
        args: transformers' arguments.
        train_dataset, eval_dataset: With the columns of ``tokenized``.
        labeler: Defines the loss.
        candidates: The possible completions of the prompts, as tokens.
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
        """As in transformers, with this package's kernels. Even with FSDP, every process holds the whole model."""
        share_out(self.model, self.accelerator, layers=False)
        self.is_fsdp_enabled = False
        bf16 = self.accelerator.mixed_precision == "bf16"
        with training_kernels(self.model, bf16=bf16, packed=True):
            return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in transformers. Layers recomputed by gradient checkpointing are packed as before.

        Gradients are averaged over processes here, since no pass goes through DDP.
        """
        with self.scorer.kept_packed():
            loss = super().training_step(*args, **kwargs)
        average_gradients(self.accelerator, self.model)
        return loss

    def _load_best_model(self) -> None:
        """As in transformers, which only looks for an adapter named "default" and otherwise keeps the last weights;
        its code for resuming a checkpoint finds an adapter of any name."""
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the pairs of the cross-entropy with p, or with another judge's ratings if given."""
        groups, p = inputs["contexts"], inputs["p"]
        with self.accelerator.autocast():
            logprobs = self.scorer.logprobs(groups)
        distribution = self.candidates.distribution(logprobs)
        answers = distribution.view(len(groups), -1, distribution.shape[-1])
        losses = self.labeler.teaching_loss(answers, p)
        rated = [i for i, ratings in enumerate(inputs["ratings"]) if ratings is not None]
        if rated:
            targets = answers.new_tensor([inputs["ratings"][i] for i in rated])
            both = cross_entropy(answers[rated].flatten(0, 1), targets.flatten(0, 1), reduction="none")
            losses = losses.index_copy(0, torch.tensor(rated, device=p.device), both.view(len(rated), -1).mean(1))
        return (losses.mean(), {}) if return_outputs else losses.mean()

    @torch.no_grad()
    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """The mean loss over the held-out pairs, whose batches are divided among processes."""
        self.model.eval()
        size, rows = self.args.per_device_eval_batch_size, list(self.eval_dataset)

        def summed(start: int) -> float:
            batch = rows[start : start + size]
            return len(batch) * self.compute_loss(self.model, self._prepare_inputs(_collated(batch))).item()

        loss = sum(of_batch for _, of_batch in divided(range(0, len(rows), size), summed)) / len(rows)
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": loss}, len(rows))


def _collated(rows: Sequence[Row]) -> dict[str, Any]:
    return {
        **{name: [row[name] for row in rows] for name in ("contexts", "ratings")},
        "p": torch.tensor([row["p"] for row in rows], dtype=torch.float32),
    }
