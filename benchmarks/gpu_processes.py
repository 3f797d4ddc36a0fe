"""Each algorithm in two processes, with each packaged accelerate configuration, against one process.

    python benchmarks/gpu_processes.py --output benchmarks/results/gpu_processes.md     # on a machine with two GPUs
    python benchmarks/gpu_processes.py --device cpu

A tiny model is trained in float32. The recipe for ``dpo`` also has the stages ``sft`` and ``reward``, of two steps
each; the algorithms that sample make two updates, and are compared with DDP, since two processes draw different
responses than one. The exit code is 1 if a number differs by more than --tolerance, or a run fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from helpers import forked, processes  # noqa: E402  (the tests' helpers are no package)
from helpers.comparing import differences  # noqa: E402
from helpers.recipes import write_prompts, write_recipe, write_rows  # noqa: E402

from trl_rlaif.recipe.paths import recipes_dir  # noqa: E402
from trl_rlaif.testing import save_tiny_model  # noqa: E402

# On CPUs, accelerate uses DDP instead of DeepSpeed.
KINDS = {"cuda": ("ddp", "zero2", "fsdp2"), "cpu": ("ddp", "fsdp2")}
SAMPLING = ("ppo", "reinforce", "rloo", "grpo")
ALGORITHMS = ("dpo", *SAMPLING)
_ROWS, _UPDATES = 8, 2
_BATCH = {"per_device_train_batch_size": _ROWS, "learning_rate": 1e-2}
_DRAWING = {"response_length": 8, "rewards": ["helpers.rewards:even_share"]}
_NOT_RUN = dict.fromkeys(("sample", "label", "reward", "evaluate", "report"))


def main() -> int:
    """Run, compare, print; returns the exit code."""
    args = _arguments()
    worst, rows = 0.0, []
    with tempfile.TemporaryDirectory(prefix="gpu-processes-") as scratch:
        model = save_tiny_model(Path(scratch) / "model")
        for name in args.algorithms:
            recipe = _recipe(Path(scratch), model, name)
            if name not in SAMPLING:
                _run(recipe, recipe.with_name("one"), None, args.device)
            kinds = args.kinds or KINDS[args.device]
            for kind in dict.fromkeys(("ddp", *kinds) if name in SAMPLING else kinds):
                _run(recipe, recipe.with_name(kind), kind, args.device)
                reference = "ddp" if name in SAMPLING else "one"
                if kind != reference:
                    found = differences(recipe.with_name(reference), recipe.with_name(kind))
                    artefact, largest = max(found.items(), key=lambda one: one[1])
                    worst = max(worst, largest)
                    rows.append(f"| {name} | {kind} | {reference} | {largest:.1e} ({artefact}) |")
                    print(rows[-1], flush=True)
        if args.output:
            args.output.write_text(_table(rows, args), encoding="utf-8")
    return 1 if worst > args.tolerance else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help=f"packaged configurations; without any, {' '.join(KINDS['cuda'])}")
    parser.add_argument("--algorithms", nargs="+", default=ALGORITHMS, choices=ALGORITHMS, metavar="NAME")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="of a number, relative to it where it is above 1")
    parser.add_argument("--output", type=Path, help="the table, in Markdown")
    return parser.parse_args()


def _recipe(scratch: Path, model: str, name: str) -> Path:
    """A recipe in its own folder; the one for dpo also fine-tunes and trains a reward model."""
    folder = scratch / name
    folder.mkdir()
    if name in SAMPLING:
        groups = {"num_generations": 2} if name in ("rloo", "grpo") else {}
        rl = {"algorithm": name, "total_episodes": _UPDATES * _ROWS, **_DRAWING, **_BATCH, **groups}
        recipe = write_recipe(folder, model, **_NOT_RUN | {"rl": rl})
        write_prompts(folder / "train.jsonl", _UPDATES * _ROWS)
        return recipe
    pairs = [
        {"id": f"p{i}", "prompt": f"what is {i}?", "response_1": "a city", "response_2": "the fox " * (i % 5 + 1),
         "human": 1 + i % 2}
        for i in range(4 * _ROWS)
    ]  # fmt: skip
    write_rows(folder / "pairs.jsonl", pairs)
    write_rows(folder / "sft.jsonl", [{"prompt": p["prompt"], "completion": p["response_2"]} for p in pairs])
    steps = {**_BATCH, "max_steps": _UPDATES}
    data = {"prompts": None, "eval_prompts": None, "pairs": "pairs.jsonl", "format": "responses"}
    trained = {"sft": {"data": "sft.jsonl", **steps}, "reward": steps, "rl": {"algorithm": "dpo", **steps}}
    return write_recipe(folder, model, **_NOT_RUN | {"data": data, **trained})


def _run(recipe: Path, out: Path, kind: str | None, device: str) -> None:
    """Run a recipe through this script, which lets accelerate use FSDP on CPUs; ``kind`` None: in one process."""
    command = [sys.executable]
    if kind is not None:
        config = recipes_dir() / "accelerate" / f"{kind}.yaml"
        command += ["-m", "accelerate.commands.launch", "--config_file", str(config), "--mixed_precision", "no"]
        command += ["--num_processes", "2"]
    command += [__file__, "run", str(recipe), "--output", str(out)]
    paths = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONHASHSEED": "0"}  # in files, sets have its order
    if device == "cpu":
        environment |= processes.ENVIRONMENT | processes.OF_DDP
    subprocess.run(command, env=environment, check=True)


def _table(rows: list[str], args: argparse.Namespace) -> str:
    import torch

    device = torch.cuda.get_device_name() if args.device == "cuda" else "a CPU, with gloo"
    return "\n".join([
        "# Two processes", "", f"`python benchmarks/gpu_processes.py`, on {device}.", "",
        "The largest difference of two numbers in all artefacts, relative to the number where that is above 1:", "",
        "| algorithm | processes | compared with | largest difference |", "|---|---|---|---|", *rows, "",
    ])  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        forked.allow_fsdp_on_cpu()
        forked.run_command(sys.argv[1:])
    sys.exit(main())
