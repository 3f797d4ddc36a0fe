"""Cost of pairs and labels on the host: memory, time and disk space, in the stage `label` itself.

    OMP_NUM_THREADS=1 python benchmarks/label_store.py --pairs 100000 1000000 \
        --output benchmarks/results/label_store.json

Pairs are synthetic (a prompt and two responses of 1,000 characters each), and a scripted judge labels them, without a
model. A run is killed when all but ``--made`` pairs are labeled. Separate processes then rebuild the index of the
labels; resume up to the first question; resume, label the rest, and complete the stage; and draw pairs in the stage
`sample` from a scripted policy. Seconds are CPU time, except for adding labels and for the whole stage. Memory is the
peak resident set; for the stage, with and without the imported libraries.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml

from trl_rlaif.files import sealed, to_line
from trl_rlaif.judging.judge import Group, Judge
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.judging.question import Answer
from trl_rlaif.labels import LabelStore
from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.context import Context, pair_row
from trl_rlaif.pipeline.label_tasks import label_key, label_tasks
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.work import label, sample
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import parse_recipe, prompt_folder
from trl_rlaif.responses import Response
from trl_rlaif.testing.models import save_tiny_model
from trl_rlaif.types import Label, Pair

CHARACTERS, TOKENS = 1000, 256
# Each is a token of the tiny model.
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog")
# Labels added one by one to measure it.
ADDED = 2000
# Maximum number of pairs drawn in `sample`, and number drawn before its memory is measured.
SAMPLED, SETTLED = 50_000, 2000


def make_pair(number: int) -> Pair:
    """A pair with unique texts."""
    draw = random.Random(number)
    prompt, first, second = (f"{draw.getrandbits(4 * CHARACTERS):0{CHARACTERS}x}" for _ in range(3))
    return Pair(str(number), prompt, first, second, "general", None, {})


def make_label(number: int) -> Label:
    """A label whose numbers have as many digits as a judge's."""
    draw = random.Random(number)
    p_12, p_21, mass_12, mass_21 = (draw.random() for _ in range(4))
    return Label(str(number), (p_12 + p_21) / 2, p_12, p_21, mass_12, mass_21, None, None, "scripted")


class Scripted(Judge):
    """Answers immediately, with different numbers each time."""

    def ask(
        self, groups: Sequence[Group], candidates: Sequence[str], *, thinking: Any = None, done: Collection[int] = ()
    ) -> Iterator[tuple[int, list[Answer]]]:
        """See Judge."""
        draw = random.Random(len(groups))
        for index in range(len(groups)):
            if index not in done:
                yield index, [Answer(((-draw.random(), -draw.random() - 1),)) for _ in groups[index]]


def opened(folder: Path) -> Context:
    """The context of a run whose judge is on a server; it is never asked."""
    server = {"backend": "openai", "path": "scripted", "base_url": "http://localhost:9/v1"}
    recipe = {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {"pairs": str(folder / artifacts.PAIRS)},
        "label": {"judge": server},
        "reward": {},
    }
    path = folder / "asked.yaml"
    path.write_text(yaml.safe_dump(recipe))
    plugins = installed_plugins()
    context = Context(parse_recipe(path, registry=plugins.registry), RunFolder(folder), plugins)
    context.judges.load = lambda section, prompt: Scripted(JudgePrompt.load(prompt_folder(prompt)), "scripted")
    return context


def write(folder: Path, pairs: int, labeled: int) -> dict[str, float]:
    """Write the files of a run with ``pairs`` pairs, ``labeled`` of them labeled; seconds and bytes per item."""
    save_tiny_model(folder / "model")
    pairs_path, labels_path = folder / artifacts.PAIRS, folder / artifacts.LABELS
    pairs_path.touch()  # named in the recipe
    context = opened(folder)
    key = label_key(context, label_tasks(context.recipe)[0])
    added = [(make_pair(number), make_label(number)) for number in range(ADDED)]
    with LabelStore(labels_path, context.folder.state / artifacts.LABEL_INDEX) as store:
        began, busy = time.perf_counter(), time.process_time()
        for pair, of_pair in added:
            store.add(key, pair, of_pair)
        seconds, busy = time.perf_counter() - began, time.process_time() - busy
        row = store.find(key, [added[0][0]])["0"]
    with pairs_path.open("w") as file, labels_path.open("a") as labels:
        for number in range(pairs):
            pair = make_pair(number)
            file.write(to_line(sealed(pair_row(pair))))
            if ADDED <= number < labeled:
                labels.write(to_line(sealed(row | {"id": pair.id, "pair": key.of(pair), "p": number / pairs})))
    return {
        "add: seconds a label": seconds / ADDED,
        "add: processor seconds a label": busy / ADDED,
        "pairs.jsonl: bytes a pair": pairs_path.stat().st_size / pairs,
        "labels.jsonl: bytes a label": labels_path.stat().st_size / labeled,
    }


def index(folder: Path) -> dict[str, float]:
    """Build the index from the labels."""
    state = RunFolder(folder).state
    (state / artifacts.LABEL_INDEX).unlink()
    began = time.process_time()
    with LabelStore(folder / artifacts.LABELS, state / artifacts.LABEL_INDEX):
        seconds = time.process_time() - began
    return {"index: seconds": seconds, "index: bytes on disk": (state / artifacts.LABEL_INDEX).stat().st_size}


def resume(folder: Path) -> dict[str, float]:
    """The stage's work before its first question, or to find that none is left."""
    began, seconds = time.process_time(), 0.0

    def asked(*_: Any) -> None:
        nonlocal seconds
        seconds = time.process_time() - began
        raise KeyboardInterrupt

    context = opened(folder)
    context.judges.load = asked
    began = time.process_time()
    try:
        label.run(context)
    except KeyboardInterrupt:
        pass
    return {"resume: seconds": seconds, "resume: peak bytes": _peak()}


def stage(folder: Path) -> dict[str, float]:
    """The whole stage."""
    import datasets

    context, before, began = opened(folder), _peak(), time.perf_counter()
    numbers = label.run(context)
    seconds, peak = time.perf_counter() - began, _peak()
    rows = datasets.load_from_disk(str(context.folder / artifacts.PREFERENCES))
    assert len(rows) == numbers["labeled"] == numbers["pairs"]
    return {
        "stage: seconds": seconds,
        "stage: labels made": numbers["made"],
        "stage: peak bytes": peak,
        "stage: peak bytes without imports": peak - before,
    }


class Drawn(sample.StartingPolicy):
    """Answers immediately, with different texts each time."""

    def __post_init__(self) -> None:
        self.role, self._number = nullcontext(), 0

    def draw(self, tokens: Sequence[list[int]], *seeds: object, num_responses: int = 1) -> list[list[Response]]:
        """See StartingPolicy."""
        self._number += 1
        draw = random.Random(self._number)
        return [
            [Response(f"{draw.getrandbits(4 * CHARACTERS):x}", None, [0] * TOKENS, True) for _ in range(num_responses)]
            for _ in tokens
        ]


def draw_pairs(folder: Path) -> dict[str, float]:
    """The stage `sample`: growth of its peak memory per drawn pair."""
    sample.StartingPolicy = Drawn
    pairs = min(SAMPLED, sum(1 for _ in (folder / artifacts.PAIRS).open()))
    with (folder / "prompts.jsonl").open("w") as file:
        for number in range(pairs):
            words = random.Random(number).choices(WORDS, k=TOKENS - 16)  # leaves room for the template's tokens
            file.write(to_line({"prompt": " ".join(words)}))
    peaks = []
    for name, most in (("few", SETTLED), ("all", pairs)):
        recipe = {
            "model": {"path": str(folder / "model"), "dtype": "float32"},
            "data": {"prompts": str(folder / "prompts.jsonl"), "max_prompts": most},
            "sample": {"batch_size": 256, "max_new_tokens": 8},
            "label": {},
            "reward": {},
        }
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        plugins = installed_plugins()
        context = Context(parse_recipe(path, registry=plugins.registry), RunFolder(folder / name), plugins)
        drawn = sample.run(context)
        assert drawn["pairs"] == most, drawn
        peaks.append(_peak())
    return {"sample: pairs": pairs, "sample: bytes a pair": (peaks[1] - peaks[0]) / (pairs - SETTLED)}


STEPS: dict[str, Callable[[Path], dict[str, float]]] = {
    "index": index,
    "resume": resume,
    "stage": stage,
    "sample": draw_pairs,
}


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    """For every size, write the files and run every step in a separate process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", type=int, default=[100_000, 1_000_000])
    parser.add_argument("--made", type=int, default=20_000, help="Labels that the stage makes.")
    parser.add_argument("--output", type=Path, help="JSON; records of other sizes that it has are kept.")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        name, folder = args.step
        print(json.dumps(STEPS[name](Path(folder))))
        return
    records = []
    for pairs in args.pairs:
        with tempfile.TemporaryDirectory() as folder:
            record = {"processor": _processor(), "pairs": pairs, **write(Path(folder), pairs, pairs - args.made)}
            for step in STEPS:
                child = [sys.executable, __file__, "--step", step, folder]
                done = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True)
                record |= json.loads(done.stdout.splitlines()[-1])
        records.append(record)
        print(json.dumps(record, indent=1), flush=True)
    if args.output:
        kept = json.loads(args.output.read_text()) if args.output.exists() else []
        records += [record for record in kept if record["pairs"] not in args.pairs]
        records.sort(key=lambda record: record["pairs"])
        args.output.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
