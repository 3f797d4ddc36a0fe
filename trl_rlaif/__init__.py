"""Public names of trl-rlaif, imported on first use so that importing the package stays cheap."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trl_rlaif.hookspecs import hookimpl

__version__ = "0.1.0"

_LAZY = {
    "RewardTrainer": "trl_rlaif.reward.trainer",
    "RewardConfig": "trl_rlaif.reward.config",
    "add_log_ratios": "trl_rlaif.reward.log_ratios",
    "load_reward_model": "trl_rlaif.reward.loading",
    "PPOTrainer": "trl_rlaif.rl.ppo.trainer",
    "PPOConfig": "trl_rlaif.rl.ppo.config",
    "ForgettingTracker": "trl_rlaif.evaluation.forgetting",
    "RejectionTrainer": "trl_rlaif.rl.rejection",
    "SharedBase": "trl_rlaif.models.shared_model",
    "Labeler": "trl_rlaif.components",
    "RewardLabeler": "trl_rlaif.components",
    "RewardTransform": "trl_rlaif.components",
    "DataSelector": "trl_rlaif.components",
    "PairSampler": "trl_rlaif.components",
    "Options": "trl_rlaif.components",
    "rows_of": "trl_rlaif.components",
    "from_first": "trl_rlaif.distributed",
    "Pair": "trl_rlaif.data",
    "Prompt": "trl_rlaif.data",
    "CriterionLabel": "trl_rlaif.types",
    "Label": "trl_rlaif.types",
    "Pool": "trl_rlaif.types",
    "PreferenceScores": "trl_rlaif.types",
    "RehearsalPair": "trl_rlaif.types",
    "SampledPair": "trl_rlaif.types",
    "Responses": "trl_rlaif.types",
    "Rollout": "trl_rlaif.types",
    "ScoredBatch": "trl_rlaif.types",
    "Selection": "trl_rlaif.types",
    "DataPath": "trl_rlaif.recipe.sections",
    "read_records": "trl_rlaif.data.records",
    "as_messages": "trl_rlaif.encoding",
    "as_text": "trl_rlaif.encoding",
    "follow_up": "trl_rlaif.encoding",
    "set_template_kwargs": "trl_rlaif.encoding",
    "cluster": "trl_rlaif.clustering",
    "directions": "trl_rlaif.models.embedding",
    "Judge": "trl_rlaif.judging.judge",
    "CriteriaOptions": "trl_rlaif.judging.criteria",
    "YES_NO": "trl_rlaif.judging.criteria",
    "weighted_logit": "trl_rlaif.judging.criteria",
    "with_veto": "trl_rlaif.judging.criteria",
    "yes": "trl_rlaif.judging.criteria",
    "ask_together": "trl_rlaif.judging.judge",
    "done_indices": "trl_rlaif.judging.judge",
    "ScoreDistribution": "trl_rlaif.judging.distribution",
    "Rated": "trl_rlaif.judging.rated",
    "rated_label": "trl_rlaif.judging.rated",
    "check_weight": "trl_rlaif.judging.weights",
    "weighted_sum": "trl_rlaif.judging.distribution",
    "LocalJudge": "trl_rlaif.judging.local",
    "JudgePrompt": "trl_rlaif.judging.prompt",
    "Question": "trl_rlaif.judging.question",
    "Thinking": "trl_rlaif.judging.question",
    "ThinkingOptions": "trl_rlaif.judging.question",
    "Answer": "trl_rlaif.judging.question",
    "Asked": "trl_rlaif.ranking.tournament",
    "Ranking": "trl_rlaif.ranking.tournament",
    "rank_all": "trl_rlaif.ranking.tournament",
    "rank_by_tournament": "trl_rlaif.ranking.tournament",
    "RunError": "trl_rlaif.errors",
    "UserError": "trl_rlaif.errors",
}

__all__ = ["__version__", "hookimpl", *_LAZY]

if TYPE_CHECKING:
    from trl_rlaif.clustering import cluster
    from trl_rlaif.components import (
        DataSelector,
        Labeler,
        Options,
        PairSampler,
        RewardLabeler,
        RewardTransform,
        rows_of,
    )
    from trl_rlaif.data import Pair, Prompt
    from trl_rlaif.data.records import read_records
    from trl_rlaif.distributed import from_first
    from trl_rlaif.encoding import as_messages, as_text, follow_up, set_template_kwargs
    from trl_rlaif.errors import RunError, UserError
    from trl_rlaif.evaluation.forgetting import ForgettingTracker
    from trl_rlaif.judging.criteria import YES_NO, CriteriaOptions, weighted_logit, with_veto, yes
    from trl_rlaif.judging.distribution import ScoreDistribution, weighted_sum
    from trl_rlaif.judging.judge import Judge, ask_together, done_indices
    from trl_rlaif.judging.local import LocalJudge
    from trl_rlaif.judging.prompt import JudgePrompt
    from trl_rlaif.judging.question import Answer, Question, Thinking, ThinkingOptions
    from trl_rlaif.judging.rated import Rated, rated_label
    from trl_rlaif.judging.weights import check_weight
    from trl_rlaif.models.embedding import directions
    from trl_rlaif.models.shared_model import SharedBase
    from trl_rlaif.ranking.tournament import Asked, Ranking, rank_all, rank_by_tournament
    from trl_rlaif.recipe.sections import DataPath
    from trl_rlaif.reward.config import RewardConfig
    from trl_rlaif.reward.loading import load_reward_model
    from trl_rlaif.reward.log_ratios import add_log_ratios
    from trl_rlaif.reward.trainer import RewardTrainer
    from trl_rlaif.rl.ppo.config import PPOConfig
    from trl_rlaif.rl.ppo.trainer import PPOTrainer
    from trl_rlaif.rl.rejection import RejectionTrainer
    from trl_rlaif.types import (
        CriterionLabel,
        Label,
        Pool,
        PreferenceScores,
        RehearsalPair,
        Responses,
        Rollout,
        SampledPair,
        ScoredBatch,
        Selection,
    )


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'trl_rlaif' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
