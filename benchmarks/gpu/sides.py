"""One side of `gpu.py`, measured in a separate process."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import resource
import subprocess
import tempfile
import traceback
from dataclasses import fields
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ablation import ORDER, ablate
from models import SIZES, Size, make_model
from ppo import clock_stock, our_phases, resident, reward_adapter, time_phase, timed_updates

_PACKAGES = ("torch", "bitsandbytes", "transformers", "trl", "peft", "accelerate")


def step(args: argparse.Namespace) -> None:
    """Make the model, or measure a side; the record is in ``args.result``, with ``error`` after a failure."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        _write(args.result, {"error": "there is no CUDA device; --sizes tiny --device cpu shows that all runs"})
        return
    folder = args.models / args.sizes[0]
    if args.step == "model":
        if not (folder / "config.json").exists():
            make_model(SIZES[args.sizes[0]], folder, args.device)
        _write(args.result, {})
        return
    side = Side(args, folder)
    try:
        side.measure()
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        short = isinstance(error, MemoryError | torch.OutOfMemoryError) or "out of memory" in str(error).lower()
        if not short:
            traceback.print_exc()
        side.store(error="out of memory" if short else f"{type(error).__name__}: {str(error)[:300]}")


def _write(path: Path, content: dict[str, Any]) -> None:
    # Replaced atomically: the time limit may end the process at any moment.
    building = path.with_suffix(".new")
    building.write_text(json.dumps(content))
    building.replace(path)


class Side:
    """One side's measurement; intermediate results are stored after every update."""

    def __init__(self, args: argparse.Namespace, model: Path) -> None:
        import peft  # noqa: F401
        import torch
        import trl  # noqa: F401

        import trl_rlaif  # noqa: F401

        self.args, self.model, self.cuda = args, model, args.device == "cuda"
        self.size = SIZES[args.sizes[0]]
        self.recipe = _recipe(args, self.size, model)
        # Collected before the measurement.
        self.known = {"setting": self._setting(), "machine": _machine(self.cuda)}
        if args.step == "ours":
            self.known |= _prediction(self.recipe)
        gc.collect()
        self.imported = resident()
        self.updates: list[dict[str, float]] = []
        self.ablation: list[dict[str, Any]] = []
        self.peaks: dict[str, int] = {}
        self.all_peaks: dict[str, int] = {}
        self.reserved = self.on_card = 0
        if self.cuda and args.card:
            from trl_rlaif.memory import CONTEXT_BYTES, capacity

            room = capacity(args.card) - CONTEXT_BYTES
            torch.cuda.set_per_process_memory_fraction(min(1.0, room / torch.cuda.mem_get_info()[1]))

    def measure(self) -> None:
        """Build the trainer and train."""
        self.store()
        with tempfile.TemporaryDirectory() as folder:
            trainer = (_ours if self.args.step == "ours" else _stock)(self, Path(folder))
            self.close("loading")
            self.updates = timed_updates(trainer)
            if self.args.ablate:
                ablate(trainer, self)
                return
            trainer.add_callback(_storing(self))
            trainer.train()
        self.store()

    def watch(self, owner: Any, name: str, phase: str) -> None:
        """Record a function's peak of GPU memory as a separate phase."""
        function = getattr(owner, name)

        @wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.close("rest")
            try:
                return function(*args, **kwargs)
            finally:
                self.close(phase)

        setattr(owner, name, watched)

    def close(self, phase: str) -> None:
        """Assign the peak since the last call to a phase."""
        if not self.cuda:
            return
        import torch

        self.peaks[phase] = max(self.peaks.get(phase, 0), torch.cuda.max_memory_allocated())
        self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
        free, total = torch.cuda.mem_get_info()
        self.on_card = max(self.on_card, total - free)
        torch.cuda.reset_peak_memory_stats()

    def store(self, error: str | None = None) -> None:
        """Write the results so far."""
        self.close("rest")
        later = self.updates[1:] or self.updates
        if self.ablation:
            later = [self.updates[i] for i, off in enumerate(ORDER) if off == () and 0 < i < len(self.updates)] or later
        found: dict[str, Any] = dict(self.known)
        if later:
            fastest = min(later, key=lambda update: update["total"])
            found["seconds"] = {name: round(value, 3) for name, value in fastest.items()}
            found["updates"] = [round(update["total"], 3) for update in self.updates]
        found["gib"] = self._memory()
        if self.ablation:
            found["ablation"] = self.ablation
        if self.cuda:
            found["gib_by_phase"] = {phase: _gib(peak) for phase, peak in self._every_peak().items()}
        if "predicted_gib" in found and self.cuda:
            found["measured_over_predicted"] = round(found["gib"]["allocated"] / found["predicted_gib"], 3)
        if error is not None:
            found["error"] = error
        _write(self.args.result, found)

    def _memory(self) -> dict[str, float]:
        if not self.cuda:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            return {"resident": _gib(peak - self.imported)}
        allocated = max(self._every_peak().values())
        return {"allocated": _gib(allocated), "reserved": _gib(self.reserved), "on_card": _gib(self.on_card)}

    def _every_peak(self) -> dict[str, int]:
        names = {*self.peaks, *self.all_peaks}
        return {name: max(self.peaks.get(name, 0), self.all_peaks.get(name, 0)) for name in names}

    def _setting(self) -> dict[str, Any]:
        args = self.args
        return {
            "size": args.sizes[0],
            "like": self.size.like,
            "recipe": self.size.recipe,
            "batch": args.batch,
            "prompt_tokens": args.prompt or self.size.tokens,
            "response_tokens": args.response or self.size.tokens,
            "padded": args.padded,
            "set": args.set,
            "card_gb": args.card,
        }

    def prompts(self) -> Any:
        """A dataset of random prompts, all of full length or, with ``--padded``, of a quarter of it and more."""
        import torch
        from datasets import Dataset

        rows, length = self.args.batch * self.args.updates, self.args.prompt or self.size.tokens
        torch.manual_seed(0)
        ids = torch.randint(4, self.size.vocab, (rows, length)).tolist()
        lengths = prompt_lengths(rows, length) if self.args.padded else [length] * rows
        return Dataset.from_dict({"input_ids": [row[:n] for row, n in zip(ids, lengths, strict=True)]})


def prompt_lengths(rows: int, longest: int) -> list[int]:
    """Evenly spaced lengths from a quarter of the longest up to it, in random order; one is the longest."""
    least = max(1, longest // 4)
    lengths = [longest - (longest - least) * i // max(1, rows - 1) for i in range(rows)]
    return random.Random(0).sample(lengths, rows)


def _gib(size: float) -> float:
    return round(size / 2**30, 3)


def _storing(side: Side) -> Any:
    from transformers import TrainerCallback

    class Store(TrainerCallback):
        """Writes the result so far, in case the time limit ends the next update."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            side.store()

    return Store()


def _machine(cuda: bool) -> dict[str, Any]:
    import torch

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    versions = {name: installed(name) for name in _PACKAGES} | {"python": platform.python_version()}
    if not cuda:
        return {"cpu": platform.machine(), "cores": os.cpu_count(), "versions": versions}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0].strip()
    except (OSError, subprocess.TimeoutExpired):
        driver = None
    total = _gib(torch.cuda.mem_get_info()[1])
    name = torch.cuda.get_device_name()
    return {"gpu": name, "gib": total, "driver": driver, "cuda": torch.version.cuda, "versions": versions}


def _recipe(args: argparse.Namespace, size: Size, model: Path) -> Any:
    """The packaged recipe for this model, without the stages that are not measured."""
    from trl_rlaif.plugins import installed_plugins
    from trl_rlaif.recipe import parse_recipe, recipes_dir

    changes = {
        "model.path": str(model.resolve()),
        # The reward adapter is made here; pairs stand in for the stages before it, and nothing reads them.
        "data.pairs": str(recipes_dir() / "data" / "quickstart_prompts.jsonl"),
        "data.format": "preference",
        **dict.fromkeys(("sample", "label", "evaluate", "report"), "null"),
        "rl.total_episodes": args.batch * args.updates,
        "rl.per_device_train_batch_size": args.batch,
        "rl.gradient_accumulation_steps": 1,
        "rl.local_rollout_forward_batch_size": args.batch,
        "rl.max_prompt_length": args.prompt or size.tokens,
        "rl.response_length": args.response or size.tokens,
    }
    overrides = [f"{key}={value}" for key, value in changes.items()]
    return parse_recipe(size.recipe, overrides=[*overrides, *args.set], registry=installed_plugins().registry)


def _prediction(recipe: Any) -> dict[str, Any]:
    """The memory that torch allocates in the rl stage as predicted by `trl-rlaif memory`, in total and by phase."""
    from trl_rlaif.memory import plan_memory

    plan = plan_memory(recipe)
    phases = {when: _gib(plan.predict(when)) for stage, when in plan.phases() if stage == "rl"}
    return {"predicted_gib": max(phases.values()), "predicted_gib_by_phase": phases}


def _settings(side: Side, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The run as its stages see it, and PPOConfig's arguments in it."""
    from trl_rlaif.algorithms import ALGORITHMS
    from trl_rlaif.pipeline.context import Context
    from trl_rlaif.pipeline.run_folder import RunFolder
    from trl_rlaif.plugins import installed_plugins

    context = Context(side.recipe, RunFolder(folder), installed_plugins())
    section = side.recipe.rl
    more = {"num_sample_generations": 0, "save_strategy": "no"}
    return context, dict(ALGORITHMS[section.algorithm].preset) | context.trainer_arguments("rl", section.config) | more


def _ours(side: Side, folder: Path) -> Any:
    from trl_rlaif import PPOConfig, PPOTrainer
    from trl_rlaif.models.shared_model import SharedBase

    context, arguments = _settings(side, folder)
    shared = SharedBase(context.load_base(), context.lora)
    trainer = PPOTrainer(
        PPOConfig(**arguments),
        context.tokenizer,
        shared,
        reward_model=reward_adapter(shared, folder / "reward"),
        train_dataset=side.prompts(),
        plugins=context.plugins,
    )
    for owner, name, phase in our_phases(trainer):
        side.watch(owner, name, phase)
        time_phase(owner, name, phase)
    return trainer


def stock_arguments(arguments: dict[str, Any], known: set[str], *, nf4: bool) -> dict[str, Any]:
    """The arguments of ours that stock's PPOConfig accepts.

    A paged optimizer uses managed memory beyond the GPU's: with the states of a full value model of 8 billion weights,
    this can hang the GPU instead of running out of memory. There it is not paged.
    """
    taken = {key: value for key, value in arguments.items() if key in known}
    if nf4:
        # With bf16 it turns the norms of a 4-bit model to float32, which the head then refuses; products are in
        # bfloat16 either way.
        return taken | {"bf16": False}
    return taken | ({"optim": taken["optim"].removeprefix("paged_")} if "optim" in taken else {})


def _stock(side: Side, folder: Path) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorWithPadding
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from trl_rlaif.models.loading import ModelSpec, load_model

    context, arguments = _settings(side, folder)
    nf4 = side.args.step == "stock-nf4"

    def load(labels: int | None = None) -> Any:
        model = load_model(ModelSpec(str(side.model), "bfloat16", "nf4" if nf4 else "none"), num_labels=labels)
        return model if nf4 else model.to(side.args.device)

    policy, value, reward = load(), load(1), load(1).requires_grad_(False)
    if nf4:
        lora = side.recipe.model.lora
        config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=lora.target_modules, task_type="SEQ_CLS")
        value = get_peft_model(value, config)
    data = side.prompts()
    trainer = PPOTrainer(
        PPOConfig(**stock_arguments(arguments, {field.name for field in fields(PPOConfig)}, nf4=nf4)),
        context.tokenizer,
        policy,
        None,
        reward,
        data,
        value,
        DataCollatorWithPadding(context.tokenizer),
        eval_dataset=data,
        peft_config=context.lora,
    )
    clock_stock(trainer)
    return trainer
