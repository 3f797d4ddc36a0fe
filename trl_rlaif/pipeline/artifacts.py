"""The files of a run's folder: the only module that knows their names.

``pipeline.rows`` has the rows of JSON-lines files, by the types named here, and ``pipeline.results`` the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl_rlaif.errors import UserError

# What this version writes. 1 recorded no inputs of its stages (pipeline/first_version.py), nor a format. A change that
# an earlier version cannot read raises it.
FORMAT = 2

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
SUMMARY = "report.md"
PLOTS = "report"
EXPORTS = "exports"  # what was exported without naming a place
CHECKPOINTS = "checkpoints"  # a folder a stage
ROUNDS = "rounds"  # of a run in rounds: each round's own run folder, 1, 2, ...
VARIANTS = "variants"  # of a comparison: each variant's own run folder
# The outputs of stages that were redone, a folder for each time, laid out as a run's folder.
SUPERSEDED = "superseded"

STATE = ".state"  # what only the run itself needs
LOCK = "lock"  # in STATE, as are these
DATE = "date"
LABEL_INDEX = "labels.index"  # where each line of LABELS is; made again where it is missing
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


def usage_of(process: int | str) -> str:
    """The file in a stage's ``work_of`` with what the servers of its judges have counted, by a process's number."""
    return f"usage-{process}.json"


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
