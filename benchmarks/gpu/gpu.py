"""PPO on one GPU: time and memory of this project and of TRL's stock trainer, against the prediction.

    python benchmarks/gpu/gpu.py
    python benchmarks/gpu/gpu.py --sizes 8b --only ours --cards 12 --limit 500
    python benchmarks/gpu/gpu.py --sizes 8b --only ours --batch 32 --padded
    python benchmarks/gpu/gpu.py --sizes tiny --device cpu

Nothing is downloaded: models of published Llama shapes get random bfloat16 weights, are saved to a temporary folder
(16 GB for 8b; `--models` keeps them for the next command), and are loaded from there like any checkpoint. Each step
is a separate process with a time limit, and its measurements are appended to the results as soon as it ends.

Ours is the `rl` stage of a packaged recipe: policy, value, reward and reference on one base in NF4. Stock is
`trl.experimental.ppo.PPOTrainer` (TRL 1.11 or 1.12) with the same settings as far as it knows them (it does not act
on gradient_checkpointing), a LoRA policy, and value and reward models of their own: `stock-bf16` trains all of the
value model, without a paged optimizer, `stock-nf4` a LoRA of it, since 4-bit weights cannot be trained. Running out of
memory is a result.

Time is the fastest update after the first, by phase. Memory is the peak that torch allocated and reserved on the GPU,
loading included, beside what `trl-rlaif memory` predicts for the same settings; on a CPU it is the peak resident set
above the import of the libraries, and nothing is compared with it. Settings that are not the recipe's: batch, prompt
and response length, and no end token, so that every response has full length. Prompts have one length, which needs
no mask; with `--padded` they differ, as real ones do, and are padded on the left.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from models import SIZES
from table import describe

STOCK = ("stock-nf4", "stock-bf16")


def main() -> None:
    """Run every step in a separate process; store and print its measurements."""
    args = _arguments()
    if args.step:
        from sides import step

        step(args)
        return
    sides = [side for side in ("ours", *args.stock) if args.only in (None, side.partition("-")[0])]
    with tempfile.TemporaryDirectory(prefix="random-llama-") as temporary:
        for size in args.sizes:
            models = args.models or Path(temporary)
            made = _run(args, "model", size, models)
            if "error" in made:
                sys.exit(f"{size}: the model could not be made: {made['error']}")
            for card in args.cards or [None]:
                _measure(args, sides, size, models, card)


def _measure(args: argparse.Namespace, sides: list[str], size: str, models: Path, card: int | None) -> None:
    record: dict[str, Any] = {"command": " ".join(["python", "benchmarks/gpu/gpu.py", *sys.argv[1:]])}
    known = _stored(args.output)
    for side in sides:
        found = _run(args, side, size, models, card)
        record |= {key: found.pop(key) for key in ("setting", "machine") if key in found}
        record[side] = found
        if "setting" not in record:  # it ended before recording its settings
            print(f"{size} {side}: {found['error']}")
            continue
        record["ratio"] = _ratios(record, known)
        if args.output:
            args.output.write_text(json.dumps([*known, record], indent=2) + "\n")
    if "setting" in record:
        print("\n".join(describe(record)), flush=True)


def _stored(output: Path | None) -> list[dict[str, Any]]:
    return json.loads(output.read_text()) if output and output.exists() else []


def _ratios(record: dict[str, Any], known: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Stock over ours; a side measured alone is compared with the latest of the other with the same settings."""
    sides: dict[str, Any] = {}
    for other in [*known, record]:
        if all(other.get(key) == record[key] for key in ("setting", "machine")):
            sides |= {side: other[side] for side in ("ours", *STOCK) if side in other}
    ours, ratios = sides.get("ours", {}), {}
    for side in STOCK:
        stock = sides.get(side, {})
        if "seconds" in stock and "seconds" in ours:
            ratios[side] = {"seconds": round(stock["seconds"]["total"] / ours["seconds"]["total"], 3)} | {
                key: round(stock["gib"][key] / ours["gib"][key], 3) for key in stock["gib"].keys() & ours["gib"].keys()
            }
    return ratios


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", "--size", nargs="+", choices=SIZES, default=["1.5b", "8b"])
    parser.add_argument("--cards", nargs="+", type=int, metavar="GB", help="act as cards of so many GB")
    parser.add_argument("--only", choices=("ours", "stock"))
    parser.add_argument("--stock", nargs="+", choices=STOCK, default=list(STOCK))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt", type=int, help="tokens (default: 256)")
    parser.add_argument("--padded", action="store_true", help="prompts of a quarter to all of --prompt tokens")
    parser.add_argument("--response", type=int, help="tokens, all of them sampled (default: 256)")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--ablate", action="store_true", help="8 updates, some with one kernel less; the table has all")
    parser.add_argument("--set", nargs="*", default=[], metavar="rl.KEY=VALUE", help="changes to the recipe")
    parser.add_argument("--limit", type=float, default=900, help="seconds for each step (a model, or a side)")
    parser.add_argument("--models", type=Path, help="folder to keep the random models in")
    parser.add_argument("--output", type=Path, help="JSON list to append to (default on a GPU: results/gpu.json)")
    for name, kind in (("--step", str), ("--card", int), ("--result", Path)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ablate:
        args.updates = 1
    if args.output is None and args.device == "cuda":
        args.output = Path(__file__).parents[1] / "results" / "gpu.json"
    return args


def _run(args: argparse.Namespace, step: str, size: str, models: Path, card: int | None = None) -> dict[str, Any]:
    """Run one step in a separate process; returns its record, with ``error`` if it did not complete."""
    print(f"{size} {step} ...", file=sys.stderr, flush=True)
    environment = os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    above = str(Path(__file__).parents[1])  # whose parts the sides share
    environment["PYTHONPATH"] = os.pathsep.join([above, *filter(None, [environment.get("PYTHONPATH")])])
    if step == "ours":  # as in the command `run`
        environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if args.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--step", step, "--sizes", size]
        command += ["--models", str(models), "--result", str(result), *(["--card", str(card)] if card else [])]
        try:
            # stdout is reserved for this script; libraries' output goes to stderr.
            code = subprocess.run(command, env=environment, stdout=sys.stderr, timeout=args.limit).returncode
            ended = None if code == 0 else f"ended with {code}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {args.limit:.0f} s"
        found = json.loads(result.read_text()) if result.exists() else {}
    return found if ended is None or "error" in found else found | {"error": ended}


if __name__ == "__main__":
    main()
