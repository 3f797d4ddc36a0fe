"""Measures forgetting during PPO on prompt sets: win rate over the initial policy, and NLL of its good answers."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from trl_rlaif.batching import length_batches
from trl_rlaif.distributed import divided, dividing, failing_together
from trl_rlaif.encoding import PromptLike, encode_prompt
from trl_rlaif.errors import UserError
from trl_rlaif.evaluation import win_rate
from trl_rlaif.generation import padded_together, sample_responses, seeded
from trl_rlaif.models import forward
from trl_rlaif.models.forward import RolloutSlice, as_responses
from trl_rlaif.models.kernels import autocast
from trl_rlaif.models.role_models import RoleModels
from trl_rlaif.models.sharding import gathered
from trl_rlaif.types import RehearsalPair

if TYPE_CHECKING:
    from trl_rlaif.responses import ResponseReader

logger = logging.getLogger(__name__)

Preferred = Callable[[list[PromptLike], list[str], list[str]], Sequence[float | None]]

_PREFIX = "forgetting/"


@dataclass(frozen=True)
class StartAnswers:
    """The initial policy's greedy answers to a set of prompts.

    Args:
        prompts: Text, or messages, N entries.
        prompt_ids: Their tokens, N sequences.
        texts: The answers, N entries.
        good: The answers worth keeping, with the end token if there was one; at least one.
    """

    prompts: list[PromptLike]
    prompt_ids: list[list[int]]
    texts: list[str]
    good: list[RehearsalPair]


class ForgettingTracker(TrainerCallback):
    """Measures on sets of prompts, during PPO, whether the policy forgets abilities of the initial policy.

    ``trainer.add_callback(ForgettingTracker(trainer, sets, preferred))`` logs for each set
    ``forgetting/<set>/win_rate``, the fraction of its greedy answers that are preferred over the initial policy's (ties
    count half), ``forgetting/<set>/nll``, the NLL of the initial policy's good answers in nats per token at temperature
    1, and ``time/forgetting``; the first time before the first update. Training is unaffected: its numbers are those of
    a run without the tracker. With several processes, the first one measures while the others wait, or they divide the
    work.

    Args:
        trainer: A PPOTrainer, whose reference is the initial policy; or another trainer, with the last three arguments.
        sets: Prompts by name, as text or messages.
        preferred: ``f(prompts, policy_answers, start_answers)`` returns for each prompt the probability that the
            policy's answer is better, or None if it is unknown. Equal answers are ties and are not passed to it.
        every: Measure after this many updates; below 1: a fraction of all updates. The last update is always measured.
        score: With GRPOTrainer's signature, given ``prompt_ids`` beside ``prompts``, ``completions`` and
            ``completion_ids``: the half of the start's answers with the highest scores are its good ones. None: all.
        stop_below: Win rates by set, 0..1, below which training stops.
        max_new_tokens: Maximum answer length in tokens; None: ``args.response_length``.
        batch_size: Sequences per batch.
        role_models: Models of policy and reference; None: the trainer's.
        reader: Reader of responses; None: the trainer's.
        log: Function that receives the metrics; None: the trainer's ``log``.
        divides: Several processes divide the work: each calls ``preferred`` and ``score``, which give the same in all.

    Attributes:
        start: The initial policy's answers by set, once training has begun (in the processes that measure).
        stopped: Why training was stopped: ``set``, ``update``, ``win_rate`` and ``limit``; None if it was not.

    Raises:
        UserError: A set is empty, ``stop_below`` names an unknown set, or a prompt leaves no room for its answer.
    """

    def __init__(
        self,
        trainer: Any,
        sets: Mapping[str, Sequence[PromptLike]],
        preferred: Preferred,
        *,
        every: float = 0.1,
        score: Callable[..., Sequence[float]] | None = None,
        stop_below: Mapping[str, float] | None = None,
        max_new_tokens: int | None = None,
        batch_size: int = 16,
        role_models: RoleModels | None = None,
        reader: ResponseReader | None = None,
        log: Callable[[dict[str, float]], None] | None = None,
        divides: bool = False,
    ) -> None:
        self.trainer, self.preferred, self.score = trainer, preferred, score
        self.role_models, self.reader = role_models or trainer.role_models, reader or trainer.reader
        self._write = log or trainer.log
        self.every, self.batch_size, self.divides = every, batch_size, divides
        self.stop_below = dict(stop_below or {})
        self.max_new_tokens = max_new_tokens or trainer.args.response_length
        unknown = [name for name in self.stop_below if name not in sets]
        if unknown:
            raise UserError(f"stop_below names '{unknown[0]}', which is not one of the sets.")
        self.start: dict[str, StartAnswers] = {}
        self.stopped: dict[str, Any] | None = None
        self._sets = {name: [(prompt, self._encoded(name, prompt)) for prompt in found] for name, found in sets.items()}
        empty = [name for name, found in self._sets.items() if not found]
        if empty:
            raise UserError(f"The set '{empty[0]}' has no prompts.")

    # ---- What the trainer calls -----------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Generate the initial policy's answers; measure, unless a resumed run has been measured before."""
        self.stopped = None
        logged = self._logged()
        if state.global_step == 0 or not logged:
            self._log(control, begin=True)
            return
        with self._alone():
            if self._measures:
                self._take_start()
        # A stopped run must not continue because it was resumed.
        self._check(logged[-1], logged[-1]["step"], control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, if due."""
        every = self.every if self.every >= 1 else math.ceil(self.every * state.max_steps)
        if state.global_step % every == 0 or state.global_step >= state.max_steps:
            self._log(control)

    # ---- Measuring ------------------------------------------------------------------------------------

    def numbers(self) -> dict[str, dict[str, float]]:
        """By set: the number of prompts and good answers, and the first and last measurements."""
        found: dict[str, dict[str, float]] = {}
        for name, start in self.start.items():
            found[name] = {"prompts": len(start.prompts), "good": len(start.good)}
            for key in ("win_rate", "nll"):
                values = [entry[k] for entry in self._logged() if (k := f"{_PREFIX}{name}/{key}") in entry]
                if values:
                    found[name] |= {f"{key}_first": values[0], f"{key}_last": values[-1]}
        return found

    def _logged(self) -> list[dict[str, Any]]:
        history = self.trainer.state.log_history
        return [entry for entry in history if any(key.startswith(_PREFIX) for key in entry)]

    def _log(self, control: Any, *, begin: bool = False) -> None:
        trainer, began, found = self.trainer, time.monotonic(), {}
        with self._alone():
            if self._measures:
                if begin:
                    self._take_start()
                # Before the first update, the policy is the initial one.
                found = self._measured(is_start=begin and trainer.state.global_step == 0)
        found = broadcast_object_list([found])[0]
        self._write({**found, "time/forgetting": time.monotonic() - began})
        self._check(found, trainer.state.global_step, control)

    @property
    def _measures(self) -> bool:
        return self.divides or self.trainer.accelerator.is_main_process

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Leave training unaffected by what is computed inside; a failing process stops all."""
        trainer, training = self.trainer, self.trainer.model.training
        trainer.model.eval()
        seed = seeded(trainer.args.seed, "forgetting", trainer.state.global_step)
        together = dividing() if self.divides else failing_together(trainer.accelerator)
        with gathered(trainer.model), together, seed, torch.no_grad():
            yield
        trainer.model.train(training)

    def _check(self, found: dict[str, float], step: int, control: Any) -> None:
        """End the run if a set's win rate has fallen below its limit."""
        state = self.trainer.state
        for name, limit in self.stop_below.items():
            rate = found.get(f"{_PREFIX}{name}/win_rate")
            if rate is None or rate >= limit or step >= state.max_steps:
                continue
            self.stopped = {"set": name, "update": step, "win_rate": rate, "limit": limit}
            control.should_training_stop = True
            # As transformers does at the end of a run.
            control.should_save |= self.trainer.args.save_strategy != "no"
            if self.trainer.accelerator.is_main_process:
                logger.warning(
                    "Stopped at update %d of %d: on the set '%s', the win rate over the initial policy fell to %.1f%%, "
                    "below %.1f%%.", step, state.max_steps, name, 100 * rate, 100 * limit,
                )  # fmt: skip
            return

    def _measured(self, *, is_start: bool) -> dict[str, float]:
        found: dict[str, float] = {}
        role_models, part = self.role_models, "reference" if is_start else "policy"
        for name, start in self.start.items():
            given: Sequence[float | None] = [0.5]
            if not is_start:
                answers = self._texts(self._answers("policy", start.prompt_ids), start.prompt_ids)
                given = preferences(self.preferred, start.prompts, answers, start.texts)
            judged = [p for p in given if p is not None]
            if judged:
                found[f"{_PREFIX}{name}/win_rate"] = win_rate(judged)["win_rate"]
            with autocast(self.trainer.args, self._device):
                nll = mean_nll(role_models, part, start.good, batch_size=self.batch_size, device=self._device)
            found[f"{_PREFIX}{name}/nll"] = nll
        return found

    def _take_start(self) -> None:
        """Reproducible after resuming: decoding is greedy, and the reference does not change."""
        for name, rows in self._sets.items():
            prompts, prompt_ids = (list(column) for column in zip(*rows, strict=True))
            answers = self._answers("reference", prompt_ids)
            texts, kept = self._texts(answers, prompt_ids), range(len(rows))
            if self.score is not None:
                with autocast(self.trainer.args, self._device):
                    scores = self.score(
                        prompts=prompts, completions=texts, completion_ids=answers, prompt_ids=prompt_ids
                    )
                kept = better_half(scores)
            good = [answer_pair(prompts[i], texts[i], prompt_ids[i], answers[i]) for i in kept]
            self.start[name] = StartAnswers(prompts, prompt_ids, texts, good)

    def _answers(self, part: str, prompt_ids: list[list[int]]) -> list[list[int]]:
        """Greedy, with the end token if there was one."""
        trainer = self.trainer
        answers: list[list[int]] = [[]] * len(prompt_ids)
        role_models, tokenizer = self.role_models, trainer.processing_class
        model = role_models.model(part)

        def draw(batch: list[int]) -> list[list[list[int]]]:
            return sample_responses(
                model,
                tokenizer,
                [prompt_ids[i] for i in batch],
                max_new_tokens=self.max_new_tokens,
                temperature=0,
                stop_ids=self.reader.end_ids,
                keep_end=True,
                bf16=trainer.args.bf16,
            )

        with role_models.role(part):
            for batch, drawn in divided(length_batches([len(ids) for ids in prompt_ids], self.batch_size), draw):
                for i, [ids] in zip(batch, drawn, strict=True):
                    answers[i] = ids
        return answers

    def _texts(self, answers: list[list[int]], prompt_ids: list[list[int]]) -> list[str]:
        read = self.reader.read
        return [read(ids, prompt).answer.strip() for ids, prompt in zip(answers, prompt_ids, strict=True)]

    def _encoded(self, name: str, prompt: PromptLike) -> list[int]:
        model, ids = self.role_models.model("policy"), encode_prompt(self.trainer.processing_class, prompt)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit and len(ids) + self.max_new_tokens > limit:
            raise UserError(
                f"A prompt of the set '{name}' has {len(ids)} tokens: the model's {limit} leave no room for "
                f"{self.max_new_tokens} more.",
                fix="Leave it out, or lower max_new_tokens.",
            )
        return ids

    @property
    def _device(self) -> torch.device:
        return self.trainer.accelerator.device


# ---- Shared with the stage evaluate ----------------------------------------------------------------------


def answer_pair(prompt: PromptLike, text: str, prompt_ids: list[int], response_ids: list[int]) -> RehearsalPair:
    """One of the initial policy's answers, in the form used for computing NLLs."""
    return RehearsalPair(prompt, text, None, None, "the start's own answer", prompt_ids, response_ids)


def better_half(scores: Sequence[float]) -> list[int]:
    """Indices of the better half of N scores, rounded up, in order. Of equal ones, the first."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return sorted(order[: -(-len(scores) // 2)])


def preferences(
    preferred: Preferred, prompts: Sequence[PromptLike], policy: Sequence[str], start: Sequence[str]
) -> list[float | None]:
    """Probability for each prompt that the policy's answer is preferred; equal answers are ties and not judged.

    Args:
        preferred: As in ForgettingTracker.
        prompts, policy, start: N prompts, and both answers to each.

    Returns:
        N values in [0, 1], None where ``preferred`` returns None.
    """
    found: list[float | None] = [0.5] * len(prompts)
    different = [i for i in range(len(prompts)) if policy[i] != start[i]]
    if different:
        asked = preferred(*([column[i] for i in different] for column in (prompts, policy, start)))
        for i, p in zip(different, asked, strict=True):
            found[i] = None if p is None else float(p)
    return found


@torch.no_grad()
def mean_nll(
    role_models: RoleModels, part: str, pairs: Sequence[RehearsalPair], *, batch_size: int, device: torch.device
) -> float:
    """Mean NLL of the pairs' response tokens, including the end token, under the policy or reference.

    Args:
        role_models: Their ``part`` is evaluated.
        pairs: With at least one response token in total.
        batch_size: Pairs per batch.
        device: Of the models.

    Returns:
        Nats per token, at temperature 1: the mean over all tokens, as minimized by rehearsal.
    """

    def nll(batch: list[int]) -> float:
        responses = as_responses([pairs[i] for i in batch], device)
        logprobs, _ = forward.logprobs(role_models, part, RolloutSlice.of(responses, torch.arange(len(batch))), 1.0)
        return -logprobs.double().sum().item()

    together = [
        [batch[i] for i in group]
        for batch in length_batches([len(p.prompt_ids) + len(p.response_ids) for p in pairs], batch_size)
        for group in padded_together(role_models.model(part), [len(pairs[i].prompt_ids) for i in batch])
    ]
    total = sum(of_batch for _, of_batch in divided(together, nll))
    return total / sum(len(pair.response_ids) for pair in pairs)
