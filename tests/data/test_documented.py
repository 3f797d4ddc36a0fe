"""The rows in docs/data.md are read as documented."""

import json
import re
from pathlib import Path

import pytest
import yaml

from trl_rlaif.data import load_pairs, load_prompts
from trl_rlaif.recipe.sections import DataSection

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def table(heading: str) -> list[tuple[str, list[str]]]:
    """(format, rows as JSON) of the table below a heading."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line.strip("| ").split(" | ", 1) for line in section.splitlines() if line.startswith("| ")]
    return [(name, re.findall(r"`(\{.*?\})`(?= |$)", cell)) for name, cell in lines]


PROMPTS = [(name, rows) for name, rows in table("Prompts") if rows]
PAIRS = [(name, rows) for name, rows in table("Pairs") if rows]


def test_there_is_something_to_look_for():
    assert len(PROMPTS) == 6 and len(PAIRS) == 8


@pytest.mark.parametrize(("name", "rows"), PROMPTS + PAIRS)
def test_prompts(tmp_path, name, rows):
    (tmp_path / "f.jsonl").write_text("\n".join(rows))
    prompt = load_prompts(tmp_path / "f.jsonl").items[0].prompt
    assert "Why" in json.dumps(prompt) or prompt == "Add the numbers.\n\n1, 2"
    assert ("Because." in json.dumps(prompt)) is False


@pytest.mark.parametrize(("name", "rows"), PAIRS)
def test_pairs(tmp_path, name, rows):
    (tmp_path / "f.jsonl").write_text("\n".join(rows))
    pair = load_pairs(tmp_path / "f.jsonl").items[0]
    better = pair.response_1 if pair.human == 1 else pair.response_2
    assert better.strip() == "Because."
    named = re.search(r"`(\w+)`", name) or re.search(r"(\w+)", name)
    assert load_pairs(tmp_path / "f.jsonl", format=named[1]).items == [pair]


def test_columns():
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    data = DataSection(**yaml.safe_load(text)["data"])
    assert data.columns_of("prompts") == {"prompt": "question", "category": "topic"}
    assert data.columns_of("eval_prompts")["prompt"] == "text"
