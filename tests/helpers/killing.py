"""Kill runs of every kind of stage after a given number of file changes, and compare the folders of two runs."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from helpers import forked
from helpers.processes import environments
from helpers.recipes import write_prompt_folder, write_recipe, write_rows

# Keys of timings, of the command line, and of paths in the run folder.
_TIMED = re.compile(r"seconds|.*_per_second|share_of_time|eps|.*time|time/.*|command|best_model_checkpoint")
_SHOWN_TIMES = re.compile(
    r"\d+(\.\d+)? (s|min|h)\b|<td>(eps|time/).*|fraction of the updates.*?</dd>|<pre><code>trl-rlaif run.*"
)
# Files that exist only while a run is active.
_AT_WORK = ("progress.json", "lock", "writable")
# Files and keys with the run folder's name, with digests of times, the cache of the datasets library, or the positions
# of labels in a file that is itself compared.
_OTHER = (
    "training_args.bin", "content.json", "results.json", "metrics.jsonl", "crc32", "cache-", "tmp", "labels.index"
)  # fmt: skip

KINDS = (signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM)

_THINKING = {"thinking": True, "rationales": 2, "rationale_tokens": 8}
_NONE = dict.fromkeys(("sample", "label", "reward", "evaluate", "report"))
_TRACKED = {"sets": {"forget": "test.jsonl"}, "track_every": 2, "max_new_tokens": 8}
_SFT = {"data": "sft.jsonl", "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 1}
_CHOSEN = {
    "selectors": [{"selective_rehearsal": {"clusters": 2, "per_cluster": 2}}],
    "selection_every": 2,
    "rehearsal_coef": 0.5,
    "total_episodes": 16,
}
_GROUPS = _CHOSEN | {
    "rewards": ["helpers.rewards:even_share"],
    "transforms": ["distribution_regulator"],
    "num_generations": 2,
    "kl_coef": 0.1,
}
_PPO = _CHOSEN | {"rewards": ["helpers.rewards:even_share"], "transforms": ["distribution_regulator"]}
_REJECTION = {
    "algorithm": "rejection_sampling",
    "rewards": ["helpers.rewards:length_penalty"],
    "selectors": [{"rejection_sampling": {"num_responses": 3, "quantile": [0.2, 0.4]}}],
    "total_episodes": 90,
}
_PEOPLE = {"prompts": None, "pairs": "pairs.jsonl", "format": "responses"}
_DPO = {"algorithm": "dpo", "max_steps": 3, "num_train_epochs": 2}

# Sections of tiny recipes (helpers.recipes), by the stages or algorithm they run.
RECIPES: dict[str, dict[str, Any]] = {
    "sample, label, reward": {
        "label": {
            "prompt": "prompt",
            "batch_tokens": 300,
            "precision": "auto",
            "compare": {"rated": {"labeler": "direct"}, "thinking": {"labeler": {"distilled": _THINKING}}},
            "jury": {},
        },
        "reward": {"transforms": ["advantage"], "save_steps": 1},
        **dict.fromkeys(("rl", "evaluate", "report")),
    },
    "sampler": _NONE
    | {
        "sample": {
            "sampler": {"revise": {"principles": "data/principles.jsonl"}},
            "max_new_tokens": 8,
            "batch_size": 4,
        },
        "rl": None,
    },
    "judge, label": _NONE
    | {
        "data": _PEOPLE,
        "judge": {
            "contrasts": [],
            "pairs": "pairs.jsonl",
            "evaluations": 3,
            "num_train_epochs": 3,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
        },
        "label": {"judge": "taught", "prompt": "prompt", "batch_tokens": 300},
        "rl": None,
    },
    "sft, ppo, evaluate, report": _NONE
    | {
        "sft": _SFT,
        "rl": _PPO,
        "evaluate": _TRACKED,
        "report": {},
    },
    "rejection sampling": _NONE | {"rl": _REJECTION, "evaluate": _TRACKED},
    "grpo": _NONE | {"rl": _GROUPS | {"algorithm": "grpo"}, "evaluate": _TRACKED},
    "rloo": _NONE | {"rl": _GROUPS | {"algorithm": "rloo"}},
    "sft, dpo": _NONE | {"data": _PEOPLE, "sft": _SFT, "rl": _DPO},
    "rounds, ppo": {
        "sft": _SFT,
        "rounds": {"number": 2},
        "reward": {"transforms": ["advantage"], "save_steps": 1},
        "rl": {"total_episodes": 8},
        "evaluate": None,
    },
    "rounds, dpo": {"rounds": {"number": 3}, "reward": None, "rl": _DPO | {"save_steps": 1}, "evaluate": None},
    "compare": _NONE
    | {
        "evaluate": {"max_new_tokens": 8},
        "report": {},
        "rl": {"rewards": ["helpers.rewards:even_share"], "total_episodes": 8},
        "compare": ["ppo", {"rejection": {"rl": _REJECTION}}],
    },
    "two processes, ppo": _NONE | {"rl": _PPO},
    "two processes, grpo": _NONE | {"rl": _GROUPS | {"algorithm": "grpo"}},
    "two processes, all but rl": {
        "sft": _SFT,
        "label": {"prompt": "prompt", "batch_tokens": 300},
        "reward": {"transforms": ["advantage"], "save_steps": 1},
        **dict.fromkeys(("rl", "evaluate", "report")),
    },
}


def prepare(folder: Path, model: str, name: str) -> Path:
    """Write one of these recipes and its data into a folder."""
    sections = RECIPES[name]
    recipe = write_recipe(folder, model, **{key: value for key, value in sections.items() if key != "compare"})
    written = yaml.safe_load(recipe.read_text())
    if "algorithm" in written.get("rl", {}) and written["rl"]["algorithm"] == "dpo":
        written["rl"] = {"save_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-2, **_DPO}
    written |= {"compare": sections["compare"]} if "compare" in sections else {}
    written["data"] = {key: value for key, value in written["data"].items() if value is not None}
    recipe.write_text(yaml.safe_dump(written))
    said = [{"prompt": f"what is {i}?", "completion": "the fox " * (i % 3 + 1)} for i in range(6)]
    answers = [("a city", "the fox " * (i % 5 + 1)) for i in range(8)]
    pairs = [
        {"id": f"p{i}", "prompt": f"what is {i}?", "response_1": one, "response_2": other, "human": 1 + i % 2}
        for i, (one, other) in enumerate(answers)
    ]
    write_prompt_folder(folder / "prompt")
    write_rows(folder / "sft.jsonl", said)
    write_rows(folder / "pairs.jsonl", pairs)
    return recipe


@dataclass
class Trial:
    """The kills of one kind of run, and their outcome.

    Args:
        kills: Signals, in order.
        runs: Number of runs that were killed, and resumed to completion.
        failed: Exits that are neither success nor due to the signal, with the last output.
        differences: Between an undisturbed run and each of these.
    """

    kills: list[int] = field(default_factory=list)
    runs: int = 0
    failed: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


def try_kills(folder: Path, model: str, name: str, kills: int, draw: random.Random) -> Trial:
    """Run once undisturbed; then kill runs ``kills`` times in total, resume each to completion, and compare.

    One kill in five comes after a random delay, the others before a change to a file or folder of the run.
    """
    folder.mkdir()
    recipe, trial, count = prepare(folder, model, name), Trial(), 2 if name.startswith("two") else 1
    began = time.monotonic()
    code = run(recipe, folder / "run-0", processes=count)
    seconds = time.monotonic() - began
    assert code == 0, _printed(folder / "run-0")
    changes = int(Path(f"{folder / 'run-0'}.changes").read_text())
    while len(trial.kills) < kills and not trial.failed:
        trial.runs += 1
        output, code = folder / f"run-{trial.runs}", 1
        while code != 0:
            more = len(trial.kills) < kills
            timed = more and draw.random() < 0.2
            at = draw.randint(1, 2 * changes // 5) if more and not timed else None
            kind = draw.choice(KINDS)
            after = draw.uniform(0, seconds / 2) if timed else None
            code = run(recipe, output, at=at, after=after, kind=kind, processes=count)
            if code != 0 and (not more or code not in (-kind, 1, 130) or (code > 0 and kind != signal.SIGINT)):
                trial.failed.append(f"exit code {code} with {kind.name} at {at or after}: {_printed(output)}")
                break
            trial.kills += [kind] if code != 0 else []
        else:
            trial.differences += differences(folder / "run-0", output)
    return trial


def _printed(output: Path) -> str:
    return Path(f"{output}.log").read_text()[-2000:]


def run(
    recipe: Path,
    folder: Path,
    *,
    at: int | None = None,
    after: float | None = None,
    kind: int = signal.SIGKILL,
    processes: int = 1,
    launcher: str = "ddp",
    options: Sequence[str] = (),
) -> int:
    """Start or resume a run, and wait for it to end.

    Args:
        recipe: Its recipe.
        folder: Its folder. The number of changes is written to ``FOLDER.changes``, unless the process is killed.
        at: Kill it before its n-th change to a file or folder in ``folder``; None for never.
        after: Kill it after this many seconds.
        kind: The signal.
        processes: Number of processes; the first one gets the signal, then the others are killed.
        launcher: How several processes are launched: ddp or fsdp2.
        options: Further options of the command.

    Returns:
        The exit code of the first process.
    """
    arguments, each_of = (str(recipe), str(folder), at, kind, options), environments(processes, launcher)
    started = [forked.start(_run, *arguments, environment=each, output=f"{folder}.log") for each in each_of]
    try:
        connection.wait([process.sentinel for process in started], timeout=after)
        if started[0].is_alive() and after is not None:
            os.kill(started[0].pid, kind)
        started[0].join(10 if any(process.exitcode for process in started) else 500)
    finally:
        for process in started:
            process.kill()
            process.join()
    return started[0].exitcode


def _run(recipe: str, folder: str, at: int | None, kind: int, options: Sequence[str]) -> None:
    from matplotlib.figure import Figure

    Figure.savefig = lambda self, file, **options: file.write(b'<svg viewBox="0 0 1 1"/>')  # drawing is slowest
    first = os.environ.get("RANK", "0") == "0"
    counted = _count(os.path.realpath(folder), at if first else None, kind)
    try:
        forked.run_command(["run", recipe, "--output", folder, "--resume", *options])
    finally:
        if first:
            Path(f"{folder}.changes").write_text(str(len(counted)))


def _count(folder: str, at: int | None, kind: int) -> list[str]:
    """Record the changes below a folder from Python's audit events; send the signal before the ``at``-th change."""
    found: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            return
        path = arguments[0]
        if not isinstance(path, str | bytes | os.PathLike):
            return
        path = os.fsdecode(path)
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if not path.startswith(folder + os.sep) or any(name in os.path.basename(path) for name in _AT_WORK):
            return
        found.append(path)
        if len(found) == at:
            os.kill(os.getpid(), kind)

    sys.addaudithook(hook)
    return found


def differences(one: Path, other: Path) -> list[str]:
    """The differences between two run folders, one per line: which files exist, and their contents, without times."""
    files = [_files(folder) for folder in (one, other)]
    found = [f"only in {one.name}: {name}" for name in sorted(files[0].keys() - files[1].keys())]
    found += [f"only in {other.name}: {name}" for name in sorted(files[1].keys() - files[0].keys())]
    for name in sorted(files[0].keys() & files[1].keys()):
        ours, theirs = (content(folder[name], place) for folder, place in zip(files, (one, other), strict=True))
        if ours != theirs:
            found.append(f"{name}: {_first_difference(ours, theirs)}")
    return found


def _files(folder: Path) -> dict[str, Path]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    left_out = (*_AT_WORK, *_OTHER)
    compared = ("results.json", "metrics.jsonl")  # the files are compared, but not their digests, which depend on times
    kept = (path for path in paths if path.name in compared or not path.name.startswith(left_out))
    return {str(path.relative_to(folder)): path for path in kept}


def content(path: Path, run: Path) -> Any:
    """The content of a run's file, without times and the name of the run's folder."""
    if path.suffix == ".json":
        return _untimed(json.loads(path.read_text()))
    if path.suffix == ".jsonl" and path.name != "labels.jsonl":
        return [_untimed(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name == "recipe.yaml":
        text = path.read_text().replace(str(run.resolve()), "RUN")  # a round's recipe names the previous round
        return {key: value for key, value in yaml.safe_load(text).items() if key != "command"}
    if path.name in ("report.html", "report.md"):
        shown = path.read_text().replace(run.name, "RUN")  # in the command that it shows
        return [_SHOWN_TIMES.sub("", line) for line in shown.splitlines()]
    if path.suffix in (".pt", ".pth"):  # two files of the same values need not have the same bytes
        return _untimed(torch.load(path, weights_only=False))
    return path.read_bytes()


def _untimed(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), value.reshape(-1).view(torch.uint8).tolist()]
    if isinstance(value, np.ndarray):
        return [str(value.dtype), value.tolist()]
    if isinstance(value, dict):
        return {key: _untimed(part) for key, part in value.items() if not _left_out(key)}
    return [_untimed(part) for part in value] if isinstance(value, list | tuple) else value


def _left_out(key: Any) -> bool:
    return isinstance(key, str) and bool(_TIMED.fullmatch(key) or key.endswith(_OTHER))


def _first_difference(ours: Any, theirs: Any, where: str = "") -> str:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in [*ours, *theirs]:
            if ours.get(key) != theirs.get(key):
                return _first_difference(ours.get(key), theirs.get(key), f"{where}.{key}")
    if isinstance(ours, list) and isinstance(theirs, list):
        for number, (a, b) in enumerate(zip(ours, theirs, strict=False)):
            if a != b:
                return _first_difference(a, b, f"{where}[{number}]")
        return f"{where}: {len(ours)} and {len(theirs)} entries"
    if isinstance(ours, bytes):
        return f"{len(ours)} and {len(theirs)} bytes"
    return f"{where}: {ours!r} and {theirs!r}"[:300]
