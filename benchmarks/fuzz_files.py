"""Damaged recipes and data files for `fuzz.py`."""

from __future__ import annotations

import copy
import csv
import gzip
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz_commands import command, judged

ROOT = Path(__file__).resolve().parents[1]

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


# ---- Recipes ----------------------------------------------------------------------------------------------


def recipes(draw: random.Random, folder: Path) -> dict[str, Any]:
    """A packaged recipe with one to eight edits, checked."""
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
    path.write_bytes(bytes_damaged(draw, content) if draw.random() < 0.1 else content)
    return judged(*command(draw.choice(("check", "check", "memory")), path), of=source.stem)


def _scalar(draw: random.Random, text: str) -> str:
    lines = text.split("\n")
    places = [i for i, line in enumerate(lines) if ":" in line and not line.lstrip().startswith("#")]
    if not places:
        return text
    i = draw.choice(places)
    lines[i] = lines[i].partition(":")[0] + ": " + draw.choice(SCALARS)
    return "\n".join(lines)


def _option(draw: random.Random, text: str) -> str:
    """A key of the section, or a TRL field, with a possibly meaningless value."""
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


def bytes_damaged(draw: random.Random, content: bytes) -> bytes:
    """Content that is truncated, or has bytes changed, added or removed."""
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


def data(draw: random.Random, folder: Path) -> dict[str, Any]:
    """A data file in one of the layouts, with damaged rows, bytes or name, read by a recipe."""
    layout = draw.choice(list(_LAYOUTS))
    rows: list[Any] = [{**_LAYOUTS[layout]} for _ in range(draw.choice((1, 4, 4, 40)))]
    for i, row in enumerate(rows):
        row.update({"id": f"p{i}"} if "id" in row else {})
        if layout == "kto":
            row["label"] = i % 2 == 0
    for _ in range(draw.choice((0, 1, 1, 2, 5))):
        damage_row(draw, rows)
    ending = draw.choice((".jsonl", ".jsonl", ".jsonl", ".json", ".csv", ".txt", ".parquet"))
    content = _written(rows, ending)
    if draw.random() < 0.15:
        content, ending = gzip.compress(content), ending + ".gz"
    if draw.random() < 0.4:
        content = bytes_damaged(draw, content)
    if draw.random() < 0.03:
        ending = draw.choice((".jsonl", ".json", ".csv", ".txt", ".parquet", ".jsonl.gz", ".parquet.gz", ".xml", ""))
    path = folder / f"data{ending}"
    path.write_bytes(content)
    role = draw.choice(_READ_AS.get(layout, ("pairs", "prompts", "calibration")))
    (folder / "recipe.yaml").write_text(_reading(role, path, folder))
    return judged(*command("check", folder / "recipe.yaml"), of=f"{layout}{ending}")


def _reading(role: str, path: Path, folder: Path) -> str:
    good = folder / "good.jsonl"
    good.write_text('{"prompt": "Name a colour."}\n')
    # No local base: checking adapters on it takes most of the time, and these cases do not concern it.
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


def damage_row(draw: random.Random, rows: list[Any]) -> None:
    """Change one of these rows, or a value in it, in place."""
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
