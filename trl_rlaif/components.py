"""The kinds of component that a plugin can provide, and their typed options."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch

    from trl_rlaif.data import Pair, Prompt
    from trl_rlaif.encoding import PromptLike
    from trl_rlaif.judging.judge import Judge
    from trl_rlaif.judging.prompt import JudgePrompt
    from trl_rlaif.judging.question import Question
    from trl_rlaif.types import Label, Pool, PreferenceScores, SampledPair, ScoredBatch, Selection

    Generate = Callable[[Mapping[str, PromptLike]], dict[str, str | None]]


class Options(BaseModel):
    """Base class of a component's options: rejects unknown keys; values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Component:
    """Base class of all components; ``self.options`` holds the recipe's validated options."""

    Options: ClassVar[type[Options]] = Options
    options: BaseModel  # a subclass that sets Options annotates this with it, for type checkers and editors

    def __init__(self, **options: Any) -> None:
        self.options = self.Options(**options)


class Labeler(Component, ABC):
    """Labels pairs of responses with the probability that the first one is preferred.

    A labeler that is callable with GRPOTrainer's signature can also be a reward. ``judge`` is then the judge to ask,
    and ``failed`` gives the reason for each response for which the last call returned None.

    Attributes:
        ranks: As a reward, compares the responses to a prompt with each other, and needs at least two per prompt.
    """

    judge: Judge | None = None
    failed: Sequence[str] = ()
    ranks: ClassVar[bool] = False
    candidates: Sequence[str] = ()
    """The answers that the judge chooses from. The judge of a labeler with candidates, ``questions`` and
    ``teaching_loss`` can be taught."""

    def questions(self, pair: Pair, prompt: JudgePrompt) -> list[Question]:
        """The questions about a pair: the same number for every pair, all with the same ending."""
        raise NotImplementedError

    def teaching_loss(self, logprobs: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """Loss of the judge's answers with respect to the label that they should yield.

        Args:
            logprobs: (B, Q, C) float32, normalized log-probabilities of the C candidates for each of Q questions, in
                nats.
            p: (B,) float32, target probability in [0, 1] that response_1 is preferred.

        Returns:
            (B,) float32, cross-entropy in nats; minimal where the labels equal ``p``.
        """
        raise NotImplementedError

    def check_prompt(self, prompt: JudgePrompt) -> None:
        """Validate the judge's prompt; called by ``trl-rlaif check`` and before a run starts to compute.

        Raises:
            UserError: The prompt lacks a file or variable that the options need.
        """

    def columns(self, prompt: JudgePrompt) -> Collection[str]:
        """Additional data columns that a label depends on, such as those that the judge's prompt uses."""
        return ()

    def check_row(self, prompt: JudgePrompt, columns: Mapping[str, Any]) -> None:
        """Validate a row's additional columns; called for every row if there are ``columns``, like ``check_prompt``.

        Raises:
            UserError: A column is missing from the row or has an unusable value.
        """

    @abstractmethod
    def label(self, pairs: Sequence[Pair], judge: Judge, done: Collection[str] = ()) -> Iterator[Label]:
        """Yield a Label for each pair that is not done, in any order, as soon as it is available.

        Args:
            pairs: Pairs with unique ids; of large runs, a few thousand at a time.
            judge: The model to ask, with its prompt.
            done: Ids of pairs whose labels are already stored; must not be yielded again.

        Yields:
            Labels; ``skipped`` is set for a pair that cannot be judged. Yielded labels survive a kill.
        """


class RewardLabeler(Labeler):
    """A labeler that is also a reward function based on a judge: ``reward_funcs=[Mine(judge)]``.

    Works with PPOTrainer and with TRL's GRPOTrainer and RLOOTrainer, which log it under its ``__name__``.

    Args:
        judge: The judge to ask when called as a reward function.
        options: Options as in a recipe.
    """

    def __init__(self, judge: Judge | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.judge = judge
        self.failed: list[str] = []

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """See ``rewards``. Completions are texts or lists of messages."""
        if self.judge is None:
            name = type(self).__name__
            raise TypeError(f"{name} is called as a reward function and has no judge: {name}(judge).")
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        return self.rewards(prompts, texts, self.judge, **columns)

    @abstractmethod
    def rewards(
        self, prompts: Sequence[Any], responses: Sequence[str], judge: Judge, **columns: Any
    ) -> list[float | None]:
        """Reward each response; None for one that the judge cannot score, with the reason in ``failed``.

        Args:
            prompts: Texts or lists of messages.
            columns: Data columns by name, each a list with one value per response.
        """


def rows_of(columns: Mapping[str, Any], names: Collection[str], count: int) -> list[dict[str, Any]]:
    """Convert the columns passed to a reward function into rows for ``JudgePrompt`` and ``check_row``.

    Args:
        columns: Lists of ``count`` values by name.
        names: Columns to keep; names that are not in ``columns`` are ignored.
        count: Number of rows.
    """
    known = [name for name in names if name in columns]
    return [{name: columns[name][i] for name in known} for i in range(count)]


def numbered(name: str, known: Collection[str]) -> str:
    """The name itself if it is not known yet, else followed by the first free number."""
    free = (f"{name} {i}" for i in itertools.count(2))
    return name if name not in known else next(n for n in free if n not in known)


class RewardTransform(Component):
    """Changes rewards: the reward model's loss in training, and its scores in RL.

    Attributes:
        needs_expected: Give the reward model a second output, e(x), read at the last prompt token.
        needs_kl: ``transform`` reads the batch's ``kl``. RLOO and GRPO compute it only for such transforms, with two
            additional forward passes over every response.
    """

    needs_expected: ClassVar[bool] = False
    needs_kl: ClassVar[bool] = False

    def loss(self, scores: PreferenceScores) -> torch.Tensor | None:
        """Mean loss over the comparisons (a scalar), or None to keep the trainer's own."""
        return None

    def transform(self, scores: torch.Tensor, batch: ScoredBatch) -> torch.Tensor:
        """Map scores, (B,) float32, to scores of the same shape. May update the transform's state.

        Responses without a reward are excluded from both arguments. With several processes, one whose responses all
        lack a reward gets an empty batch, so that a transform that gathers scores does not block.
        """
        return scores

    def transform_pool(self, scores: torch.Tensor, batch: ScoredBatch) -> torch.Tensor:
        """Map the scores of a pool of responses that are only compared with each other.

        Called once per pool, by every process with its part of the pool: for data selectors, in rejection sampling, and
        for the reward model's held-out pairs. The default is ``transform`` of one large batch. Transforms with running
        statistics should override it and use the statistics of the pool itself.
        """
        return self.transform(scores, batch)

    def metrics(self) -> dict[str, float]:
        """Metrics to log after each update, by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """State that a checkpoint must hold to resume exactly."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that ``state_dict`` returned."""


class DataSelector(Component, ABC):
    """Selects the prompts that PPO trains on, and the responses that it rehearses."""

    @property
    def num_responses(self) -> int:
        """Number of responses per prompt that the pool must contain."""
        return 1

    @abstractmethod
    def select(self, pool: Pool) -> Selection | Sequence[int]:
        """Select from a pool of scored responses of the policy.

        Returns:
            A Selection, or a non-empty list of indices into the pool, whose prompts PPO trains on.
        """


class PairSampler(Component, ABC):
    """Makes pairs of responses with the initial policy, instead of sampling two responses for each prompt.

    Options that name files have the type ``DataPath``: paths are relative to the recipe, and the stage is redone when
    a file's content changes. ``trl-rlaif check`` calls ``__init__``, so files should be read there.
    """

    @abstractmethod
    def sample(self, prompts: Sequence[Prompt], generate: Generate, seed: int) -> Iterable[SampledPair]:
        """Make pairs for a batch of prompts; a run that was killed repeats the whole batch.

        Args:
            prompts: Prompts with unique ids.
            generate: The initial policy with the recipe's sampling settings. Takes conversations by prompt id and
                returns the response to each: stripped text without reasoning, possibly empty, or None if the
                conversation leaves no room for a response in the model's context. It is seeded by the prompts and the
                number of calls for this batch.
            seed: Seed for other random choices, which must depend only on it and the prompt's id.

        Returns:
            One or more pairs for each prompt, in any order; for a prompt without a pair, the reason in ``dropped``.
        """
