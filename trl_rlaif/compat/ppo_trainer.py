"""Base class of PPOTrainer for TRL releases without a PPO trainer: construction, saving and the model card."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState

from trl_rlaif.compat.ppo_config import OwnPPOConfig
from trl_rlaif.errors import Problem, UserError


@dataclass
class PPOState(TrainerState):
    """The state that callbacks see, with the number of responses sampled so far."""

    episode: int = 0


class PolicyAndValue(nn.Module):
    """Policy and value model as one module, as optimizers and accelerate need it."""

    def __init__(self, policy: nn.Module, value_model: nn.Module) -> None:
        super().__init__()
        self.policy, self.value_model = policy, value_model
        self.config = policy.config  # DeepSpeed reads it


class OwnPPOTrainer(Trainer):
    """The constructor, ``save_model`` and the model card of TRL 1.12's ``PPOTrainer``, on transformers' Trainer.

    With the same seed, models and arguments, it draws the same random numbers as TRL's.

    Args:
        args: Its batch sizes and ``num_total_batches`` are computed here.
        processing_class: The tokenizer.
        model: The policy.
        ref_model: None: a frozen copy of the policy, or, if the policy has adapters, the policy without them.
        reward_model: Moved to the device, but not prepared by accelerate.
        train_dataset: With ``input_ids``.
        value_model: Trained together with the policy.
        data_collator: None: transformers' default, which pads ``input_ids``.
        eval_dataset: Prompts for ``generate_completions``.
        optimizers, callbacks: As in transformers' Trainer.
        peft_config: Makes the policy a PeftModel.

    Raises:
        UserError: The arguments contradict each other, or a batch cannot be divided into minibatches.
    """

    _tag_names = ("trl-rlaif", "ppo")

    def __init__(
        self,
        args: OwnPPOConfig,
        processing_class: Any,
        model: Any,
        ref_model: nn.Module | None,
        reward_model: nn.Module,
        train_dataset: Any,
        value_model: nn.Module,
        data_collator: Any = None,
        eval_dataset: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: list[Any] | None = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        _check(args, model, ref_model, train_dataset, peft_config)
        eos_id = processing_class.eos_token_id
        self.stop_token_id = eos_id if args.stop_token == "eos" else args.stop_token_id
        if peft_config is not None:
            model = with_adapter(model, peft_config, args)
        self.policy_model, self.value_model, self.reward_model = model, value_model, reward_model
        self.is_peft_model = isinstance(model, PeftModel)
        self.ref_model = ref_model if ref_model is not None or self.is_peft_model else _frozen_copy(model)
        self.model_adapter_name, self.ref_adapter_name = args.model_adapter_name, args.ref_adapter_name
        for part in (model, self.ref_model, value_model, reward_model):
            without_dropout(part)
        use_cache = getattr(model.config, "use_cache", True)
        super().__init__(
            model=PolicyAndValue(model, value_model),
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # transformers stores its evaluation function under this name, which would hide the training loop's method.
        self.__dict__.pop("compute_metrics", None)
        model.config.use_cache = use_cache  # transformers turns it off for training; here the policy also generates
        known = {part.name: getattr(self.state, part.name) for part in fields(self.state)}
        self.state = PPOState(**known)
        self.train_dataset_len = len(train_dataset)
        work_out_batches(args, self.accelerator.num_processes, self.train_dataset_len)
        self.local_dataloader_batch_size = args.local_batch_size
        self.local_seed = args.seed + self.accelerator.process_index * 100_003
        self.create_optimizer_and_scheduler(num_training_steps=args.num_total_batches)
        self._prepare()

    def create_accelerator_and_postprocess(self) -> None:
        """Create an accelerator that counts gradient accumulation itself; torch's seed determines the data order."""
        self.accelerator = Accelerator(gradient_accumulation_steps=self.args.gradient_accumulation_steps)
        self.gather_function = self.accelerator.gather_for_metrics
        self.is_deepspeed_enabled = getattr(self.accelerator.state, "deepspeed_plugin", None) is not None
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    def _prepare(self) -> None:
        """Prepare model, optimizer and dataloaders with accelerate; move the other models to the device."""
        prepare, args = self.accelerator.prepare, self.args
        self.dataloader = self._loader(self.train_dataset, self.local_dataloader_batch_size, shuffle=True)
        torch.manual_seed(args.seed)  # all processes must shuffle identically, so that no two get the same prompts
        self.model, self.optimizer, self.dataloader = prepare(self.model, self.optimizer, self.dataloader)
        torch.manual_seed(self.local_seed)  # but each samples different responses
        self.eval_dataloader = None
        if self.eval_dataset is not None:
            loader = self._loader(self.eval_dataset, args.per_device_eval_batch_size, shuffle=False)
            self.eval_dataloader = prepare(loader)
        self.model_wrapped = self.model
        if self.is_deepspeed_enabled:
            self.deepspeed = self.model
        handler = self.callback_handler
        handler.model, handler.optimizer, handler.lr_scheduler = self.model, self.optimizer, self.lr_scheduler
        for part in (self.ref_model, self.reward_model):
            if part is not None:
                part.to(self.accelerator.device)

    def _loader(self, dataset: Any, batch_size: int, *, shuffle: bool) -> DataLoader:
        # Every update has the same number of rows.
        return DataLoader(dataset, batch_size, shuffle=shuffle, collate_fn=self.data_collator, drop_last=True)

    def get_train_dataloader(self) -> DataLoader:
        return self.dataloader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader | None:
        return self.eval_dataloader

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write only the policy, as ``from_pretrained`` loads it, and the tokenizer."""
        with self._as_policy():
            super().save_model(output_dir, _internal_call)

    @contextmanager
    def _as_policy(self) -> Iterator[None]:
        """Inside, transformers' methods see the policy as the trained model."""
        trained, engine = self.model, self.deepspeed
        self.model = self.accelerator.unwrap_model(trained).policy
        if self.is_deepspeed_enabled:
            self.deepspeed = self.model
        try:
            yield
        finally:
            self.model, self.deepspeed = trained, engine

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write ``README.md`` to the output folder; ``push_to_hub`` calls this.

        Args:
            model_name: The heading; None: the folder's name.
            dataset_name: Source of the prompts.
            tags: Additional tags besides ``trl-rlaif`` and ``ppo``.
        """
        if not self.is_world_process_zero():
            return
        base = self.policy_model.config.name_or_path
        base = None if not base or Path(base).is_dir() else base  # a local folder means nothing to others
        name = model_name or Path(self.args.output_dir).name
        data = ModelCardData(
            base_model=base,
            datasets=dataset_name,
            library_name="peft" if self.is_peft_model else "transformers",
            tags=sorted({*self._tag_names, *([tags] if isinstance(tags, str) else tags or ())}),
        )
        text = f"The policy {f'began as `{base}` and ' if base else ''}was trained with PPO by trl-rlaif."
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n{text}\n")
        card.save(Path(self.args.output_dir) / "README.md")


def _check(
    args: OwnPPOConfig, model: Any, ref_model: nn.Module | None, train_dataset: Any, peft_config: PeftConfig | None
) -> None:
    """Raise a UserError with all contradictions between arguments."""
    problems = []
    if train_dataset is None:
        problems.append(Problem("train_dataset is required."))
    if ref_model is model:
        problems.append(Problem("ref_model is the model that is being trained.", fix="Pass a copy of it, or None."))
    if args.stop_token and args.stop_token_id is not None:
        problems.append(Problem("stop_token and stop_token_id are both set.", fix="Leave one of them out."))
    for name, allowed in {"stop_token": (None, "eos"), "kl_estimator": ("k1", "k3")}.items():
        if getattr(args, name) not in allowed:
            what = f"{name} is {getattr(args, name)!r}."
            problems.append(Problem(what, fix=f"Choose one of: {', '.join(map(str, allowed))}."))
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        problems.append(Problem(f"peft_config is a {type(peft_config).__name__}.", fix="Pass a LoraConfig, say."))
    if peft_config is not None and isinstance(model, PeftModel):
        fix = "Leave out peft_config, or merge the adapter first (merge_and_unload)."
        problems.append(Problem("peft_config is set, but the model already has an adapter.", fix=fix))
    if problems:
        raise UserError.from_problems(problems)


def with_adapter(model: Any, config: PeftConfig, args: OwnPPOConfig) -> PeftModel:
    """Add an adapter to the policy. On a 4-bit base with bf16, cast norms to float32, and embeddings to bfloat16."""
    model = get_peft_model(model, config)
    if args.bf16 and getattr(model, "is_loaded_in_4bit", False):
        head = model.get_output_embeddings()
        for name, module in model.named_modules():
            if "norm" in name or isinstance(module, nn.LayerNorm):
                module.float()
            elif (module is head or isinstance(module, nn.Embedding)) and module.weight.dtype == torch.float32:
                module.bfloat16()
    return model


def _frozen_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False).eval()


def without_dropout(model: nn.Module | None) -> None:
    """Turn dropout off: PPO's ratio compares a network before and after a step, not two dropout masks."""
    for module in model.modules() if model is not None else ():
        if isinstance(module, nn.Dropout):
            module.p = 0


def work_out_batches(args: OwnPPOConfig, processes: int, prompts: int) -> None:
    """Compute the arguments' batch sizes and number of updates.

    Raises:
        UserError: A batch cannot be divided into minibatches, or these are too small for ``whiten_rewards``.
    """
    if args.total_episodes is None:
        args.total_episodes = int(args.num_train_epochs * prompts)
    args.world_size = processes
    args.local_batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    args.micro_batch_size = args.per_device_train_batch_size * processes
    args.batch_size = args.local_batch_size * processes
    args.local_mini_batch_size, left = divmod(args.local_batch_size, args.num_mini_batches)
    if left:
        raise UserError(
            f"{args.local_batch_size} responses of an update (per_device_train_batch_size * "
            f"gradient_accumulation_steps) cannot be divided into num_mini_batches = {args.num_mini_batches}.",
            fix="Choose a divisor.",
        )
    args.mini_batch_size = args.local_mini_batch_size * processes
    if args.whiten_rewards and args.local_mini_batch_size < 8:
        raise UserError(
            f"whiten_rewards needs minibatches of 8 responses or more; these have {args.local_mini_batch_size}.",
            fix="Raise per_device_train_batch_size or gradient_accumulation_steps, or lower num_mini_batches.",
        )
    args.num_total_batches = math.ceil(args.total_episodes / args.batch_size)
