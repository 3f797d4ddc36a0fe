"""The names of the files in a run's folder; no other module has them.

``pipeline.rows`` defines the row types of JSON-lines files named here, and ``pipeline.results`` the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl_rlaif.errors import UserError

# The format that this version writes. Format 1 recorded neither the stages' inputs (pipeline/first_version.py) nor a
# format. Raise it with every change that earlier versions cannot read.
FORMAT = 2

RECIPE = "recipe.yaml"  # resolved, with the package versions and the command
RESULTS = "results.json"  # Results
METRICS = "metrics.jsonl"  # MetricRow
RANKINGS = "rankings.jsonl"  # RankingRow
JURY = "jury.jsonl"  # JuryRow
LABELS = "labels.jsonl"  # LabelRow; in a comparison, of its variants' responses
VOTES = "votes.jsonl"  # human choices: trl_rlaif.rating
CLUSTERS = "clusters.json"  # data.clusters: their centroids and the settings of the fit

SFT = "sft"  # adapter
PAIRS = "pairs.jsonl"  # PairRow
REVISIONS = "revisions.jsonl"  # RevisionRow, from a sampler that revises
PARTIAL_PAIRS = "pairs.partial.jsonl"  # DrawnRow, while the stage sample runs
JUDGE = "judge"  # adapter
LESSONS = "lessons.jsonl"  # LessonRow
PREFERENCES = "preferences"  # dataset in TRL's format, with p
REWARD = "reward"  # adapter with a score head, and the state of the transforms
REWARD_SCORES = "reward_scores.jsonl"  # ScoreRow
POLICY = "policy"  # adapter
VALUE = "value"  # PPO's value model: a head, and its adapter unless value: trunk
REHEARSAL = "rehearsal.jsonl"  # RehearsedRow
SELECTION_MAP = "selection_map.jsonl"  # MapRow
SAMPLES = "samples.jsonl"  # SampleRow
REPORT = "report.html"
SUMMARY = "report.md"
PLOTS = "report"
EXPORTS = "exports"  # default folder of exports
CHECKPOINTS = "checkpoints"  # one folder per stage
ROUNDS = "rounds"  # each round's own run folder, 1, 2, ...
VARIANTS = "variants"  # each variant's own run folder, in a comparison
# Old outputs of redone stages, one folder for each time, laid out like a run's folder.
SUPERSEDED = "superseded"

STATE = ".state"  # internal state of the run
LOCK = "lock"  # this and the following are in STATE
DATE = "date"
LABEL_INDEX = "labels.index"  # index of LABELS; rebuilt if missing
PROGRESS = "progress.json"


def checkpoints_of(stage: str) -> str:
    """The folder of a training stage's checkpoints."""
    return f"{CHECKPOINTS}/{stage}"


def marker_of(stage: str) -> str:
    """The file in STATE with a stage's inputs and whether it is complete."""
    return f"{stage}.json"


def work_of(stage: str) -> str:
    """The folder in STATE for files that a stage needs until it is complete."""
    return f"{stage}.work"


def plan_of(purpose: str, setup: str) -> str:
    """The file in the stage's ``work_of`` that lists the pairs of a labeling pass."""
    return f"{purpose}-{setup}.jsonl"


def usage_of(process: int | str) -> str:
    """The file in a stage's ``work_of`` with a process's token usage on judge servers."""
    return f"usage-{process}.json"


def transform_of(name: str) -> str:
    """The file in REWARD with a transform's state."""
    return f"transform_{name}.pt"


def check_format(recipe: Mapping[str, Any], where: str) -> None:
    """Reject a folder written by a later version.

    Args:
        recipe: A run folder's recipe.yaml.
        where: The folder.

    Raises:
        UserError: The format is unknown.
    """
    found = recipe.get("format", 1)
    if not isinstance(found, int) or found > FORMAT:
        raise UserError(
            f"A later version of trl-rlaif wrote this folder (format {found}; this one knows up to {FORMAT}).",
            where=where,
            fix="Run: pip install -U trl-rlaif",
        )
