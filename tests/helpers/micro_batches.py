"""One update on responses of many lengths. Run as a script (tests/ on PYTHONPATH), this is one of two processes."""

from __future__ import annotations

import copy
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from helpers import ppo_task
from helpers.processes import write_result
from trl_rlaif.types import RehearsalPair, Rollout

ROWS, WIDTH, CLIP, VF_COEF, GAMMA = 8, 12, 0.2, 0.3, 0.05


class RaggedTrainer(ppo_task.SeededTrainer):
    """Cuts each response to 1 to 12 tokens, and adds noise to the rollout's log-probabilities and values."""

    def sample(self, batch: dict[str, Any]) -> Rollout:
        rollout, noise = super().sample(batch), []
        lengths = [1 + zlib.crc32(prompt.encode()) % WIDTH for prompt in batch["prompt"]]
        for prompt in batch["prompt"]:
            generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
            noise.append(0.3 * torch.randn(2, WIDTH, generator=generator))
        rollout = replace(rollout, lengths=torch.tensor(lengths))
        (mask, value_mask), noise = rollout.masks(), torch.stack(noise, 1)
        return replace(
            rollout,
            logprobs=(rollout.logprobs + noise[0]) * mask,
            ref_logprobs=rollout.ref_logprobs * mask,
            values=(rollout.values + noise[1]) * value_mask,
        )


def pairs() -> list[RehearsalPair]:
    """Eight rehearsal pairs, with responses of one to eight tokens."""
    return [RehearsalPair("", "", None, None, "test", [0, 1 + i], [2 + i % 3] * (1 + i)) for i in range(ROWS)]


def step(folder: Path, rows: int, *, processes: int = 1, rehearse: bool = False, **options: Any) -> dict[str, Any]:
    """Take a step on this process's share of eight prompts, with ``rows`` per micro-batch.

    Returns:
        gradients of the first step, by name; lengths of this process's responses; logged, by name; moved, the models
        after that step. Also what the gradients were computed from: shared (the models), rollout, advantages, returns.
    """
    seen: dict[str, Any] = {}
    settings = {"num_ppo_epochs": 1, "vf_coef": VF_COEF, "cliprange": CLIP, "cliprange_value": CLIP}
    settings |= {
        "response_length": WIDTH,
        "rehearsal_coef": GAMMA,
        "total_episodes": ROWS,
        "temperature": 0.7,
    } | options
    trainer = ppo_task.make_trainer(
        folder, prompts=ROWS, kind=RaggedTrainer, per_device_train_batch_size=rows,
        gradient_accumulation_steps=ROWS // processes // rows, **settings,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    for parameter in trainer.shared.parameters():
        if parameter.requires_grad:  # new adapters are zero, and so are some of their gradients
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    trainer.shared.double()  # the only rounding left is in the losses, which are computed in float32
    if rehearse:
        trainer.rehearsal.pairs = pairs()
        trainer.rehearsal.draw = lambda size: pairs()[trainer.accelerator.process_index :: processes]
    update, optimizer = trainer.update, trainer.optimizer.optimizer
    take = optimizer.step

    def watched_update(rollout: Rollout, advantages: torch.Tensor, returns: torch.Tensor) -> Any:
        seen.update(shared=copy.deepcopy(trainer.shared), rollout=rollout, advantages=advantages, returns=returns)
        return update(rollout, advantages, returns)

    def watched_step(*args: Any, **kwargs: Any) -> Any:
        found = {n: p.grad.clone() for n, p in trainer.shared.named_parameters() if p.grad is not None}
        seen.setdefault("gradients", found)
        take(*args, **kwargs)
        seen.setdefault("moved", copy.deepcopy(trainer.shared))

    trainer.update, optimizer.step = watched_update, watched_step
    trainer.train()
    return seen | {"lengths": seen["rollout"].lengths.tolist(), "logged": trainer.state.log_history[0]}


def main(output: str) -> None:
    """Micro-batches of four, two and one; each process writes its results to ``output/RANK.pt``."""
    torch.set_num_threads(1)
    folder, found = Path(output), {}
    for rows in (4, 2, 1):
        for trunk in (False, True):
            options = {"value": "trunk"} if trunk else {}
            seen = step(folder / f"{rows}{trunk}", rows, rehearse=True, processes=2, **options)
            found[rows, trunk] = {name: seen[name] for name in ("gradients", "lengths", "logged")}
    write_result(folder, found)


if __name__ == "__main__":
    main(*sys.argv[1:])
