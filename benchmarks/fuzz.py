"""Damaged recipes, data files, run folders and single bits, and random small recipes: what `trl-rlaif` says of them.

    python benchmarks/fuzz.py recipes --cases 10000 --output runs/fuzz
    python benchmarks/fuzz.py data --cases 10000 --output runs/fuzz
    python benchmarks/fuzz.py folders --cases 500 --output runs/fuzz
    python benchmarks/fuzz.py flips --cases 100 --output runs/fuzz
    python benchmarks/fuzz.py runs --cases 1000 --limit 120 --output runs/fuzz

Case number n is drawn from (seed, n) alone, and its outcome is a line of OUTPUT/<kind>.jsonl: the same command goes on
where it was, and ``--case n`` shows one case. An outcome is ``accepted`` (exit code 0), ``refused`` (a message and exit
code 1 or 2), ``traceback`` (an exception that nobody had foreseen), ``hang`` (longer than --limit seconds) or ``died``.
Random recipes (``runs``) are checked, and what is accepted is run: ``ran`` to the end, ``message`` (a UserError) or
``failed`` (another error with a message, such as a training that diverges); a run may take 120 seconds.
Of a flipped bit it is ``noticed``, ``harmless`` (the run ends with what it would have without) or ``unnoticed``. Exit
code 1 where there is a traceback, a hang, a death or an unnoticed bit.
"""

from __future__ import annotations

import argparse
import copy
import csv
import gzip
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers import forked  # noqa: E402  (the tests' helpers are no package)
from helpers.random_recipes import outcome_of, write_random_recipe, write_sources  # noqa: E402

# How an exception ends that cli.main does not know.
RAW = ("Traceback (most recent call last)", "Add --debug behind trl-rlaif")
# Seconds that the first case may take longer: the server that processes are forked from loads everything.
_LOADING = 300
BAD = ("traceback", "hang", "died", "unnoticed")

SCALARS = (
    "", "null", "~", "true", "no", "0", "-1", "1", "1.5", "-0.0", "1e308", "1e-320", ".nan", ".inf", "-.inf",
    "1_000", "0o17", "9" * 400, "0x"+"f" * 2000, "1" * 5000, "x" * 5000, "'", '"', "[]", "{}", "[[]]", "[{}]",
    "{a: 1}", "[1, a]", "- a", "!!int ''", "!!float ''", "!!binary ''", "!!null x", "!!python/name:os.system",
    "!a b", "2026-13-45", "2026-11-28", "12:30:45", "&a 1", "*a", "&a [*a]", "<<", "{<<: 1}", "? a", "|", ">-",
    "@a", "`a`", "%a", "#", "\x1b[31mred", '"\\x1b[2J"', '"\\0"', "\u2028", "\ufeff", "\u202eabc", "..", "/",
    "/dev/null", "/dev/zero", "/proc/self/mem", "a/b", "a/b:c", "package:", "package:os", "package:no.such",
    "rewards.py:f", "os:getcwd", "os.path:join", "hub/"+"a" * 300, "data/"+"b" * 5000, "PIPE", "FOLDER", "same",
    "auto", "nf4", "ppo", "dpo", "grpo", "rloo", "rejection", "[reward, reward]", "[direct]", "[{reward: .nan}]",
    "http://", "http://[", "https://example.invalid:99999/v1", "{path: PIPE}", "{distilled: {orders: 3}}",
    "{distilled: null}",
)  # fmt: skip
TOKENS = ("- ", "? ", ": ", "&a ", "*a", "<<: *a", "---\n", "...\n", "%YAML 9.9\n", "\t", "!!", "|\n", ">\n", "{", "}",
          "[", "]", "'", '"', "#", "\x00", "\x85", "\u2028", "\r", "\ufeff", "\ud7ff", "  ")  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, float("nan"), float("inf"), 10**400, "", " ", "\x00", "\x1b[2J", "\u202e",
    "\ud800", "x" * 100_000, [], {},
    [[]], [{}], [None], {"a": 1}, ["a", "b"], [{"role": "user", "content": "hi"}], [{"role": 3, "content": None}],
    [{"role": "user"}], [{"from": "human", "value": []}], {"content": "a"},
)  # fmt: skip
KEYS = ("prompt", "response_1", "response_2", "chosen", "rejected", "id", "category", "human", "messages", "completion",
        "label", "score", "scores", "responses", "conversations", "instruction", "input", "output", "text", "margin",
        "")  # fmt: skip


def main() -> int:
    """Run what is left of the cases, print the table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that a case may take")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--case", type=int, help="show this case alone")
    args = parser.parse_args()
    os.environ[_BASES] = str((args.output / "bases").resolve())
    args.output.mkdir(parents=True, exist_ok=True)
    if args.kind in ("folders", "flips"):
        _make_bases(_bases())
    if args.kind == "runs" and not (_bases() / "sources").exists():
        write_sources(_bases() / "sources")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        if args.case is not None:
            os.environ.update(_ENVIRONMENT)
            print(json.dumps(_outcome(args.kind, args.seed, args.case, Path(scratch)), indent=1, ensure_ascii=False))
            return 0
        found = _all_cases(args, Path(scratch))
    return _table(args, found)


def _all_cases(args: argparse.Namespace, scratch: Path) -> dict[int, dict[str, Any]]:
    """The outcome of each case, those of before included."""
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
    """A process that does its share of the cases one by one, and is replaced where one hangs or kills it."""

    def __init__(self, args: argparse.Namespace, share: list[int], scratch: Path, results: Path) -> None:
        self.args, self.share, self.scratch, self.results = args, share, scratch, results
        scratch.mkdir(parents=True)
        self.done = scratch / "done"  # cases, a line each
        self.log = scratch / "log"
        self.log.touch()
        self.process = self._start()

    def _start(self) -> BaseProcess:
        self.done.write_text("")
        self.seen, self.since = 0, time.monotonic()
        call = (_cases, self.args.kind, self.args.seed, self.share, str(self.scratch), str(self.results))
        return forked.start(*call, environment=_ENVIRONMENT, output=str(self.log))

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
    """In a process of its own: the outcome of each case, appended as soon as it is known."""
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


def _command(*arguments: object) -> tuple[int, str]:
    """Exit code of ``trl-rlaif ARGUMENTS`` in this process, and everything it said."""
    from trl_rlaif.cli import main as command

    sys.stdout.flush(), sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        try:
            sys.argv = ["trl-rlaif", *(["--debug"] if os.environ.get("FUZZ_DEBUG") else []), *map(str, arguments)]
            command()
            code: Any = 0
        except SystemExit as stopped:
            code = stopped.code or 0
        except BaseException:  # what gets past cli.main
            code = 1
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
            os.close(kept[0]), os.close(kept[1])
        file.seek(0)
        return code if isinstance(code, int) else 1, file.read().decode(errors="replace")


def _judged(code: int, said: str, **more: Any) -> dict[str, Any]:
    raw = any(mark in said for mark in RAW) or "\x1b" in said or (code and not said.strip())
    outcome = "traceback" if raw else "refused" if code else "accepted"
    return {"outcome": outcome, **more, **({"said": said[-3000:]} if raw else {})}


# ---- Recipes ----------------------------------------------------------------------------------------------


def _recipes(draw: random.Random, folder: Path) -> dict[str, Any]:
    sources = sorted((ROOT / "recipes").glob("*.yaml"))
    source = draw.choice(sources)
    text = source.read_text(encoding="utf-8")
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        text = draw.choice(_EDITS)(draw, text)
    (folder / "data").symlink_to(ROOT / "recipes" / "data")
    os.mkfifo(folder / "pipe")
    text = text.replace("PIPE", str(folder / "pipe")).replace("FOLDER", str(folder))
    path = folder / "recipe.yaml"
    content = text.encode("utf-8", "surrogatepass")
    path.write_bytes(_bytes_damaged(draw, content) if draw.random() < 0.1 else content)
    return _judged(*_command(draw.choice(("check", "check", "memory")), path), of=source.stem)


def _scalar(draw: random.Random, text: str) -> str:
    lines = text.split("\n")
    places = [i for i, line in enumerate(lines) if ":" in line and not line.lstrip().startswith("#")]
    if not places:
        return text
    i = draw.choice(places)
    lines[i] = lines[i].partition(":")[0] + ": " + draw.choice(SCALARS)
    return "\n".join(lines)


def _option(draw: random.Random, text: str) -> str:
    """A key that the section knows, or a TRL field, with a value that may be senseless."""
    from trl_rlaif.recipe import SECTIONS

    section = draw.choice(list(SECTIONS))
    of_trl = ("learning_rate", "num_train_epochs", "save_steps", "max_length", "bf16", "loss_type")
    line = f"  {draw.choice([*SECTIONS[section].model_fields, *of_trl])}: {draw.choice(SCALARS)}\n"
    if draw.random() < 0.3:
        return f"{text}\n{section}:\n{line}"
    return text.replace(f"\n{section}:\n", f"\n{section}:\n{line}")


def _lines(draw: random.Random, text: str) -> str:
    lines = text.split("\n")
    i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
    what = draw.randrange(6)
    if what == 0:
        del lines[i]
    elif what == 1:
        lines.insert(j, lines[i])
    elif what == 2:
        lines[i], lines[j] = lines[j], lines[i]
    elif what == 3:
        lines[i] = " " * draw.randrange(9) + lines[i].lstrip()
    elif what == 4:
        lines = lines[:i]
    else:
        lines[i] = lines[i].replace("  ", "\t")
    return "\n".join(lines) or "\n"


def _token(draw: random.Random, text: str) -> str:
    i = draw.randrange(len(text) + 1)
    return text[:i] + draw.choice(TOKENS) + text[i + draw.randrange(3) :]


_EDITS: tuple[Callable[[random.Random, str], str], ...] = (_scalar, _scalar, _scalar, _option, _option, _lines, _token)


def _bytes_damaged(draw: random.Random, content: bytes) -> bytes:
    found = bytearray(content)
    what = draw.randrange(4)
    if not found or what == 0:
        return bytes(found[: draw.randrange(len(found) + 1)])
    if what == 1:
        for _ in range(draw.choice((1, 3, 30))):
            found[draw.randrange(len(found))] = draw.randrange(256)
    elif what == 2:
        i = draw.randrange(len(found))
        found[i:i] = bytes(draw.randrange(256) for _ in range(draw.choice((1, 4, 100))))
    else:
        i = draw.randrange(len(found))
        del found[i : i + draw.choice((1, 10, 1000))]
    return bytes(found)


# ---- Data files -------------------------------------------------------------------------------------------

_TALK = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}]
_LAYOUTS: dict[str, dict[str, Any]] = {
    "prompts": {"id": "p", "prompt": "Name a colour.", "category": "a"},
    "messages": {"prompt": _TALK[:1]},
    "pairs": {"id": "p", "prompt": "Name a colour.", "response_1": "Blue.", "response_2": "Red!", "human": 1},
    "chosen": {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Mud.", "margin": 1.5},
    "talks": {"chosen": _TALK, "rejected": [*_TALK[:1], {"role": "assistant", "content": "Mud."}]},
    "transcripts": {"chosen": "\n\nHuman: A?\n\nAssistant: B.", "rejected": "\n\nHuman: A?\n\nAssistant: C."},
    "scores": {"prompt": "Name a colour.", "responses": ["a", "b", "c"], "scores": [1, 2.5, 3]},
    "kto": {"prompt": "Name a colour.", "completion": "Blue.", "label": True},
    "finetuning": {"messages": _TALK},
    "sharegpt": {"conversations": [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "B."}]},
    "alpaca": {"instruction": "Add.", "input": "1 and 1", "output": "2"},
    "completion": {"prompt": "Name a colour.", "completion": "Blue."},
}
_FINETUNING = ("sft", "prompts", "rehearsal")
_READ_AS = {"prompts": ("prompts",), "messages": ("prompts",), "finetuning": _FINETUNING, "sharegpt": _FINETUNING,
            "alpaca": _FINETUNING, "completion": _FINETUNING}  # fmt: skip


def _data(draw: random.Random, folder: Path) -> dict[str, Any]:
    layout = draw.choice(list(_LAYOUTS))
    rows: list[Any] = [{**_LAYOUTS[layout]} for _ in range(draw.choice((1, 4, 4, 40)))]
    for i, row in enumerate(rows):
        row.update({"id": f"p{i}"} if "id" in row else {})
        if layout == "kto":
            row["label"] = i % 2 == 0
    for _ in range(draw.choice((0, 1, 1, 2, 5))):
        _damage_row(draw, rows)
    ending = draw.choice((".jsonl", ".jsonl", ".jsonl", ".json", ".csv", ".txt", ".parquet"))
    content = _written(rows, ending)
    if draw.random() < 0.15:
        content, ending = gzip.compress(content), ending + ".gz"
    if draw.random() < 0.4:
        content = _bytes_damaged(draw, content)
    if draw.random() < 0.03:
        ending = draw.choice((".jsonl", ".json", ".csv", ".txt", ".parquet", ".jsonl.gz", ".parquet.gz", ".xml", ""))
    path = folder / f"data{ending}"
    path.write_bytes(content)
    role = draw.choice(_READ_AS.get(layout, ("pairs", "prompts", "calibration")))
    (folder / "recipe.yaml").write_text(_reading(role, path, folder))
    return _judged(*_command("check", folder / "recipe.yaml"), of=f"{layout}{ending}")


def _reading(role: str, path: Path, folder: Path) -> str:
    good = folder / "good.jsonl"
    good.write_text('{"prompt": "Name a colour."}\n')
    # No base that is here: to try adapters on it takes most of a check, and none of these cases is about it.
    sections: dict[str, Any] = {"model": {"path": "someone/somewhere"}, "data": {"prompts": str(good)}}
    sections |= {"sample": {}, "label": {}, "reward": {}}
    if role == "prompts":
        sections["data"] = {"prompts": str(path)}
    elif role == "pairs":
        sections["data"], sections["sample"] = {"pairs": str(path)}, None
    elif role == "calibration":
        sections["label"] = {"calibration": str(path)}
    elif role == "rehearsal":
        sections["rl"] = {"rehearsal": str(path)}
    else:
        sections["sft"] = {"data": str(path)}
    return json.dumps({name: section for name, section in sections.items() if section is not None})


def _value(draw: random.Random) -> Any:
    return copy.deepcopy(draw.choice(VALUES))  # a later edit may change it


def _damage_row(draw: random.Random, rows: list[Any]) -> None:
    i = draw.randrange(len(rows))
    row, what = rows[i], draw.randrange(6)
    if what == 0 or not isinstance(row, dict) or not row:
        rows[i] = _value(draw)
    elif what == 1:
        row.pop(draw.choice(list(row)))
    elif what == 2:
        row[draw.choice(KEYS)] = _value(draw)
    elif what == 3:
        rows.append(row)
    elif what == 4:
        place = draw.choice(list(row))
        while isinstance(row[place], dict | list) and row[place] and draw.random() < 0.8:
            row[place] = row[place].copy()
            row = row[place]
            place = draw.choice(list(row)) if isinstance(row, dict) else draw.randrange(len(row))
        row[place] = _value(draw)
    else:
        row[draw.choice(list(row))] = _value(draw)


def _written(rows: list[Any], ending: str) -> bytes:
    if ending == ".json":
        return json.dumps(rows).encode()
    if ending == ".csv":
        table = [row for row in rows if isinstance(row, dict)] or [{"prompt": ""}]
        text = io.StringIO()
        writer = csv.DictWriter(text, sorted({key for row in table for key in row}))
        writer.writeheader()
        writer.writerows(table)
        return text.getvalue().encode("utf-8", "surrogatepass")
    if ending == ".txt":
        return "\n".join(str(row) for row in rows).encode("utf-8", "surrogatepass")
    if ending == ".parquet":
        import pyarrow
        import pyarrow.parquet

        def cell(value: Any) -> str:
            text = value if isinstance(value, str) else json.dumps(value)
            return text.encode(errors="replace").decode()

        table = [{cell(key): cell(value) for key, value in row.items()} for row in rows if isinstance(row, dict)]
        table = table or [{"prompt": ""}]
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), sink)
        return sink.getvalue()
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# ---- Run folders ------------------------------------------------------------------------------------------

# Of a run that is over, and of one that was killed while its policy trained.
_COMPLETE, _KILLED = "complete", "killed"


def _make_bases(folder: Path) -> None:
    """A complete run on a tiny model with votes of a person, and one that was killed in rl; made once."""
    from helpers.recipes import write_recipe
    from helpers.tiny import save_tiny_model

    if (folder / "made").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    recipe = write_recipe(folder, save_tiny_model(folder / "model"), rl={"total_episodes": 40})
    command = ("run", recipe, "--output")
    process = forked.start_command(*command, folder / _COMPLETE, environment=_ENVIRONMENT, output=str(folder / "log"))
    process.join()
    if process.exitcode:
        raise SystemExit((folder / "log").read_text())
    votes = folder / _COMPLETE / "preferences"
    votes.mkdir(exist_ok=True)
    process = forked.start_command(*command, folder / _KILLED, environment=_ENVIRONMENT, output=str(folder / "log"))
    while len(list((folder / _KILLED).glob("checkpoints/rl/checkpoint-*/content.json"))) < 2 and process.is_alive():
        time.sleep(0.02)
    process.kill()
    process.join()
    (folder / "made").touch()


def _bases() -> Path:
    return Path(os.environ[_BASES])


def _copied(name: str, folder: Path) -> tuple[Path, list[Path]]:
    """A copy of a base, and the files of it that a run wrote."""
    run = folder / "run"
    shutil.copytree(_bases() / name, run)
    return run, sorted(p for p in run.rglob("*") if p.is_file() and not p.name.endswith(".lock"))


def _drawn(draw: random.Random, run: Path, files: list[Path]) -> Path:
    """A file of one of the folder's entries, each as likely as the next, however many figures a report has."""
    entry = draw.choice(sorted({path.relative_to(run).parts[0] for path in files}))
    return draw.choice([path for path in files if path.relative_to(run).parts[0] == entry])


def _blank(figure: Any, file: Any, format: str, **options: Any) -> None:
    """In place of matplotlib, which takes nearly all the time of a case: nine of ten go without."""
    file.write(b'<svg viewBox="0 0 1 1"/>' if format == "svg" else b"")


def _folders(draw: random.Random, folder: Path) -> dict[str, Any]:
    base = draw.choice((_COMPLETE, _COMPLETE, _KILLED))
    run, files = _copied(base, folder)
    damaged = [_drawn(draw, run, files) for _ in range(draw.choice((1, 1, 2)))]
    how = [_damage_file(draw, path, files) for path in damaged]
    recipe = _bases() / "recipe.yaml"
    commands = [("status", run), ("status", run, "--json"), ("report", run), ("rate", run, "--result"),
                ("run", recipe, "--output", run, "--resume", *draw.choice(((), ("--yes",))))]  # fmt: skip
    rows = []
    with mock.patch("matplotlib.figure.Figure.savefig", _blank) if draw.random() < 0.9 else nullcontext():
        for arguments in commands:
            rows.append({"command": arguments[0], **_judged(*_command(*arguments))})
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
        _damage_row(draw, rows)
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
        path.write_bytes(_bytes_damaged(draw, content))
    return what


# ---- Single bits ------------------------------------------------------------------------------------------


def _flips(draw: random.Random, folder: Path) -> dict[str, Any]:
    base = draw.choice((_COMPLETE, _KILLED))
    run, files = _copied(base, folder)
    path = _drawn(draw, run, [file for file in files if file.stat().st_size])
    content = bytearray(path.read_bytes())
    place = draw.randrange(len(content))
    content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    code, said = _command("run", _bases() / "recipe.yaml", "--output", run, "--resume", "--yes")
    name = str(path.relative_to(run))
    if any(mark in said for mark in RAW):
        outcome = "traceback"
    elif any(part in said for part in (name, path.name, *re.findall(r"checkpoint-\d+", name))):
        outcome = "noticed"
    else:
        outcome = "harmless" if not code and _same(run, _bases() / _COMPLETE) else "unnoticed"
    return {"outcome": outcome, "of": f"{base}: {name}", "byte": place, "code": code, "said": said[-800:]}


def _same(run: Path, undisturbed: Path) -> bool:
    """Whether a finished run holds the adapters, labels, pairs, samples and numbers of an undisturbed one."""
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


# ---- Random recipes ---------------------------------------------------------------------------------------


def _runs(draw: random.Random, folder: Path) -> dict[str, Any]:
    recipe = write_random_recipe(draw, _bases() / "sources", folder)
    found = outcome_of(recipe, limit=120)
    return {**found, "said": found["said"][-3000:], "recipe": recipe.read_text()}


# ---- The table --------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[random.Random, Path], dict[str, Any]]] = {
    "recipes": _recipes, "data": _data, "folders": _folders, "flips": _flips, "runs": _runs
}  # fmt: skip
_BASES = "FUZZ_BASES"
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


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
