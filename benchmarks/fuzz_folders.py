"""Damaged run folders and single flipped bits for `fuzz.py`, read and resumed."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from fuzz_commands import BAD, ENVIRONMENT, RAW, bases, command, judged
from fuzz_files import bytes_damaged, damage_row
from helpers import forked

# A complete run, and one that was killed during policy training.
_COMPLETE, _KILLED = "complete", "killed"


def make_bases(folder: Path) -> None:
    """Make, once, a complete run on a tiny model with human votes, and one that was killed in rl."""
    from helpers.recipes import write_recipe
    from helpers.tiny import save_tiny_model

    if (folder / "made").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    recipe = write_recipe(folder, save_tiny_model(folder / "model"), rl={"total_episodes": 40})
    run = ("run", recipe, "--output")
    process = forked.start_command(*run, folder / _COMPLETE, environment=ENVIRONMENT, output=str(folder / "log"))
    process.join()
    if process.exitcode:
        raise SystemExit((folder / "log").read_text())
    votes = folder / _COMPLETE / "preferences"
    votes.mkdir(exist_ok=True)
    process = forked.start_command(*run, folder / _KILLED, environment=ENVIRONMENT, output=str(folder / "log"))
    while len(list((folder / _KILLED).glob("checkpoints/rl/checkpoint-*/content.json"))) < 2 and process.is_alive():
        time.sleep(0.02)
    process.kill()
    process.join()
    (folder / "made").touch()


def _copied(name: str, folder: Path) -> tuple[Path, list[Path]]:
    """A copy of a base, and those of its files that a run wrote."""
    run = folder / "run"
    shutil.copytree(bases() / name, run)
    return run, sorted(p for p in run.rglob("*") if p.is_file() and not p.name.endswith(".lock"))


def _drawn(draw: random.Random, run: Path, files: list[Path]) -> Path:
    """A random file: each entry of the folder is equally likely, however many files it contains."""
    entry = draw.choice(sorted({path.relative_to(run).parts[0] for path in files}))
    return draw.choice([path for path in files if path.relative_to(run).parts[0] == entry])


def _blank(figure: Any, file: Any, format: str, **options: Any) -> None:
    """Replaces matplotlib in nine of ten cases, since it takes nearly all the time."""
    file.write(b'<svg viewBox="0 0 1 1"/>' if format == "svg" else b"")


def folders(draw: random.Random, folder: Path) -> dict[str, Any]:
    """Damage one or two files of a run folder, and run all commands on it."""
    base = draw.choice((_COMPLETE, _COMPLETE, _KILLED))
    run, files = _copied(base, folder)
    damaged = [_drawn(draw, run, files) for _ in range(draw.choice((1, 1, 2)))]
    how = [_damage_file(draw, path, files) for path in damaged]
    recipe = bases() / "recipe.yaml"
    commands = [("status", run), ("status", run, "--json"), ("report", run), ("rate", run, "--result"),
                ("run", recipe, "--output", run, "--resume", *draw.choice(((), ("--yes",))))]  # fmt: skip
    rows = []
    with mock.patch("matplotlib.figure.Figure.savefig", _blank) if draw.random() < 0.9 else nullcontext():
        for arguments in commands:
            rows.append({"command": arguments[0], **judged(*command(*arguments))})
    worst = next((row for row in rows if row["outcome"] in BAD), rows[-1])
    return {
        **worst,
        "of": base,
        "damage": [f"{path.relative_to(run)}: {what}" for path, what in zip(damaged, how, strict=True)],
    }


def _damage_file(draw: random.Random, path: Path, files: list[Path]) -> str:
    what = draw.choice(("gone", "empty", "cut", "bytes", "bytes", "json", "json", "json", "folder", "swapped", "loop"))
    if path.is_dir() or not path.exists():
        return "nothing"
    content = path.read_bytes()
    if what == "json" and path.suffix in (".json", ".jsonl") and content.strip():
        text = content.decode(errors="replace")
        lines = text.split("\n") if path.suffix == ".jsonl" else [text]
        i = draw.randrange(len(lines))
        try:
            rows = [json.loads(lines[i])]
        except ValueError:
            rows = [None]
        damage_row(draw, rows)
        lines[i] = json.dumps(rows[0])
        path.write_text("\n".join(lines))
        return f"json line {i + 1}"
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "swapped":
        other = draw.choice(files)
        path.write_bytes(other.read_bytes() if other.is_file() else b"")
    elif what == "cut":
        path.write_bytes(content[: draw.randrange(len(content) + 1)])
    elif what == "empty":
        path.touch()
    elif what != "gone":
        path.write_bytes(bytes_damaged(draw, content))
    return what


# ---- Single bits ------------------------------------------------------------------------------------------


def flips(draw: random.Random, folder: Path) -> dict[str, Any]:
    """Flip one bit in a file of a run folder, and resume the run."""
    base = draw.choice((_COMPLETE, _KILLED))
    run, files = _copied(base, folder)
    path = _drawn(draw, run, [file for file in files if file.stat().st_size])
    content = bytearray(path.read_bytes())
    place = draw.randrange(len(content))
    content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    code, said = command("run", bases() / "recipe.yaml", "--output", run, "--resume", "--yes")
    name = str(path.relative_to(run))
    if any(mark in said for mark in RAW):
        outcome = "traceback"
    elif any(part in said for part in (name, path.name, *re.findall(r"checkpoint-\d+", name))):
        outcome = "noticed"
    else:
        outcome = "harmless" if not code and _same(run, bases() / _COMPLETE) else "unnoticed"
    return {"outcome": outcome, "of": f"{base}: {name}", "byte": place, "code": code, "said": said[-800:]}


def _same(run: Path, undisturbed: Path) -> bool:
    """Whether a finished run has the same adapters, labels, pairs, samples and numbers as an undisturbed one."""
    for path in undisturbed.rglob("*"):
        other = run / path.relative_to(undisturbed)
        kept = path.suffix in (".safetensors", ".jsonl") and "checkpoints" not in path.parts
        if kept and path.name == "metrics.jsonl":
            if _without_times(path.read_text()) != _without_times(other.read_text()):
                return False
        elif kept and (not other.is_file() or other.read_bytes() != path.read_bytes()):
            return False
    return True


def _without_times(text: str) -> list[dict[str, Any]]:
    slow = ("time", "seconds", "per_second", "runtime", "memory", "eps", "crc32")
    rows = map(json.loads, text.splitlines())
    return [{key: value for key, value in row.items() if not any(part in key for part in slow)} for row in rows]
