"""Tries a recipe's settings for TRL's trainers before any computation."""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import tempfile
from contextlib import redirect_stderr
from typing import TYPE_CHECKING

from trl_rlaif import distributed
from trl_rlaif.algorithms import ALGORITHMS
from trl_rlaif.memory.settings import with_settings
from trl_rlaif.pipeline.checkpointing import CHECKPOINTING
from trl_rlaif.pipeline.training import settings_of
from trl_rlaif.recipe.trl_fields import CONFIG_CLASSES

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from trl_rlaif.pipeline.context import Context
    from trl_rlaif.plugins import Plugins
    from trl_rlaif.recipe import Recipe

# String settings that TRL's configurations do not validate.
_LOOKED_AT_LATE = (
    "loss_type", "f_divergence_type", "importance_sampling_level", "scale_rewards", "multi_objective_aggregation",
    "vllm_importance_sampling_mode",
)  # fmt: skip
# Steps of a schedule that is created but not used.
_STEPS = 1000


def try_settings(recipe: Recipe, plugins: Plugins) -> None:
    """Create each trainer's configuration from the recipe, as its stage will.

    Raises:
        UserError: TRL or transformers reject one.
    """
    sections = [name for name in CONFIG_CLASSES if (section := getattr(recipe, name)) and section.config]
    if not sections or distributed.processes() > 1:  # multiple processes would wait for each other
        return
    from trl_rlaif.pipeline.context import Context
    from trl_rlaif.pipeline.run_folder import RunFolder

    written = {name: getattr(recipe, name).config for name in sections}
    # Gradient checkpointing is set here, so memory need not be predicted.
    settled = with_settings(recipe, {(n, CHECKPOINTING): of.get(CHECKPOINTING, False) for n, of in written.items()})
    with tempfile.TemporaryDirectory() as folder:
        context = Context(settled, RunFolder(folder), plugins)
        with redirect_stderr(io.StringIO()):  # the stages will show the configurations' warnings
            for name in sections:
                _try(context, name)


def _try(context: Context, section: str) -> None:
    config = _config(context, section)
    with settings_of(context.recipe, section):
        _make_parts(config)


def _config(context: Context, section: str) -> TrainingArguments:
    """A section's configuration, as its stage creates it."""
    if section != "rl":
        return importlib.import_module(f"trl_rlaif.pipeline.work.{section}").trainer_config(context)
    algorithm = ALGORITHMS[context.recipe.rl.algorithm]
    if algorithm.config is None:
        from trl_rlaif.pipeline import rl_setup

        return rl_setup.config(context)
    work = importlib.import_module(algorithm.run.partition(":")[0])
    config = work.trainer_config(context)[0]
    with settings_of(context.recipe, section):
        _check_texts(config, algorithm.config[1].replace("Config", "Trainer"))
    if algorithm.samples:
        work.scorer_settings(context, config)
    return config


def _check_texts(config: TrainingArguments, trainer: str) -> None:
    """Check string settings that TRL reads only in the first update against the strings in its code's comparisons."""
    source = inspect.getsource(getattr(importlib.import_module("trl"), trainer))
    compared = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Compare)]
    for field in _LOOKED_AT_LATE:
        given = getattr(config, field, None)
        known = {
            constant.value
            for node in compared
            if field in (getattr(node.left, "attr", None), getattr(node.left, "id", None))
            for constant in ast.walk(node.comparators[0])
            if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
        }
        for text in given if isinstance(given, list) else [given]:
            if known and isinstance(text, str) and text not in known:
                raise ValueError(f"{field} is '{text}'; {trainer} knows {', '.join(sorted(known))}.")


def _make_parts(args: TrainingArguments) -> None:
    """Create what a trainer creates when training starts: optimizer, schedule, data loader and reporting callbacks."""
    from torch import nn, optim
    from torch.utils.data import DataLoader
    from transformers import Trainer, get_scheduler
    from transformers.integrations import get_reporting_integration_callbacks
    from transformers.utils import is_liger_kernel_available

    if getattr(args, "activation_offloading", False) and args.device.type == "cpu":
        raise ValueError("activation_offloading moves activations from a GPU, and there is none.")
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ValueError("use_liger_kernel needs the package liger-kernel, which is not installed.")
    get_reporting_integration_callbacks(args.report_to)
    DataLoader(
        [0],
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_persistent_workers,
        multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),
        prefetch_factor=args.dataloader_prefetch_factor,
    )
    if args.optim_target_modules is not None:  # modules of the base
        return
    layer = nn.Linear(1, 1)
    kind, arguments = Trainer.get_optimizer_cls_and_kwargs(args, layer)
    made = optim.AdamW(layer.parameters(), lr=args.learning_rate)
    if isinstance(kind, type) and issubclass(kind, optim.Optimizer) and "params" not in arguments:
        made = kind(layer.parameters(), **arguments)
    warmup = args.get_warmup_steps(_STEPS)
    get_scheduler(args.lr_scheduler_type, made, warmup, _STEPS, args.lr_scheduler_kwargs)
