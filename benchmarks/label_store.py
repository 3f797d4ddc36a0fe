"""What pairs and labels take on the host: memory, seconds and bytes on disk for each, as the stage `label` holds them.

    OMP_NUM_THREADS=1 python benchmarks/label_store.py --pairs 10000 100000 --output benchmarks/results/label_store.json

Pairs are synthetic (a prompt and two responses of 1,000 characters each) and labels are scripted: no model computes
anything. Each number of pairs is read by a process of its own, as a run that is resumed reads it. Seconds are the
processor's, except those of adding labels, which wait for the disk. Bytes are of the resident set.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from trl_rlaif.files import sealed, to_line
from trl_rlaif.labels import LabelKey, LabelStore
from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.context import Context, pair_row
from trl_rlaif.pipeline.preferences import write_preferences
from trl_rlaif.types import Label, Pair

T = TypeVar("T")
KEY = LabelKey("distilled", {"debias": "mean_logit"}, "scripted", "1", "1")
CHARACTERS = 1000
# Labels that are added one by one, each seen on the disk; the rest is written at once.
ADDED = 2000


def make_pair(number: int) -> Pair:
    """A pair with texts of its own."""
    draw = random.Random(number)
    prompt, first, second = (f"{draw.getrandbits(4 * CHARACTERS):0{CHARACTERS}x}" for _ in range(3))
    return Pair(str(number), prompt, first, second, "general", None, {})


def make_label(number: int) -> Label:
    """A label whose numbers have as many digits as a judge's."""
    draw = random.Random(number)
    p_12, p_21, mass_12, mass_21 = (draw.random() for _ in range(4))
    return Label(str(number), (p_12 + p_21) / 2, p_12, p_21, mass_12, mass_21, None, None, "scripted")


def write(folder: Path, pairs: int) -> dict[str, float]:
    """The files of a run of so many pairs; seconds and bytes of one."""
    pairs_path, labels_path = folder / artifacts.PAIRS, folder / artifacts.LABELS
    with pairs_path.open("w") as file:
        file.writelines(to_line(sealed(pair_row(make_pair(number)))) for number in range(pairs))
    store, labeled = LabelStore(labels_path), [(make_pair(number), make_label(number)) for number in range(ADDED)]
    began, busy = time.perf_counter(), time.process_time()
    for pair, label in labeled:
        store.add(KEY, pair, label)
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    row = store.find(KEY, [make_pair(0)])["0"]
    with labels_path.open("a") as file:
        for number in range(ADDED, pairs):
            file.write(
                to_line(sealed(row | {"id": str(number), "pair": KEY.of(make_pair(number)), "p": number / pairs}))
            )
    return {
        "add: seconds a label": seconds / ADDED,
        "add: processor seconds a label": busy / ADDED,
        "pairs.jsonl: bytes a pair": pairs_path.stat().st_size / pairs,
        "labels.jsonl: bytes a label": labels_path.stat().st_size / pairs,
    }


def read(folder: Path) -> dict[str, float]:
    """Seconds and bytes of memory of one pair, in each step of a label stage that is resumed."""
    found: dict[str, float] = {}

    def step(name: str, run: Callable[[], T]) -> T:
        before, began = _resident(), time.process_time()
        result = run()
        found[f"{name}: seconds"] = time.process_time() - began
        found[f"{name}: bytes"] = _resident() - before
        return result

    pairs = step("pairs", lambda: Context.pairs(SimpleNamespace(folder=folder)))  # type: ignore[arg-type]
    store = step("store", lambda: LabelStore(folder / artifacts.LABELS))
    rows = step("find", lambda: store.find(KEY, pairs))
    context: Any = SimpleNamespace(folder=folder, chat=lambda prompt: prompt)
    before = _resident()
    known = {id: row["p"] for id, row in rows.items() if row["p"] is not None}
    step("preferences", lambda: write_preferences(context, pairs, known))
    found["preferences: bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert len(known) == len(pairs)
    return {f"{name} a pair": value / len(pairs) for name, value in found.items()}


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    """Write and read every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", type=int, default=[10_000, 100_000])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        import datasets  # noqa: F401  # so that its import does not count

        print(json.dumps(read(args.read)))
        return
    records = []
    for pairs in args.pairs:
        with tempfile.TemporaryDirectory() as folder:
            written = write(Path(folder), pairs)
            child = [sys.executable, __file__, "--read", folder]
            done = subprocess.run(child, capture_output=True, text=True, check=True)
        records.append({"pairs": pairs, **written, **json.loads(done.stdout.splitlines()[-1])})
        print(json.dumps(records[-1], indent=1), flush=True)
    if args.output:
        args.output.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
