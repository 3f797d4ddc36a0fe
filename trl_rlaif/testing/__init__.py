"""Test kit: tiny models and data, a scripted judge, and contract checks for components.

It needs neither pytest nor a network. Its parts are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_LAZY = {
    "check_data_selector": "trl_rlaif.testing.selectors",
    "check_labeler": "trl_rlaif.testing.labelers",
    "check_pair_sampler": "trl_rlaif.testing.samplers",
    "check_reward_transform": "trl_rlaif.testing.transforms",
    "CHAT_TEMPLATE": "trl_rlaif.testing.models",
    "make_gpt2": "trl_rlaif.testing.models",
    "make_llama": "trl_rlaif.testing.models",
    "make_scorer": "trl_rlaif.testing.models",
    "make_tokenizer": "trl_rlaif.testing.models",
    "save_tiny_model": "trl_rlaif.testing.models",
    "ScriptedJudge": "trl_rlaif.testing.judges",
    "ScriptedPolicy": "trl_rlaif.testing.samplers",
    "make_judge_prompt": "trl_rlaif.testing.judges",
    "make_pairs": "trl_rlaif.testing.data",
    "make_pool": "trl_rlaif.testing.data",
    "make_preference_dataset": "trl_rlaif.testing.data",
    "make_preference_scores": "trl_rlaif.testing.data",
    "make_prompt_dataset": "trl_rlaif.testing.data",
    "make_ragged_pairs": "trl_rlaif.testing.data",
    "make_rollout": "trl_rlaif.testing.data",
    "make_scored_batch": "trl_rlaif.testing.data",
}

__all__ = list(_LAZY)

if TYPE_CHECKING:
    from trl_rlaif.testing.data import (
        make_pairs,
        make_pool,
        make_preference_dataset,
        make_preference_scores,
        make_prompt_dataset,
        make_ragged_pairs,
        make_rollout,
        make_scored_batch,
    )
    from trl_rlaif.testing.judges import ScriptedJudge, make_judge_prompt
    from trl_rlaif.testing.labelers import check_labeler
    from trl_rlaif.testing.models import (
        CHAT_TEMPLATE,
        make_gpt2,
        make_llama,
        make_scorer,
        make_tokenizer,
        save_tiny_model,
    )
    from trl_rlaif.testing.samplers import ScriptedPolicy, check_pair_sampler
    from trl_rlaif.testing.selectors import check_data_selector
    from trl_rlaif.testing.transforms import check_reward_transform


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'trl_rlaif.testing' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
