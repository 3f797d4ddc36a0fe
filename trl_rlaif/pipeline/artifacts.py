"""What lies in a run's folder: the only module that knows its file names, and what their rows and numbers are.

Rows are lines of JSON-lines files. Numbers without another unit are shares in [0, 1]; an interval is a pair of 95%
bounds. What is ``dict[str, Any]`` is what the measure of that name in ``trl_rlaif.evaluation`` returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict

from trl_rlaif.errors import UserError

if TYPE_CHECKING:
    from trl_rlaif.encoding import PromptLike

# What this version writes. 1 recorded no inputs of its stages (pipeline/first_version.py), nor a format. A change that
# an earlier version cannot read raises it.
FORMAT = 2

# ---- Names ----------------------------------------------------------------------------------------------

RECIPE = "recipe.yaml"  # resolved, with the versions of the packages and the command
RESULTS = "results.json"  # Results
METRICS = "metrics.jsonl"  # MetricRow
RANKINGS = "rankings.jsonl"  # RankingRow
JURY = "jury.jsonl"  # JuryRow
LABELS = "labels.jsonl"  # LabelRow; of a comparison, of the responses of its variants
VOTES = "votes.jsonl"  # what people chose: trl_rlaif.rating
CLUSTERS = "clusters.json"  # data.clusters: their centres, and what they were fitted to

SFT = "sft"  # adapter
PAIRS = "pairs.jsonl"  # PairRow
REVISIONS = "revisions.jsonl"  # RevisionRow, of a sampler that revises
PARTIAL_PAIRS = "pairs.partial.jsonl"  # DrawnRow, while the stage sample runs
JUDGE = "judge"  # adapter
LESSONS = "lessons.jsonl"  # LessonRow
PREFERENCES = "preferences"  # dataset in TRL's format, with p
REWARD = "reward"  # adapter with a score head, and the state of its transforms
REWARD_SCORES = "reward_scores.jsonl"  # ScoreRow
POLICY = "policy"  # adapter
VALUE = "value"  # PPO's value model: a head, and its adapter unless value: trunk
REHEARSAL = "rehearsal.jsonl"  # RehearsedRow
SELECTION_MAP = "selection_map.jsonl"  # MapRow
SAMPLES = "samples.jsonl"  # SampleRow
REPORT = "report.html"
PLOTS = "report"
CHECKPOINTS = "checkpoints"  # a folder a stage
ROUNDS = "rounds"  # of a run in rounds: each round's own run folder, 1, 2, ...
VARIANTS = "variants"  # of a comparison: each variant's own run folder
# The outputs of stages that were redone, a folder for each time, laid out as a run's folder.
SUPERSEDED = "superseded"

STATE = ".state"  # what only the run itself needs
LOCK = "lock"  # in STATE, as are these
DATE = "date"
PROGRESS = "progress.json"


def checkpoints_of(stage: str) -> str:
    """Where a stage that trains keeps its checkpoints."""
    return f"{CHECKPOINTS}/{stage}"


def marker_of(stage: str) -> str:
    """The file in STATE that says what a stage is made from, and whether it is complete."""
    return f"{stage}.json"


def work_of(stage: str) -> str:
    """The folder in STATE for what a stage needs until it is complete."""
    return f"{stage}.work"


def plan_of(purpose: str, setup: str) -> str:
    """The file of a pass that labels, in the stage's ``work_of``: which pairs it is about."""
    return f"{purpose}-{setup}.jsonl"


def transform_of(name: str) -> str:
    """The file in REWARD that holds the state of a transform."""
    return f"transform_{name}.pt"


def check_format(recipe: Mapping[str, Any], where: str) -> None:
    """Refuse what a later version wrote.

    Args:
        recipe: A run folder's recipe.yaml.
        where: The folder.

    Raises:
        UserError: Its format is not known.
    """
    found = recipe.get("format", 1)
    if not isinstance(found, int) or found > FORMAT:
        raise UserError(
            f"A later version of trl-rlaif wrote this folder (format {found}; this one knows up to {FORMAT}).",
            where=where,
            fix="Run: pip install -U trl-rlaif",
        )


# ---- Rows -----------------------------------------------------------------------------------------------


class MetricRow(TypedDict):
    """What a stage that trains logged at a step; its numbers stand beside these keys."""

    stage: str
    step: int


class PairRow(TypedDict):
    """Two responses to a prompt; further columns of the data stand beside these keys."""

    id: str
    prompt: PromptLike
    response_1: str
    response_2: str
    category: str | None
    human: int | None  # the better response, 0 for a tie


class RevisionRow(TypedDict):
    """A revised response, as ``sft.data`` reads it: messages where the model has a chat template."""

    prompt: PromptLike
    completion: PromptLike


class DrawnRow(TypedDict, total=False):
    """What became of a prompt's draws: the keys of a PairRow, or why there is none."""

    id: str
    dropped: str
    pairs: list[PairRow]  # where all pairs of the responses are kept, or a sampler made them
    revisions: list[RevisionRow]  # of a sampler
    redraws: int
    responses: int
    ended: int
    tokens: int  # of all responses, without their ends and reasoning


class LessonRow(TypedDict, total=False):
    """A pair whose better response is known: what the judge was taught, or what it was tried on."""

    prompt: PromptLike
    response_1: str
    response_2: str
    p: float  # that response_1 is the better one
    ratings_1: list[float]  # another judge's, of each response, where these are taught
    ratings_2: list[float]
    source: str  # people, labels, or the kind of contrast
    held_out: bool
    before: float | None  # of what is held out: the judge's own p, untaught and taught
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
    criteria: list[dict[str, Any]]  # trl_rlaif.types.CriterionLabel, without what is None
    labeler: str
    setup: str
    pair: str


class LabelRow(_LabelRow):
    """A labeler's word on a pair (trl_rlaif.types.Label), with the keys that find it."""

    p: float | None


class JudgedRow(_LabelRow):
    """That of a pair that could be judged."""

    p: float


class RankingRow(TypedDict):
    """The responses to a prompt, the best one first. Strengths are in nats above their average.

    ``pairs`` holds, by a pair's id, the probability that its response_1 is better, and ``answers`` what the judge said:
    of which response (counted from 0) it was shown first, which second, and the probability that the first is better.
    """

    prompt: PromptLike
    category: str | None
    responses: list[str]
    strengths: list[float]
    intervals: list[tuple[float, float]]
    pairs: dict[str, float]
    answers: list[tuple[int, int, float]]


class JuryRow(TypedDict):
    """A pair's votes by the members' names, what they were joined into, and their standard deviation."""

    id: str
    p: float | None
    disagreement: float | None
    votes: dict[str, float | None]


class ScoreRow(TypedDict, total=False):
    """A held-out pair's scores as the reward model gives them and, with transforms, as RL gets them."""

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
    """A prompt's place on the report's map of clusters."""

    x: float
    y: float
    cluster: int
    chosen: bool
    prompt: str


class SampleRow(TypedDict, total=False):
    """A held-out prompt with the first responses of the start and of the trained policy, and means over all."""

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


# ---- Numbers --------------------------------------------------------------------------------------------


class SftResults(TypedDict):
    """Of sft: rows of the data, the tokens that the loss is on, and its mean in nats a token."""

    rows: int
    loss_on: str
    loss: float
    seconds: float


class SampleResults(TypedDict, total=False):
    """Of sample: pairs from the data have ``ties``; drawn ones what was drawn."""

    prompts: int
    pairs: int
    ties: int
    dropped: dict[str, int]
    redrawn: int
    revisions: int
    ended: float | None
    tokens: float | None  # mean of the responses
    seconds: float


class JudgeResults(TypedDict, total=False):
    """Of judge: whether what was taught is ``used``, and why not.

    ``sources`` has by source, and for ``all`` together, how many pairs were ``taught`` and ``held_out``, and the
    figures of the latter ``before`` and ``after``. ``gain`` is how much their log-loss fell, in nats a pair.
    """

    judge: str
    labeler: str
    taught: int
    held_out: int
    skipped: dict[str, int]
    used: bool
    reason: str | None
    gain: float
    standard_error: float | None
    best_step: int | None
    steps: int
    sources: dict[str, dict[str, Any]]
    seconds: float


class LabelResults(TypedDict, total=False):
    """Of label: what the labels say of the labeler, whose ``setup`` finds them."""

    pairs: int
    labeled: int
    skipped: dict[str, int]
    mean_confidence: float | None
    position_bias: dict[str, Any] | None
    mass: dict[str, Any] | None
    agreement: dict[str, Any] | None
    agreement_by_category: dict[str, Any]
    length_preference: dict[str, Any] | None
    ece: float | None
    judge: str
    labeler: str
    setup: str
    columns: list[str]  # of the data, that the labels depend on
    made: int
    voted: int
    bounded: int
    suspicious: dict[str, Any]
    pairs_per_second: float | None
    precision: dict[str, Any] | None
    calibration: dict[str, Any] | None
    overlaps: list[dict[str, Any]]
    unsure: int
    ranking: dict[str, Any]
    jury: dict[str, Any]
    comparison: dict[str, Any]
    shard: str
    broken_lines: int
    seconds: float


class RewardResults(TypedDict, total=False):
    """Of reward: how it ranks held-out pairs, its calibration, and its scores by kind of prompt.

    Where it went on from an earlier round's, ``before`` has that one's ``accuracy`` on this run's pairs, with its
    ``interval``, of ``all`` and of those ``held_out``; and ``earlier_pairs`` are those of earlier rounds among
    ``train_pairs``.
    """

    train_pairs: int
    earlier_pairs: int
    before: dict[str, dict[str, Any] | None]
    eval_pairs: int
    eval_prompts: int
    skipped: dict[str, int]
    accuracy: float | None
    accuracy_interval: tuple[float, float] | None
    agreement: dict[str, Any] | None
    ece: float | None
    ece_against: str
    ece_pairs: int
    scores: dict[str, Any]
    without_end: dict[str, float | None]
    after_each: dict[str, dict[str, Any]]
    transformed: dict[str, Any] | None
    seconds: float


class RlResults(TypedDict, total=False):
    """Of rl: first and last numbers of the training itself; KL in nats a response.

    DPO has ``pairs``, ``loss``, ``labels``, ``ignored``, and its implicit reward's ``accuracy_`` and ``margin_``.
    """

    updates: int
    episodes: int
    prompts: int
    skipped: dict[str, int]
    score_first: float
    score_last: float
    kl_last: float
    ended_first: float
    ended_last: float
    spread_last: dict[str, float]
    unscored: int
    rewards: dict[str, dict[str, float]]
    rehearsal: dict[str, float]
    forgetting: dict[str, Any]
    stopped: dict[str, Any]
    gpu_memory: dict[str, int]
    pairs: int
    loss: float
    labels: dict[str, Any]
    ignored: list[str]
    unused: list[str]
    accuracy_first: float
    accuracy_last: float
    margin_first: float
    margin_last: float
    seconds: float


class EvaluateResults(TypedDict):
    """Of evaluate: by set the judges' word, lengths and rewards."""

    judge: str
    sets: dict[str, dict[str, Any]]
    agreement: dict[str, Any]
    overlaps: list[dict[str, Any]]
    seconds: float


class ReportResults(TypedDict):
    """Of report: its file."""

    path: str
    seconds: float


class CompareResults(TypedDict, total=False):
    """Of a comparison: by set who beats whom, and of each variant its own run's numbers."""

    judge: str
    sets: dict[str, dict[str, Any]]
    variants: dict[str, dict[str, Any]]
    seconds: float


class RoundRow(TypedDict):
    """A round's own numbers, as its results.json has them; None where it has none.

    ``tokens`` is the mean length of what the policy that the round began with wrote.
    """

    pairs: int
    tokens: float | None
    accuracy_before: dict[str, Any] | None  # of the round before's reward model, on all new pairs
    accuracy_before_held_out: dict[str, Any] | None
    accuracy: dict[str, Any] | None  # of this round's, on the held-out ones
    score_first: float | None
    score_last: float | None
    kl_last: float | None
    implicit_first: float | None  # accuracy of dpo's implicit reward
    implicit_last: float | None


class RoundsResults(TypedDict):
    """Of a run in rounds: a row each; and the seconds of all but the last, whose numbers are the run's own."""

    rows: list[RoundRow]
    seconds: float


class Results(TypedDict, total=False):
    """results.json: the final numbers of every stage that has ended."""

    sft: SftResults
    sample: SampleResults
    judge: JudgeResults
    label: LabelResults
    reward: RewardResults
    rl: RlResults
    evaluate: EvaluateResults
    report: ReportResults
    compare: CompareResults
    rounds: RoundsResults
