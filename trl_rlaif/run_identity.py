"""The identity of a run: its settings and data, stored in every checkpoint and compared on resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from transformers import TrainerCallback, TrainingArguments

from trl_rlaif import content
from trl_rlaif.components import numbered
from trl_rlaif.errors import Problem, UserError
from trl_rlaif.files import write_atomically
from trl_rlaif.progress import say
from trl_rlaif.recipe.sections import STOPPING_LIMITS

if TYPE_CHECKING:
    import pyarrow as pa

    from trl_rlaif.rl.scoring import RewardPipeline

FILE = "run.json"
BATCH_SIZE = "per_device_train_batch_size x gradient_accumulation_steps x processes"
# Training arguments that affect what is learned. How a run computes, saves and logs may change.
_LEARNING = {
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_ratio", "warmup_steps", "weight_decay",
    "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed", "data_seed",
    "num_train_epochs", "max_steps", "label_smoothing_factor", "neftune_noise_alpha", "train_sampling_strategy",
    "group_by_length", "dataloader_drop_last",
}  # fmt: skip
# Fields added by TRL and PPOConfig that do not: speed, memory, logs, paths, and values computed from others.
_FREE = {
    "dataset_num_proc", "local_rollout_forward_batch_size", "micro_batch_tokens", "num_sample_generations",
    "sft_model_path", "reward_model_path", "model_init_kwargs", "trust_remote_code", "chat_template_path",
    "ds3_gather_for_generation", "activation_offloading", "precompute_ref_batch_size", "pad_to_multiple_of",
    "cache_implementation", "steps_per_generation", "num_generations_eval", "eval_packing", "num_completions_to_print",
    *STOPPING_LIMITS,
    "world_size", "num_total_batches", "micro_batch_size", "local_batch_size", "batch_size", "local_mini_batch_size",
    "mini_batch_size",
}  # fmt: skip
_FREE_PREFIXES = ("vllm_", "log_", "transformers_continuous_", "use_transformers_")
# A run's length may be changed on purpose.
_LENGTH = {"total_episodes", "num_train_epochs", "max_steps"}
# Columns computed by a model, which differ between machines by rounding.
_COMPUTED = {"chosen_log_ratios", "rejected_log_ratios", "ref_chosen_logps", "ref_rejected_logps"}


def identity(args: Any, dataset: Any, processes: int, **more: Any) -> dict[str, Any]:
    """A run's settings and data as JSON values.

    Args:
        args: The trainer's arguments.
        dataset: The training data.
        processes: Number of processes that train together.
        more: Further settings.

    Returns:
        ``settings`` by name; the dataset's number of ``rows``, and a digest of each column's content in ``columns``.
        Neither depends on where files are, or on what the datasets library cached.
    """
    names = sorted(field.name for field in fields(args))
    settings = {name: getattr(args, name) for name in names if decides_what_is_learned(name)}
    settings[BATCH_SIZE] = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    settings |= {"processes": processes} | more
    if settings.get("loss_reduction") == "micro_batch":  # only then does it matter how a batch is split
        settings["per_device_train_batch_size"] = args.per_device_train_batch_size
    plain = json.loads(json.dumps(settings, default=str))
    rows = len(dataset) if hasattr(dataset, "__len__") else None
    return {"settings": plain, "rows": rows, "columns": digests(dataset)}


def decides_what_is_learned(name: str) -> bool:
    """Whether a training argument affects what is learned; how a run computes, saves and logs may change."""
    if name in _LEARNING:
        return True
    general = {field.name for field in fields(TrainingArguments)}
    return name not in general | _FREE and not name.startswith(_FREE_PREFIXES)


def components(rewards: RewardPipeline, selectors: Sequence[Any]) -> dict[str, Any]:
    """A run's rewards, transforms and selectors with their options: settings that are not training arguments."""
    names = rewards.names
    return {
        "rewards": names,
        **_options("rewards", names[len(names) - len(rewards.functions) :], rewards.functions),
        **named("reward_transforms", rewards.transforms),
        **named("data_selectors", selectors),
    }


def named(kind: str, found: Sequence[Any]) -> dict[str, Any]:
    """Class names of components, in order, and their options by ``kind.name.option``.

    Each option is a separate entry, so that an option added in a later version does not conflict with earlier
    checkpoints.

    Args:
        kind: Name of the argument that holds them.
        found: Its components.
    """
    names: list[str] = []
    for component in found:
        names.append(numbered(type(component).__name__, names))
    return {kind: [type(component).__name__ for component in found], **_options(kind, names, found)}


def _options(kind: str, names: Sequence[str], found: Sequence[Any]) -> dict[str, Any]:
    return {
        f"{kind}.{name}.{option}": value
        for name, component in zip(names, found, strict=True)
        for option, value in _plain_options(component).items()
    }


def _plain_options(component: Any) -> dict[str, Any]:
    """A component's options; {} if a third party's has none, or they cannot be converted to JSON."""
    options = getattr(component, "options", None)
    try:
        return options.model_dump(mode="json") if isinstance(options, BaseModel) else {}
    except ValueError:
        return {}


def digests(dataset: Any) -> dict[str, str]:
    """A digest of each column's content, by name; empty if ``dataset`` is not a ``datasets.Dataset``."""
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        return {}
    found = {name: hashlib.sha256() for name in dataset.column_names if name not in _COMPUTED}
    for table in dataset.with_format("arrow").iter(1_000):
        for name, digest in found.items():
            digest.update(_content(table.column(name).combine_chunks()))
    return {name: digest.hexdigest() for name, digest in found.items()}


def _content(column: pa.Array) -> bytes:
    import pyarrow as pa

    if pa.types.is_list(column.type) and pa.types.is_integer(column.type.value_type) and not column.null_count:
        tokens = column.flatten()
        if not tokens.null_count:  # a fast path for token ids, of which there are many
            parts = (column.value_lengths(), tokens)
            return b"".join(part.to_numpy(zero_copy_only=False).astype("<i8").tobytes() for part in parts)
    return json.dumps(column.to_pylist(), sort_keys=True, default=str).encode()


def check(folder: Path, now: Mapping[str, Any]) -> None:
    """Compare a checkpoint with the run that resumes from it; warn about changes that are allowed.

    Args:
        folder: The checkpoint's folder.
        now: The result of ``identity``.

    Raises:
        UserError: Settings or data differ; with every difference, and both values of settings.
    """
    try:
        before = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        say(
            f"Warning: {folder} has no {FILE}, because an earlier version wrote it or its writing was cut off. Whether "
            "batch size, data and settings are still the same cannot be checked."
        )
        return
    changed = {
        name: (value, now["settings"][name])
        for name, value in before["settings"].items()
        if name in now["settings"] and now["settings"][name] != value
    }
    allowed = {name: effect for name in changed if (effect := _effect(name)) is not None}
    problems = [
        Problem(f"{name} was {old} when the checkpoint was written, and is {new} now.", str(folder), "Set it back.")
        for name, (old, new) in changed.items()
        if name not in allowed
    ]
    problems += [Problem(what, str(folder), "Train on the same data.") for what in _other_data(before, now)]
    if problems:
        last = problems[-1]
        fix = f"{last.fix} Or start a new run in another folder: a run is resumed only with its own settings and data."
        raise UserError.from_problems([*problems[:-1], Problem(last.what, last.where, fix)])
    for name, effect in allowed.items():
        old, new = changed[name]
        say(f"Warning: {name} was {old} when {folder} was written, and is {new} now. {effect}")


def _effect(name: str) -> str | None:
    """The effect of changing a setting; None if it must not change."""
    if name in _LENGTH:
        return "The learning rate's schedule follows it."
    if name == "processes":
        return "They divide the same batches."
    if name.startswith("data_selectors."):  # such as a threshold at which nothing was accepted
        return "It takes effect with the next selection."
    return None


def _other_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    if before["rows"] != now["rows"]:
        return [
            f"The training data had {before['rows']} rows when the checkpoint was written, and have {now['rows']} now."
        ]
    others = [name for name, digest in before["columns"].items() if now["columns"].get(name, digest) != digest]
    return [
        f"The column '{name}' of the training data is not what it was when the checkpoint was written."
        for name in others
    ]


class SameRun(TrainerCallback):
    """Makes a trainer of transformers write its identity into every checkpoint, and compare it on resume.

    Args:
        trainer: The trainer.
        dataset: Returns the training data; None: the trainer's ``train_dataset``.
        more: Further settings.
    """

    def __init__(self, trainer: Any, dataset: Callable[[], Any] | None = None, **more: Any) -> None:
        self._trainer, self._dataset, self._more = trainer, dataset or (lambda: trainer.train_dataset), more
        self._identity: dict[str, Any] = {}
        self._compared = False

    @property
    def identity(self) -> dict[str, Any]:
        """The trainer's identity, computed on first use."""
        if not self._identity:
            trainer = self._trainer
            self._identity = identity(trainer.args, self._dataset(), trainer.accelerator.num_processes, **self._more)
        return self._identity

    def compare(self, folder: Path) -> None:
        """Compare with a checkpoint; the trainer's next ``train`` then does not.

        Raises:
            UserError: As in ``check``.
        """
        check(folder, self.identity)
        self._compared = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare with the loaded checkpoint, which is assumed to be in the trainer's output folder.

        Raises:
            UserError: As in ``check``.
        """
        if state.global_step and not self._compared:
            check(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.identity)
        self._compared = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the identity, and the digests of all files written by the trainer and earlier callbacks."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self._trainer.accelerator.wait_for_everyone()  # each process writes its random state
        if state.is_world_process_zero and folder.is_dir():
            write_atomically(folder / FILE, json.dumps(self.identity, indent=1))
            content.record(folder)
