"""The rows of a run's JSON-lines files. Numbers without a unit are fractions in [0, 1]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from trl_rlaif.encoding import PromptLike


class MetricRow(TypedDict):
    """Metrics of a training stage at a step, in addition to these keys."""

    stage: str
    step: int


class PairRow(TypedDict):
    """Two responses to a prompt; the other columns of the data are additional keys."""

    id: str
    prompt: PromptLike
    response_1: str
    response_2: str
    category: str | None
    human: int | None  # the better response, 0 for a tie


class RevisionRow(TypedDict):
    """A revised response in the format of ``sft.data``: messages if the model has a chat template."""

    prompt: PromptLike
    completion: PromptLike


class DrawnRow(TypedDict, total=False):
    """Outcome of sampling for a prompt: the keys of a PairRow, or the reason why there is none."""

    id: str
    dropped: str
    pairs: list[PairRow]  # if all pairs of the responses are kept, or a sampler made them
    revisions: list[RevisionRow]  # from a sampler
    redraws: int
    responses: int
    ended: int
    tokens: int  # of all responses, without end tokens and reasoning


class LessonRow(TypedDict, total=False):
    """A pair whose better response is known, used to teach or to evaluate the judge."""

    prompt: PromptLike
    response_1: str
    response_2: str
    p: float  # that response_1 is the better one
    ratings_1: list[float]  # another judge's ratings of each response, if these are taught
    ratings_2: list[float]
    source: str  # people, labels, or the kind of contrast
    held_out: bool
    before: float | None  # for held-out pairs: the judge's own p, untaught and taught
    after: float | None


class _LabelRow(TypedDict, total=False):
    id: str
    p_12: float | None
    p_21: float | None
    mass_12: float | None
    mass_21: float | None
    rationale_12: str | list[str] | None
    rationale_21: str | list[str] | None
    judge: str
    skipped: str
    score_1: float
    score_2: float
    spread_1: float
    spread_2: float
    ratings_1: list[float]
    ratings_2: list[float]
    bound_12: float
    bound_21: float
    voted: bool
    criteria: list[dict[str, Any]]  # trl_rlaif.types.CriterionLabel, without None fields
    labeler: str
    setup: str
    pair: str


class LabelRow(_LabelRow):
    """A labeler's verdict on a pair (trl_rlaif.types.Label), with the keys that identify it."""

    p: float | None


class JudgedRow(_LabelRow):
    """The verdict on a pair that could be judged."""

    p: float


class RankingRow(TypedDict):
    """The responses to a prompt, best first. Strengths are in nats relative to their average.

    ``pairs`` has, by pair id, the probability that response_1 is better; ``answers``, for each of the judge's answers,
    the responses (counted from 0) shown first and second, and the probability that the first is better.
    """

    prompt: PromptLike
    category: str | None
    responses: list[str]
    strengths: list[float]
    intervals: list[tuple[float, float]]
    pairs: dict[str, float]
    answers: list[tuple[int, int, float]]


class JuryRow(TypedDict):
    """A pair's votes by member, the combined label, and the votes' standard deviation."""

    id: str
    p: float | None
    disagreement: float | None
    votes: dict[str, float | None]


class ScoreRow(TypedDict, total=False):
    """A held-out pair's scores from the reward model and, with transforms, as used in RL."""

    prompt_key: str  # trl_rlaif.data.overlap
    category: str | None
    p: float
    human: bool | None
    chosen: float
    rejected: float
    chosen_after: float
    rejected_after: float


class RehearsedRow(TypedDict):
    """A pair that the policy rehearsed."""

    prompt: PromptLike
    response: str
    score: float | None
    cluster: int | None
    why: str


class MapRow(TypedDict):
    """A prompt's position on the report's cluster map."""

    x: float
    y: float
    cluster: int
    chosen: bool
    prompt: str


class SampleRow(TypedDict, total=False):
    """A held-out prompt with the first response of the initial and the trained policy, and means over all responses."""

    set: str
    id: str
    prompt: PromptLike
    category: str | None
    start: str
    trained: str
    tokens_start: float
    tokens_trained: float
    ended_start: float
    ended_trained: float
    reward_start: float | None
    reward_trained: float | None
    mean_reward_start: float | None
    mean_reward_trained: float | None
    p_trained: float | None
    p_trained_by: dict[str, float | None]
    harmless_start: float | None
    harmless_trained: float | None
    rewards_start: dict[str, float | None]  # of labelers among the rewards of rl
    rewards_trained: dict[str, float | None]
