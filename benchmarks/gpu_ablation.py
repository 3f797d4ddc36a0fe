"""What each kernel of this project is worth: the same trainer, with one of them switched off in each update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

# The first update warms up; the last is the second again, for the noise.
ORDER = ((), (), ("fused LoRA",), ("log-probability head",), ("block cache",), None, ())


@contextmanager
def without(parts: tuple[str, ...] | None) -> Iterator[None]:
    """Compute as transformers and PEFT do what these kernels compute; None switches off all of them."""
    from trl_rlaif.models.kernels.fused_lora import _Fused

    switches = {
        "fused LoRA": [patch.object(_Fused, "_short_way", lambda self: None)],
        "log-probability head": [patch("trl_rlaif.rl.forward.is_plain", lambda model: False)],
        "block cache": [patch("trl_rlaif.rl.rollouts.block_cache", lambda model: None)],
    }
    with ExitStack() as undo:
        for part in switches if parts is None else parts:
            for switch in switches[part]:
                undo.enter_context(switch)
        yield


def ablating(side: Any) -> Any:
    """A callback that switches before each update, and keeps seconds and peaks by phase in ``side.ablation``."""
    from transformers import TrainerCallback

    class Ablation(TrainerCallback):
        """One kernel less in each update."""

        def __init__(self) -> None:
            self.off = ExitStack()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._switch()

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self._switch()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            side.close("rest")
            off = ORDER[len(side.ablation)]
            found = {"without": "all" if off is None else ", ".join(off), "seconds": dict(side.updates[-1])}
            side.ablation.append(found | {"gib_by_phase": {k: v / 2**30 for k, v in side.peaks.items()}})
            side.all_peaks |= {k: max(v, side.all_peaks.get(k, 0)) for k, v in side.peaks.items()}
            side.peaks.clear()
            self._switch()

        def _switch(self) -> None:
            self.off.close()
            if len(side.ablation) < len(ORDER):
                self.off.enter_context(without(ORDER[len(side.ablation)]))

    return Ablation()
