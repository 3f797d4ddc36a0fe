"""Fuzz `trl-rlaif` with damaged recipes, data files and run folders, flipped bits, and random small recipes.

    python benchmarks/fuzz.py recipes --cases 10000 --output runs/fuzz
    python benchmarks/fuzz.py data --cases 10000 --output runs/fuzz
    python benchmarks/fuzz.py folders --cases 500 --output runs/fuzz
    python benchmarks/fuzz.py flips --cases 100 --output runs/fuzz
    python benchmarks/fuzz.py runs --cases 1000 --limit 120 --output runs/fuzz

Case n depends only on (seed, n), and its outcome is a line of OUTPUT/<kind>.jsonl: repeating the command resumes, and
``--case n`` shows one case. An outcome is ``accepted`` (exit code 0), ``refused`` (a message and exit code 1 or 2),
``traceback`` (an unhandled exception), ``hang`` (longer than --limit seconds) or ``died``. Random recipes (``runs``)
are checked, and accepted ones are run: ``ran`` to the end, ``message`` (a UserError) or ``failed`` (another error with
a message, such as diverging training); a run may take 120 seconds. For a flipped bit, the outcome is ``noticed``,
``harmless`` (the run ends with the same results) or ``unnoticed``. The exit code is 1 after a traceback, a hang, a
death or an unnoticed bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# The tests' helpers are not an installed package.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1] / "tests")]

from fuzz_commands import BAD, BASES, ENVIRONMENT, bases  # noqa: E402
from fuzz_files import data, recipes  # noqa: E402
from fuzz_folders import flips, folders, make_bases  # noqa: E402
from helpers import forked  # noqa: E402
from helpers.random_recipes import outcome_of, write_random_recipe, write_sources  # noqa: E402

# Extra seconds for the first case: the fork server loads all libraries.
_LOADING = 300


def _runs(draw: random.Random, folder: Path) -> dict[str, Any]:
    recipe = write_random_recipe(draw, bases() / "sources", folder)
    found = outcome_of(recipe, limit=120)
    return {**found, "said": found["said"][-3000:], "recipe": recipe.read_text()}


KINDS: dict[str, Callable[[random.Random, Path], dict[str, Any]]] = {
    "recipes": recipes, "data": data, "folders": folders, "flips": flips, "runs": _runs
}  # fmt: skip


def main() -> int:
    """Run the remaining cases, and print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that a case may take")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--case", type=int, help="show this case alone")
    args = parser.parse_args()
    os.environ[BASES] = str((args.output / "bases").resolve())
    args.output.mkdir(parents=True, exist_ok=True)
    if args.kind in ("folders", "flips"):
        make_bases(bases())
    if args.kind == "runs" and not (bases() / "sources").exists():
        write_sources(bases() / "sources")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        if args.case is not None:
            os.environ.update(ENVIRONMENT)
            print(json.dumps(_outcome(args.kind, args.seed, args.case, Path(scratch)), indent=1, ensure_ascii=False))
            return 0
        found = _all_cases(args, Path(scratch))
    return _table(args, found)


def _all_cases(args: argparse.Namespace, scratch: Path) -> dict[int, dict[str, Any]]:
    """The outcome of each case, including those of earlier calls."""
    path = args.output / f"{args.kind}-{args.seed}.jsonl"
    found = {row["case"]: row for row in map(json.loads, path.read_text().splitlines())} if path.exists() else {}
    waiting = [n for n in range(args.cases) if n not in found]
    shares = [waiting[i :: args.workers] for i in range(args.workers)]
    workers = [_Worker(args, share, scratch / str(i), path) for i, share in enumerate(shares) if share]
    while workers:
        workers = [worker for worker in workers if worker.goes_on()]
        time.sleep(0.05)
    return {row["case"]: row for row in map(json.loads, path.read_text().splitlines()) if row["case"] < args.cases}


class _Worker:
    """A process that runs its share of the cases in turn, and is replaced if a case hangs or kills it."""

    def __init__(self, args: argparse.Namespace, share: list[int], scratch: Path, results: Path) -> None:
        self.args, self.share, self.scratch, self.results = args, share, scratch, results
        scratch.mkdir(parents=True)
        self.done = scratch / "done"  # one line per case
        self.log = scratch / "log"
        self.log.touch()
        self.process = self._start()

    def _start(self) -> BaseProcess:
        self.done.write_text("")
        self.seen, self.since = 0, time.monotonic()
        call = (_cases, self.args.kind, self.args.seed, self.share, str(self.scratch), str(self.results))
        return forked.start(*call, environment=ENVIRONMENT, output=str(self.log))

    def goes_on(self) -> bool:
        done = len(self.done.read_text().splitlines())
        if done > self.seen:
            self.seen, self.since = done, time.monotonic()
        hangs = time.monotonic() - self.since > self.args.limit + (0 if done else _LOADING)
        if self.process.is_alive() and not hangs:
            return True
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        done = len(self.done.read_text().splitlines())
        if done < len(self.share):
            case = self.share[done]
            said = self.log.read_text(errors="replace")[-2000:]
            _append(self.results, {"case": case, "outcome": "hang" if hangs else "died", "said": said})
            self.share = self.share[done + 1 :]
            if self.share:
                self.process = self._start()
                return True
        return False


def _cases(kind: str, seed: int, cases: list[int], scratch: str, results: str) -> None:
    """Run in a separate process; append the outcome of each case as soon as it is known."""
    for case in cases:
        folder = Path(scratch) / "case"
        shutil.rmtree(folder, ignore_errors=True)
        _append(Path(results), {"case": case, **_outcome(kind, seed, case, folder)})
        with (Path(scratch) / "done").open("a") as file:
            file.write(f"{case}\n")


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _outcome(kind: str, seed: int, case: int, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    return KINDS[kind](random.Random(f"{kind} {seed} {case}"), folder)


def _table(args: argparse.Namespace, found: dict[int, dict[str, Any]]) -> int:
    counts = Counter(row["outcome"] for row in found.values())
    told = ", ".join(f"{n} {what}" for what, n in counts.most_common())
    print(f"{args.kind}, seed {args.seed}: {len(found)} cases. {told}.")
    for case, row in found.items():
        if row["outcome"] in BAD:
            last = " | ".join(row.get("said", "").strip().splitlines()[-3:])[-300:]
            print(f"  {case} ({row.get('of', '')} {row.get('damage', '')}): {row['outcome']}: {last}")
    return 1 if any(counts[what] for what in BAD) else 0


if __name__ == "__main__":
    raise SystemExit(main())
