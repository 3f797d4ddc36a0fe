"""The records that data, stages, components and hooks exchange: prompts, pairs, labels, rollouts, pools, selections."""

from trl_rlaif.types.data import CriterionLabel, Label, Loaded, Message, Pair, Prompt, SampledPair, Skip
from trl_rlaif.types.training import Pool, PreferenceScores, RehearsalPair, Responses, Rollout, ScoredBatch, Selection

__all__ = [
    "CriterionLabel",
    "Label",
    "Loaded",
    "Message",
    "Pair",
    "Pool",
    "PreferenceScores",
    "Prompt",
    "RehearsalPair",
    "Responses",
    "Rollout",
    "SampledPair",
    "ScoredBatch",
    "Selection",
    "Skip",
]
