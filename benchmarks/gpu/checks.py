"""GPU checks: correctness, and the speed of decoding, judging and reward training with a large NF4 model.

    PYTHONPATH=.:plugins:tests python benchmarks/gpu/checks.py checks --output checks.json
    ... speed /tmp/models/8b --output speed.json          # a checkpoint of gpu.py's
    ... pairs /tmp/models/8b --output pairs.json

Every number is printed with its upper limit; --device cpu tests that everything runs.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from trl_rlaif.judging.packed import PackedModel
from trl_rlaif.models.kernels import autocast, generation_kernels, kernels, training_kernels
from trl_rlaif.models.loading import ModelSpec, load_model, load_tokenizer
from trl_rlaif.models.safe_training import page_again, without_cudnn_attention
from trl_rlaif.models.shared_model import SharedBase
from trl_rlaif.reward.collator import SoftPreferenceCollator
from trl_rlaif.reward.scoring import PairScorer, can_pack
from trl_rlaif.rl.rollouts import generate
from trl_rlaif.testing.models import make_scorer, save_tiny_model

KINDS = {"float32": ("float32", "none"), "bfloat16": ("bfloat16", "none"), "nf4": ("bfloat16", "nf4")}


class Record:
    """Numbers by name, printed and written immediately, since a time limit may end the process.

    Args:
        device: Where models are computed; on a CPU sizes are a twentieth.
        output: File for all of them; None writes none.
    """

    def __init__(self, device: str, output: Path | None) -> None:
        self.device, self.output, self.numbers = device, output, {}
        self.shrink = 20 if device == "cpu" else 1

    def add(self, name: str, value: float | str, below: float | None = None) -> None:
        """Record a number, and print whether it is below its limit."""
        self.numbers[name] = value
        if self.output:
            self.output.write_text(json.dumps(self.numbers, indent=1) + "\n")
        verdict = "" if below is None else "  ok" if value < below else f"  WRONG, not below {below}"
        print(f"{name:<58}{value if isinstance(value, str) else f'{value:.4g}'}{verdict}", flush=True)

    def failed(self, name: str, error: Exception) -> None:
        """Record the error of a failed check; the others continue."""
        traceback.print_exc()
        self.add(name, f"FAILED {type(error).__name__}: {str(error)[:200]}")

    def load(self, path: Any, kind: str, labels: int | None = None) -> Any:
        """A frozen model of a kind, on the device."""
        model = load_model(ModelSpec(str(path), *KINDS[kind]), num_labels=labels).eval().requires_grad_(False)
        return model if kind == "nf4" else model.to(self.device)

    def wait(self) -> None:
        """Wait for the GPU's queued work."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any], times: int = 3) -> float:
        """The fastest of several runs, after a warm-up."""
        run()
        found = []
        for _ in range(times):
            self.wait()
            began = time.perf_counter()
            run()
            self.wait()
            found.append(time.perf_counter() - began)
        return min(found)


def _error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.float() - exact.float()).norm() / exact.float().norm()).item()


def _tokens(count: int, seed: int) -> list[int]:
    return torch.randint(3, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


# ---- Correctness ----------------------------------------------------------------------------------------


def check_nf4(record: Record, folder: str) -> None:
    """bitsandbytes' kernels: the product for few rows, the one for many, and the gradient."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(1024, 512, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16).to(record.device)
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    for rows in (1, 4, 32, 2048):
        x = torch.randn(rows, 1024, device=record.device, dtype=torch.bfloat16, requires_grad=True)
        y = layer(x)
        y.float().sum().backward()
        record.add(f"nf4 product, {rows} rows", _error(y, x.float() @ weight.t()), 0.01)
        record.add(f"nf4 gradient, {rows} rows", _error(x.grad, weight.sum(0).expand(rows, -1)), 0.02)


def check_padding(record: Record, folder: str) -> None:
    """Gradients with fully masked padding rows, at lengths for which cuDNN's attention gives NaN (torch 2.11)."""
    for length in (64, 192, 320):
        query = torch.randn(2, 4, length, 64, device=record.device, dtype=torch.bfloat16, requires_grad=True)
        mask = torch.ones(2, 1, length, length, dtype=torch.bool, device=record.device).tril()
        mask[0, :, :, :9] = False
        attend = torch.nn.functional.scaled_dot_product_attention
        for name, context, below in (("as torch chooses", nullcontext(), None), ("ours", without_cudnn_attention(), 1)):
            query.grad = None
            with context:
                attend(query, query.detach(), query.detach(), attn_mask=mask).float().square().sum().backward()
            bad = (~query.grad[:, :, 9:].isfinite()).sum().item()
            record.add(f"attention, {length} tokens, {name}: gradients not finite", bad, below)


def check_judge(record: Record, folder: str) -> None:
    """Packed questions against single ones."""
    prefix = _tokens(40, 1)
    groups = [[[*prefix, *_tokens(90, 2), *_tokens(30, s)] for s in (3, 4)], [[*prefix, *_tokens(17, 5)]]]
    for kind in KINDS:
        model = record.load(folder, kind)
        record.add(f"judge, {kind}: does not pack", not PackedModel.can_read(model, 300), 0.5)
        packed = PackedModel(model)
        packed.cache(prefix)
        rows = [torch.tensor([row], device=record.device) for group in groups for row in group]
        with torch.no_grad():
            plain = torch.stack([model(row).logits[0, -1] for row in rows])
        error = _error(packed.logits(groups, 1)[:, 0], plain)
        record.add(f"judge, {kind}: error of the logits", error, 1e-4 if kind == "float32" else 0.03)


def check_reward(record: Record, folder: str) -> None:
    """Packed pairs, by the same check as in a run."""
    for kind in ("float32", "bfloat16"):
        model = make_scorer(hidden_size=64).to(record.device, getattr(torch, kind))
        record.add(f"reward, {kind}: does not pack", not can_pack(model), 0.5)


def check_lora(record: Record, folder: str) -> None:
    """Fused LoRA layers and PEFT's, under autocast and with gradient checkpointing, against float32."""
    rows = torch.tensor([_tokens(50, seed) for seed in range(3)], device=record.device)
    for kind in KINDS:
        grads = {}
        for name in ("float32", "peft", "fused"):
            torch.manual_seed(1)
            config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
            model = get_peft_model(record.load(folder, kind), config).train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
            low = name != "float32" or kind == "nf4"
            if not low:
                model.float()
            with kernels(fused_lora=name == "fused"), training_kernels(model, bf16=low):
                with autocast(SimpleNamespace(bf16=low), torch.device(record.device)):
                    logits = model(rows).logits
                logits.float().log_softmax(-1)[..., 5].mean().backward()
            grads[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        if kind == "nf4":  # has no float32
            record.add("fused LoRA, nf4: gradient less PEFT's", _error(grads["fused"], grads["peft"]), 0.15)
        else:
            fused, peft = (_error(grads[name], grads["float32"]) for name in ("fused", "peft"))
            record.add(f"fused LoRA, {kind}: error of the gradient by PEFT's", fused / peft, 1.3)


def check_ppo(record: Record, folder: str) -> None:
    """Two updates, against one update, a checkpoint and the second update: bitwise equal?"""
    from helpers.ppo_task import make_trainer

    def trainer(out: Path, kind: str) -> Any:
        shared = SharedBase(record.load(folder, kind), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "total_episodes": 32}
        settings |= {"num_ppo_epochs": 2, "learning_rate": 1e-3, "gradient_checkpointing": True, "seed": 3}
        settings |= {"use_cpu": record.device == "cpu", "bf16": kind != "float32"}
        settings |= {"save_strategy": "steps", "save_steps": 1}
        settings["optim"] = "paged_adamw_8bit" if record.device == "cuda" else "adamw_torch"
        return make_trainer(out, prompts=32, model=shared, **settings)

    def learned(trained: Any) -> dict[str, torch.Tensor]:
        return {n: p.detach().cpu().clone() for n, p in trained.model.named_parameters() if p.requires_grad}

    for kind in KINDS if record.device == "cuda" else ("nf4",):
        whole, broken = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
        first = trainer(whole, kind)
        first.train()
        log = [entry for entry in first.state.log_history if "val/ratio" in entry]
        record.add(f"ppo, {kind}: |ratio - 1| in the first update", abs(log[0]["val/ratio"] - 1), 0.05)
        record.add(f"ppo, {kind}: |KL| in the first update", abs(log[0]["objective/kl"]), 0.05)
        again = trainer(broken, kind)
        again.train(resume_from_checkpoint=str(whole / "checkpoint-1"))
        expected, found = learned(first), learned(again)
        difference = max((found[name] - value).abs().max() for name, value in expected.items()).item()
        record.add(f"ppo, {kind}: resumed, largest difference", difference, 1e-12)


def check_paging(record: Record, folder: str) -> None:
    """A paged optimizer's states after resuming: paged as before, with equal values and an equal next step."""
    from bitsandbytes.optim import PagedAdamW8bit

    torch.manual_seed(0)
    start, gradients = torch.randn(2**19, device=record.device), torch.randn(4, 2**19, device=record.device)

    def steps(optimizer: Any, parameter: torch.Tensor, numbers: list[int]) -> torch.Tensor:
        for number in numbers:
            parameter.grad = gradients[number].clone()
            optimizer.step()
        return parameter.detach().clone()

    whole = torch.nn.Parameter(start.clone())
    first = PagedAdamW8bit([whole], lr=1e-2)
    midway = steps(first, whole, [0, 1])
    kept = Path(tempfile.mkdtemp()) / "optimizer.pt"
    torch.save(first.state_dict(), kept)
    resumed = torch.nn.Parameter(midway)
    second = PagedAdamW8bit([resumed], lr=1e-2)
    second.load_state_dict(torch.load(kept, map_location="cpu", weights_only=False))
    page_again(second)
    paged = [getattr(second.state[resumed][name], "is_paged", False) for name in ("state1", "state2")]
    record.add("paged states: plain after a resumption", 2 - sum(paged), 0.5 if record.device == "cuda" else None)
    difference = steps(first, whole, [2, 3]) - steps(second, resumed, [2, 3])
    record.add("paged states: resumed, largest difference", difference.abs().max().item(), 1e-12)


def checks(record: Record, folder: Path | None) -> None:
    """All correctness checks, on a tiny model."""
    with tempfile.TemporaryDirectory() as tiny:
        save_tiny_model(tiny, hidden_size=64)
        for check in (check_nf4, check_padding, check_judge, check_reward, check_lora, check_paging, check_ppo):
            try:
                check(record, tiny)
            except Exception as error:
                record.failed(check.__name__, error)


# ---- Speed ----------------------------------------------------------------------------------------------


def speed(record: Record, folder: Path) -> None:
    """Decoding and judging with an NF4 checkpoint, and the operations per token."""
    model, vocab = record.load(folder, "nf4"), load_tokenizer(str(folder)).vocab_size
    shared = SharedBase(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    tokens = 32 if record.shrink == 1 else 4

    def draw(rows: int) -> None:
        ids = torch.randint(4, vocab, (rows, 256 // record.shrink), device=record.device)
        with shared.role("policy"), generation_kernels(model, bf16=True):
            generate(model, ids, torch.ones_like(ids), max_new_tokens=tokens, temperature=1.0, pad_id=0, stop_id=None)

    for rows in (4, 16, 32):
        record.add(f"ms a token, {rows} rows", 1e3 * record.seconds(lambda rows=rows: draw(rows), 1) / tokens)
    for on in (False, True):
        with kernels(cast_weights=on):
            once = record.seconds(lambda: draw(4), 2)
        record.add(f"ms a token, 4 rows, cast_weights {'on' if on else 'off'}", 1e3 * once / tokens)
    _judging(record, model, shared, vocab)
    cuda = [torch.profiler.ProfilerActivity.CUDA] if record.device == "cuda" else []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, *cuda]) as profile:
        draw(4)
        record.wait()
    events = profile.key_averages()
    record.add("kernels a token, 4 rows", sum(e.count for e in events if "LaunchKernel" in e.key) / tokens)
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    print(events.table(sort_by=order, row_limit=18, max_name_column_width=60))


def _judging(record: Record, model: Any, shared: SharedBase, vocab: int) -> None:
    """Questions with 300 tokens shared by all, 250 shared by both orders, and 150 unique."""

    def rest(count: int) -> list[int]:
        return torch.randint(4, vocab, (count // record.shrink,)).tolist()

    prefix, packed = rest(300), PackedModel(model)
    groups = [[[*prefix, *common, *rest(150)] for _ in "12"] for common in (rest(250) for _ in range(14))]
    rows = torch.tensor([row for group in groups for row in group], device=record.device)
    with shared.role(None), torch.no_grad():
        packed.cache(prefix)
        ways = {"packed": lambda: packed.logits(groups, 1), "plain rows": lambda: model(rows, use_cache=False)}
        for name, run in ways.items():
            record.add(f"pairs a second, {name}", len(groups) / record.seconds(run, 2))


def pairs(record: Record, folder: Path) -> None:
    """Reward training's step over pairs that share a prompt: packed and padded, fused LoRA and PEFT's."""
    draw, vocab = random.Random(0), load_tokenizer(str(folder)).vocab_size

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(4, vocab) for _ in range(draw.randint(low // record.shrink, high // record.shrink))]

    def example(prompt: tuple[int, int], response: tuple[int, int]) -> dict[str, Any]:
        head = ids(*prompt)
        return {
            "chosen_ids": head + ids(*response),
            "rejected_ids": head + ids(*response),
            "prompt_length": len(head),
        }

    shapes = {"256+200": ((200, 312), (120, 280)), "900+120": ((700, 1100), (60, 180))}
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(record.load(folder, "nf4", 1), lora).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    record.add("pairs, nf4: does not pack", not can_pack(model), 0.5)
    for name, shape in shapes.items():
        examples = [example(*shape) for _ in range(8)]
        for fused in (False, True):
            for packed in (False, True):
                what = f"pairs, nf4, {name}, {'packed' if packed else 'padded'}, {'fused' if fused else 'PEFT'}"
                with kernels(fused_lora=fused), training_kernels(model, bf16=True, packed=True):
                    _time_pairs(record, model, SoftPreferenceCollator(0, packed=packed)(examples), what)


def _time_pairs(record: Record, model: Any, rows: dict[str, Any], what: str) -> None:
    inputs = {name: x.to(record.device) for name, x in rows.items() if isinstance(x, torch.Tensor)}
    scorer = PairScorer(model, model, batch_tokens=2**14)

    def step() -> None:
        with torch.autocast(record.device, torch.bfloat16):
            chosen, rejected = scorer(**inputs).logits[:, 0].chunk(2)
        (-torch.nn.functional.logsigmoid(chosen - rejected).mean()).backward()

    if record.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    record.add(f"{what}: pairs a second", 8 / record.seconds(step, 2))
    if record.device == "cuda":
        record.add(f"{what}: GiB", torch.cuda.max_memory_allocated() / 2**30)


def main() -> None:
    """Check, or measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("checks", "speed", "pairs"))
    parser.add_argument("folder", nargs="?", type=Path, help="a checkpoint, for speed and pairs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.device == "cuda":
        free = torch.cuda.mem_get_info()[0] / 2**30
        print(torch.cuda.get_device_name(), torch.__version__, f"{free:.1f} GiB free")
    record = Record(args.device, args.output)
    try:
        {"checks": checks, "speed": speed, "pairs": pairs}[args.what](record, args.folder)
    except Exception as error:
        record.failed(args.what, error)


if __name__ == "__main__":
    main()
