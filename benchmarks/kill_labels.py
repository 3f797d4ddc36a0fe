"""Label runs killed with -9 at random moments and resumed: the labels must be those of an undisturbed run, bit by bit.

    python benchmarks/kill_labels.py --kills 20

A tiny model, made on the spot, labels pairs twice: with two rationales each that are sampled, and by rating each
response. Each run is a process of its own (`trl-rlaif run --resume`). One kill in five comes while the judge is being
loaded, the others while labels are being written, each at a moment drawn at random. Where all labels are made before
all kills are, it begins anew in another folder.
Exit code 1 where a byte of labels.jsonl differs, or where no kill came while labels were being written.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from helpers.judges import PARTS  # noqa: E402  (the tests' helpers are no package)
from helpers.tiny import save_tiny_model  # noqa: E402

from trl_rlaif.files import to_line  # noqa: E402

COMMAND = [sys.executable, "-c", "import sys; from trl_rlaif.cli import main; sys.argv[0] = 'trl-rlaif'; main()"]
LOADING_SHARE = 0.2
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Times:
    """Seconds from the label stage's begin to its first label, and from there to its end."""

    loading: float
    writing: float


def main() -> int:
    """Run, kill, resume, compare, print; the exit code."""
    args = _arguments()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="kill-labels-") as scratch:
        folder = Path(scratch)
        recipe = _write_recipe(folder, args.pairs)
        times = _undisturbed(recipe, folder / "undisturbed")
        expected = (folder / "undisturbed" / "labels.jsonl").read_bytes()
        print(
            f"Undisturbed: {len(expected.splitlines())} labels, the first one {times.loading:.1f} s after the stage's "
            f"begin, the last one {times.writing:.1f} s later."
        )
        kills, writing, rounds, same = 0, 0, 0, True
        while kills < args.kills and same:
            rounds += 1
            output = folder / f"round-{rounds}"
            while kills < args.kills and (grown := _kill_once(recipe, output, times, args.kills, draw)) is not None:
                kills, writing = kills + 1, writing + (grown > 0)
                total = _size(output) / len(expected)
                print(f"kill {kills}: {grown} bytes written since the last one, {total:.0%} of all", flush=True)
            _finish(recipe, output)
            same = (output / "labels.jsonl").read_bytes() == expected
            print(f"Round {rounds}: {'the same' if same else 'NOT THE SAME'} {len(expected)} bytes.", flush=True)
    print(f"Killed {kills} times in {rounds} rounds, {writing} times while labels were being written.")
    print("Verdict: " + ("no label differs." if same else "labels differ."))
    if not writing:
        print("No kill came while labels were being written, so nothing was tried.")
    return 0 if same and writing else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=600)
    parser.add_argument("--seed", type=int, default=None, help="of the moments; none draws new ones every time")
    return parser.parse_args()


def _write_recipe(folder: Path, pairs: int) -> Path:
    (folder / "prompt").mkdir()
    for name, text in PARTS.items():
        (folder / "prompt" / name).write_text(text)
    words = "quick brown fox lazy dog capital city country judge over".split()
    rows = [
        {
            "id": f"p{i}",
            "prompt": f"what is the {words[i % 10]} {i}?",
            "response_1": f"a {words[i // 10 % 10]} {i}",
            "response_2": f"the {words[i // 7 % 10]} " * (1 + i % 5),
        }
        for i in range(pairs)
    ]
    (folder / "pairs.jsonl").write_text("".join(map(to_line, rows)))
    thinking = {"thinking": True, "rationales": 2, "rationale_tokens": 8}
    recipe = {
        "run": {"name": "kill-labels", "seed": 7},
        "model": {"path": save_tiny_model(folder / "model"), "dtype": "float32"},
        "data": {"pairs": "pairs.jsonl"},
        "label": {
            "labeler": {"distilled": thinking},
            "prompt": str(folder / "prompt"),
            "batch_tokens": 2048,
            "compare": {"rated": {"labeler": "direct"}},
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def _start(recipe: Path, output: Path) -> subprocess.Popen[bytes]:
    arguments = [*COMMAND, "run", str(recipe), "--output", str(output), "--resume"]
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENVIRONMENT)


def _size(output: Path) -> int:
    path = output / "labels.jsonl"
    return path.stat().st_size if path.exists() else 0


def _began(output: Path) -> int:
    """When the label stage last began or ended, in nanoseconds; 0 where it never did."""
    path = output / ".state" / "label.json"
    return path.stat().st_mtime_ns if path.exists() else 0


def _until_labeling(process: subprocess.Popen[bytes], output: Path, before: int) -> bool:
    """Wait until a process is in its label stage; False where it ended without."""
    while _began(output) == before:
        if process.poll() is not None:
            return False
        time.sleep(0.005)
    return True


def _undisturbed(recipe: Path, output: Path) -> Times:
    process = _start(recipe, output)
    _until_labeling(process, output, 0)
    begin = time.monotonic()
    while not _size(output) and process.poll() is None:
        time.sleep(0.005)
    first, last = time.monotonic(), time.monotonic()
    size = _size(output)
    while process.poll() is None:
        if _size(output) > size:
            size, last = _size(output), time.monotonic()
        time.sleep(0.005)
    _check(process)
    return Times(first - begin, last - first)


def _kill_once(recipe: Path, output: Path, times: Times, kills: int, draw: random.Random) -> int | None:
    """Bytes of labels that a run wrote before it was killed; None where it ended before."""
    size, before = _size(output), _began(output)
    process = _start(recipe, output)
    if _until_labeling(process, output, before):
        # All kills together see about all labels made once.
        deadline = time.monotonic() + draw.uniform(0, times.loading)
        if draw.random() > LOADING_SHARE:
            while _size(output) == size and process.poll() is None:
                time.sleep(0.001)
            deadline = time.monotonic() + draw.uniform(0, 2 * times.writing / kills)
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.001)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return _size(output) - size
    _check(process)
    return None


def _finish(recipe: Path, output: Path) -> None:
    _check(_start(recipe, output))


def _check(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"A run failed:\n{errors.decode(errors='replace')}")


if __name__ == "__main__":
    raise SystemExit(main())
