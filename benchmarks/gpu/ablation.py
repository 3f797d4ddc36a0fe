"""What each kernel of this project is worth in PPO: the same trainer, with one of them switched off in each update."""

from __future__ import annotations

from typing import Any

from trl_rlaif.models.kernels import kernels

PARTS = ("fused_lora", "cast_weights", "logprob_head")
# The first update warms up; the last is the second again, for the noise. None: without any of them.
ORDER: tuple[tuple[str, ...] | None, ...] = ((), (), *((part,) for part in PARTS), None, ())


def ablate(trainer: Any, side: Any) -> None:
    """Train for one update at a time, and keep seconds and peaks by phase in ``side.ablation``."""
    for off in ORDER:
        with kernels({part: off is not None and part not in off for part in PARTS}):
            trainer.train()
        side.close("rest")
        found = {"without": "all" if off is None else ", ".join(off), "seconds": dict(side.updates[-1])}
        side.ablation.append(found | {"gib_by_phase": {k: v / 2**30 for k, v in side.peaks.items()}})
        side.all_peaks |= {k: max(v, side.all_peaks.get(k, 0)) for k, v in side.peaks.items()}
        side.peaks.clear()
        side.store()
