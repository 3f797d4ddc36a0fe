"""What is taken from TRL's own PPO trainer, and nothing else: the one module that a later TRL may change.

From the parent come the constructor (batch sizes, optimizer, callbacks, dataloader, preparation with
accelerate), ``log``, ``save_model`` and the model card. The training loop is ours.
"""

from __future__ import annotations

import os
import warnings

# TRL announces that `trl.experimental` may change; that is known here, and this module is the answer.
_silence = os.environ.get("TRL_EXPERIMENTAL_SILENCE")
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from trl.experimental.ppo import PPOConfig as TrlPPOConfig
    from trl.experimental.ppo import PPOTrainer as TrlPPOTrainer
if _silence is None:
    del os.environ["TRL_EXPERIMENTAL_SILENCE"]

__all__ = ["TrlPPOConfig", "TrlPPOTrainer"]
