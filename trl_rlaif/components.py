"""The kinds of component that a plugin can bring, and their typed options."""

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
    """Base of a component's options: unknown keys are refused, values cannot change later."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Component:
    """What all components share: a recipe's options, validated, in ``self.options``."""

    Options: ClassVar[type[Options]] = Options
    options: BaseModel  # a subclass that sets Options annotates this with it, for type checkers and editors

    def __init__(self, **options: Any) -> None:
        self.options = self.Options(**options)


class Labeler(Component, ABC):
    """Turns pairs of responses into probabilities that the first is preferred.

    One that is also callable, with GRPOTrainer's signature, can be a reward; ``judge`` is then whom it asks, and
    ``failed`` says why the last call returned None for some responses, one text each.

    Attributes:
        ranks: As a reward it compares the responses to one prompt with each other, and needs two of each or more.
    """

    judge: Judge | None = None
    failed: Sequence[str] = ()
    ranks: ClassVar[bool] = False
    candidates: Sequence[str] = ()
    """The answers that the judge chooses from. A labeler that has some, ``questions`` and ``teaching_loss`` can have
    its judge taught."""

    def questions(self, pair: Pair, prompt: JudgePrompt) -> list[Question]:
        """What the judge is asked about a pair: as many questions for each, all with the same ending."""
        raise NotImplementedError

    def teaching_loss(self, logprobs: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """How far the judge's answers are from the label that they should lead to.

        Args:
            logprobs: (B, Q, C) float32, of each of Q questions the normalized log-probabilities of the C candidates,
                in nats.
            p: (B,) float32, the probability in [0, 1] that response_1 is preferred.

        Returns:
            (B,) float32, the cross-entropy in nats, least where the labels are ``p``.
        """
        raise NotImplementedError

    def check_prompt(self, prompt: JudgePrompt) -> None:
        """Called before a run computes anything, by ``trl-rlaif check`` too.

        Raises:
            UserError: The judge's prompt lacks what the options need.
        """

    def columns(self, prompt: JudgePrompt) -> Collection[str]:
        """Names of the data's other columns that a label depends on, such as those that the judge's prompt names."""
        return ()

    def check_row(self, prompt: JudgePrompt, columns: Mapping[str, Any]) -> None:
        """Called with the other columns of every row of the data, if there are ``columns``; as ``check_prompt`` is.

        Raises:
            UserError: The row lacks one of them, or what it holds cannot be used.
        """

    @abstractmethod
    def label(self, pairs: Sequence[Pair], judge: Judge, done: Collection[str] = ()) -> Iterator[Label]:
        """Yield one Label for each pair that is not done, in any order, as soon as it is known.

        Args:
            pairs: Pairs of the run, ids unique. Of many pairs, a few thousand at a time.
            judge: The model to ask, with its prompt.
            done: Ids whose labels are stored already; they must not be yielded again.

        Yields:
            Labels; a pair that cannot be judged has ``skipped`` set. What was yielded survives a kill.
        """


class RewardLabeler(Labeler):
    """A labeler that asks a judge about responses and is a reward function, too: ``reward_funcs=[Mine(judge)]``.

    It works in PPOTrainer and in TRL's GRPOTrainer and RLOOTrainer, which call it ``__name__`` in their logs.

    Args:
        judge: Whom to ask when it is called as a reward function.
        options: The recipe's.
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
        """A reward for each response; None for one that the judge cannot score, and ``failed`` then says why.

        Args:
            prompts: Texts or lists of messages.
            columns: Of the data, a list with a value for each response.
        """


def rows_of(columns: Mapping[str, Any], names: Collection[str], count: int) -> list[dict[str, Any]]:
    """The columns that a reward function is given, as the rows that ``JudgePrompt`` and ``check_row`` take.

    Args:
        columns: Lists of ``count`` values by name; what is not in ``names`` is left out.
    """
    known = [name for name in names if name in columns]
    return [{name: columns[name][i] for name in known} for i in range(count)]


def numbered(name: str, known: Collection[str]) -> str:
    """A name that is not known yet: itself, or with the first free number behind it."""
    free = (f"{name} {i}" for i in itertools.count(2))
    return name if name not in known else next(n for n in free if n not in known)


class RewardTransform(Component):
    """Changes what a reward is: its loss while it is learned, its scores while PPO runs.

    Attributes:
        needs_expected: The reward model gets a second output, e(x), read at the last prompt token.
        needs_kl: ``transform`` reads the batch's ``kl``. RLOO and GRPO compute it for such a transform alone, with two
            forward passes over every response.
    """

    needs_expected: ClassVar[bool] = False
    needs_kl: ClassVar[bool] = False

    def loss(self, scores: PreferenceScores) -> torch.Tensor | None:
        """Mean loss over the comparisons (a scalar), or None to leave the trainer's own."""
        return None

    def transform(self, scores: torch.Tensor, batch: ScoredBatch) -> torch.Tensor:
        """Map scores, (B,) float32, to scores of the same shape. May update the state.

        Responses without a reward are left out of both arguments. Of several processes, one whose responses all lack
        a reward is given a batch of 0, so that a transform which gathers scores waits for nobody.
        """
        return scores

    def transform_pool(self, scores: torch.Tensor, batch: ScoredBatch) -> torch.Tensor:
        """Map the scores of a whole pool of responses, which are compared with each other and with nothing else.

        Called once per pool, by every process with its share of it: for data selectors, in rejection sampling, and for
        the reward model's held-out pairs. By default the same as ``transform`` of one large batch. A transform that
        remembers earlier scores overrides it, and maps the pool by the pool's own figures.
        """
        return self.transform(scores, batch)

    def metrics(self) -> dict[str, float]:
        """Numbers to log after each update, by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on exactly where this transform is."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state that ``state_dict`` gave."""


class DataSelector(Component, ABC):
    """Chooses which prompts PPO trains on, and which responses it rehearses."""

    @property
    def num_responses(self) -> int:
        """Responses a prompt that the pool must hold."""
        return 1

    @abstractmethod
    def select(self, pool: Pool) -> Selection | Sequence[int]:
        """Choose from scored responses of the policy.

        Returns:
            A Selection; or indices into the pool, whose prompts PPO trains on (not empty).
        """


class PairSampler(Component, ABC):
    """Makes pairs of responses with the starting policy: what ``sample`` does in place of drawing two to each prompt.

    Files that its options name are of the type ``DataPath``: they are found beside the recipe, and the stage is redone
    when their content has changed. What ``__init__`` reads of them, ``trl-rlaif check`` reads, too.
    """

    @abstractmethod
    def sample(self, prompts: Sequence[Prompt], generate: Generate, seed: int) -> Iterable[SampledPair]:
        """Make pairs for a batch of prompts, which a run that was killed makes again as a whole.

        Args:
            prompts: With unique ids.
            generate: The starting policy, with the recipe's sampling settings. It takes conversations by their prompts'
                ids and returns what it answers to each: texts, stripped and without reasoning, which may be empty; None
                where a conversation leaves no room for an answer in the model's context. Its draws are seeded by the
                prompts and by how often it was called for this batch.
            seed: Of what else is drawn at random. For a prompt, that depends on this and the prompt's id alone.

        Returns:
            One or more for each prompt, in any order; of one that gives no pair, a reason in ``dropped``.
        """
