"""A small, fixed PPO run as a script that writes its metrics, to compare versions of TRL.

    PYTHONPATH=tests python tests/helpers/ppo_metrics.py FILE.json [--own-base]

--own-base hides TRL's PPO trainer, if there is one, so that ours uses its own base class.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any


def run(folder: str) -> dict[str, list[dict[str, float]]]:
    """The metrics of three updates, without timings, on one base and with separate models."""
    from helpers.ppo import numbers, small_trainer
    from helpers.tiny import make_llama, make_scorer, make_tokenizer

    size = len(make_tokenizer())
    separate: dict[str, Any] = {
        "ref_model": make_llama(size),
        "reward_model": make_scorer(size, seed=1),
        "value_model": make_scorer(size, seed=2),
        "peft_config": None,
    }
    schedule = {"num_ppo_epochs": 2, "gradient_accumulation_steps": 2, "num_mini_batches": 2, "total_episodes": 24}
    schedule |= {"score_at_end": False, "loss_reduction": "micro_batch"}  # as TRL does
    found = {}
    for name, kwargs in {"one base": {}, "separate models": separate}.items():
        trainer = small_trainer(folder, trainer_kwargs=kwargs, **schedule)
        trainer.train()
        found[name] = numbers(trainer)
    return found


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if "--own-base" in sys.argv:
        sys.modules["trl.experimental.ppo"] = None  # type: ignore[assignment]  # its import now fails
    with tempfile.TemporaryDirectory() as folder:
        logged = run(folder)
    from trl_rlaif.compat.trl_ppo import BasePPOTrainer

    Path(sys.argv[1]).write_text(json.dumps({"base": BasePPOTrainer.__name__, "logged": logged}, indent=1) + "\n")
