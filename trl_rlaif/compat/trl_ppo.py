"""Base classes of PPOTrainer and PPOConfig, by the installed TRL; no other module needs to know which.

TRL 1.12 is the last release with a PPO trainer: up to it, ours subclasses that one, and later, the equivalent classes
in ``ppo_trainer`` and ``ppo_config``. Either provides the constructor (batch sizes, optimizer, callbacks, dataloader,
preparation with accelerate), ``log``, ``save_model`` and the model card. The training loop is ours.
"""

from __future__ import annotations

import os
import warnings

# TRL warns that `trl.experimental` may change, which this module handles.
_silence = os.environ.get("TRL_EXPERIMENTAL_SILENCE")
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from trl.experimental.ppo import PPOConfig as BasePPOConfig
        from trl.experimental.ppo import PPOTrainer as BasePPOTrainer
except ImportError:  # since TRL 1.13
    from trl_rlaif.compat.ppo_config import OwnPPOConfig as BasePPOConfig
    from trl_rlaif.compat.ppo_trainer import OwnPPOTrainer as BasePPOTrainer
finally:
    if _silence is None:
        del os.environ["TRL_EXPERIMENTAL_SILENCE"]

__all__ = ["BasePPOConfig", "BasePPOTrainer"]
