"""Reward training on packed pairs of many lengths. As a script (tests/ on PYTHONPATH), this is one of two processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from trl_rlaif_advantage import AdvantageModel

from helpers.processes import write_result
from helpers.reward import small_config
from helpers.tiny import make_scorer, make_tokenizer
from trl_rlaif import RewardTrainer
from trl_rlaif.models.sharding import is_shared_out
from trl_rlaif.reward import scoring


def _pairs() -> Dataset:
    """Long and short pairs: two processes with half a batch each need different numbers of forward passes."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 400, (count,), generator=generator).tolist()

    rows = []
    for i in range(24):
        prompt = tokens(20 if i % 4 == 0 else 3)
        chosen, rejected = prompt + tokens(3 + i % 7), prompt + tokens(2 + i % 4)
        row = {"chosen_ids": chosen, "rejected_ids": rejected, "prompt_length": len(prompt), "category": "ab"[i % 2]}
        rows.append(row | {"length": max(len(chosen), len(rejected))})
    return Dataset.from_list(rows)


def run(folder: Path, *, batch: int, rows: bool) -> dict[str, Any]:
    """Six steps of four pairs over all processes, ``batch`` of them in this one.

    Args:
        rows: Concatenate pairs into one row, as on a CPU; otherwise one row per pair, as on a GPU.

    Returns:
        losses; parameters, the trainable ones by name; factors of the adaptive margins; forwards, forward passes per
        step; shared_out, whether the model's weights are sharded.
    """
    if not rows:
        scoring._reads_rows = lambda _inner: False
    grouped = {"train_sampling_strategy": "group_by_length"}
    args = small_config(folder, per_device_train_batch_size=batch, num_train_epochs=1, **grouped)
    transform = AdvantageModel(adapt="variance", std_band=(0.01, 0.02))
    torch.manual_seed(0)
    trainer = RewardTrainer(
        model=make_scorer(),
        args=args,
        train_dataset=_pairs(),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=4, task_type="SEQ_CLS", target_modules="all-linear", modules_to_save=["score"]),
        reward_transforms=[transform],
        batch_tokens=40,
    )
    forwards: list[int] = []
    trainer.model.register_forward_pre_hook(lambda *_: forwards.append(trainer.state.global_step))
    trainer.train()
    return {
        "shared_out": is_shared_out(trainer.model),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "parameters": {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad},
        "factors": dict(transform.margins.factor),
        "forwards": [forwards.count(step) for step in range(6)],
    }


def main(output: str, rows: str) -> None:
    """Run as one of two processes; each writes its results to ``output/RANK.pt``."""
    torch.set_num_threads(1)
    write_result(Path(output), run(Path(output) / "run", batch=2, rows=rows == "rows"))


if __name__ == "__main__":
    main(*sys.argv[1:])
