"""The results of a run in results.json, by stage.

Numbers without a unit are fractions in [0, 1]; an interval is a pair of 95% bounds. A ``dict[str, Any]`` is
the result of the metric of that name in ``trl_rlaif.evaluation``.
"""

from __future__ import annotations

from typing import Any, TypedDict


class AskedResults(TypedDict, total=False):
    """Usage of judge servers, for every stage that asks them: ``input_tokens``, ``output_tokens``, their ``cost``
    (None without a price), and the number of ``uncounted`` answers."""

    usage: dict[str, Any]


class SftResults(TypedDict):
    """Stage sft: number of training rows, the tokens with a loss, and the mean loss in nats per token."""

    rows: int
    loss_on: str
    loss: float
    seconds: float


class SampleResults(TypedDict, total=False):
    """Stage sample: for pairs from the data ``ties``; for sampled pairs, statistics of the samples."""

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
    """Stage judge: whether the taught adapter is ``used``, and if not, the reason.

    ``sources`` has, by source and for ``all``, the number of pairs ``taught`` and ``held_out``, and the latter's
    metrics ``before`` and ``after``. ``gain`` is the decrease of their log-loss, in nats per pair.
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


class LabelResults(AskedResults, total=False):
    """Stage label: statistics of the labels; ``setup`` identifies the labeler."""

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
    """Stage reward: accuracy on held-out pairs, calibration, and scores by category.

    In a run that continues another, ``before`` has the earlier model's accuracy, with its interval, on ``all`` pairs of
    this run and on those ``held_out``; ``earlier_pairs`` counts the pairs of earlier rounds among ``train_pairs``.
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


class RlResults(AskedResults, total=False):
    """Stage rl: first and last metrics of training; KL in nats per response.

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


class EvaluateResults(AskedResults):
    """Stage evaluate: by set, the judges' verdicts, lengths and rewards."""

    judge: str
    sets: dict[str, dict[str, Any]]
    agreement: dict[str, Any]
    overlaps: list[dict[str, Any]]
    seconds: float


class ReportResults(TypedDict):
    """Stage report: the file."""

    path: str
    seconds: float


class CompareResults(AskedResults, total=False):
    """A comparison: by set, pairwise win rates; and the results of each variant's run."""

    judge: str
    sets: dict[str, dict[str, Any]]
    variants: dict[str, dict[str, Any]]
    seconds: float


class RoundRow(TypedDict):
    """Results of a round, as in its results.json; None if missing.

    ``tokens`` is the mean response length of the policy at the start of the round.
    """

    pairs: int
    tokens: float | None
    accuracy_before: dict[str, Any] | None  # of the previous round's reward model, on all new pairs
    accuracy_before_held_out: dict[str, Any] | None
    accuracy: dict[str, Any] | None  # of this round's, on held-out pairs
    score_first: float | None
    score_last: float | None
    kl_last: float | None
    implicit_first: float | None  # accuracy of dpo's implicit reward
    implicit_last: float | None


class RoundsResults(TypedDict):
    """A run in rounds: a row per round, and the seconds of all but the last, whose results are the run's own."""

    rows: list[RoundRow]
    seconds: float


class Results(TypedDict, total=False):
    """results.json: the final results of every completed stage."""

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
