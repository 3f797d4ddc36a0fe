"""The effect of each kernel of this project in PPO: the same trainer with one of them switched off in each update."""

from __future__ import annotations

from typing import Any

from trl_rlaif.models.kernels import kernels

PARTS = ("fused_lora", "cast_weights", "logprob_head")
# The first update is a warm-up; the last repeats the second, to estimate the noise. None: without any of them.
ORDER: tuple[tuple[str, ...] | None, ...] = ((), (), *((part,) for part in PARTS), None, ())


def ablate(trainer: Any, side: Any) -> None:
    """Train one update at a time, and record seconds and peaks by phase in ``side.ablation``."""
    for off in ORDER:
        with kernels({part: off is not None and part not in off for part in PARTS}):
            trainer.train()
        side.close("rest")
        found = {"without": "all" if off is None else ", ".join(off), "seconds": dict(side.updates[-1])}
        side.ablation.append(found | {"gib_by_phase": {k: v / 2**30 for k, v in side.peaks.items()}})
        side.all_peaks |= {k: max(v, side.all_peaks.get(k, 0)) for k, v in side.peaks.items()}
        side.peaks.clear()
        side.store()
