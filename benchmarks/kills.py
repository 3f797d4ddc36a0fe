"""Runs with every stage, algorithm and launch method, killed at random: their results must equal undisturbed ones.

    python benchmarks/kills.py --kills 100 --output benchmarks/results/kills.md

A generated tiny model runs recipes that cover all stages and algorithms (tests/helpers/killing.py). Each recipe runs
once undisturbed. Then runs of it are killed with SIGKILL, Ctrl-C or SIGTERM: four times in five before a random one of
all its changes to files and folders, else after a random time. Each is resumed and killed again until it has completed.
All files of both folders are compared bitwise, except for times: labels, pairs, samples, metrics, results, adapters,
and the checkpoints' weights, optimizers and random states.
The exit code is 1 if anything differs, or a run cannot be resumed.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from signal import Signals

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from helpers import killing  # noqa: E402  (the tests' helpers are no package)
from helpers.tiny import save_tiny_model  # noqa: E402


def main() -> int:
    """Run, kill, resume, compare, write; returns the exit code."""
    args = _arguments()
    names = [name for name in killing.RECIPES if args.only in name]
    trials: dict[str, killing.Trial] = {}
    with tempfile.TemporaryDirectory(prefix="kills-") as scratch:
        model = save_tiny_model(Path(scratch) / "model")
        for number, name in enumerate(names):
            share = (number + 1) * args.kills // len(names) - number * args.kills // len(names)
            folder, draw = Path(scratch) / str(number), random.Random(f"{args.seed} {name}")
            trials[name] = killing.try_kills(folder, model, name, share, draw)
            print(_row(name, trials[name]), *trials[name].failed, *trials[name].differences, sep="\n", flush=True)
            if args.output:
                args.output.write_text(_table(args, trials), encoding="utf-8")
    print(_verdict(trials))
    return 1 if any(trial.failed or trial.differences for trial in trials.values()) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of all recipes together")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", default="", help="recipes whose name holds this")
    parser.add_argument("--output", type=Path, help="the table, in Markdown")
    return parser.parse_args()


def _row(name: str, trial: killing.Trial) -> str:
    kinds = Counter(Signals(kill).name for kill in trial.kills)
    said = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return f"| {name} | {len(trial.kills)} ({said}) | {trial.runs} | {len(trial.failed)} | {len(trial.differences)} |"


def _verdict(trials: dict[str, killing.Trial]) -> str:
    kills, failed = sum(len(t.kills) for t in trials.values()), sum(len(t.failed) for t in trials.values())
    return (
        f"{kills} kills in {sum(t.runs for t in trials.values())} runs: {failed} could not be resumed, "
        f"{sum(len(t.differences) for t in trials.values())} files differ."
    )


def _table(args: argparse.Namespace, trials: dict[str, killing.Trial]) -> str:
    command = f"python benchmarks/kills.py --kills {args.kills} --seed {args.seed}"
    return "\n".join([
        "# Kills", "", f"`{command}`, {_processor()}.", "", _verdict(trials), "",
        "| recipe | kills | runs | not resumed | files that differ |", "|---|---|---|---|---|",
        *(_row(name, trial) for name, trial in trials.items()), "",
    ])  # fmt: skip


def _processor() -> str:
    found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{found[0].partition(': ')[2]}, one thread" if found else "an unknown processor"


if __name__ == "__main__":
    raise SystemExit(main())
