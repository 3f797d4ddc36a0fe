"""What a PPOTrainer is built from: models, roles, tokenized prompts."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

from accelerate.utils import set_seed
from peft import LoraConfig, PeftModel
from torch import nn
from torch.utils.data import DataLoader

from trl_rlaif.errors import UserError
from trl_rlaif.models.kernels.fused_lora import fuse_lora
from trl_rlaif.models.kernels.precision import cast_frozen_weights
from trl_rlaif.models.loading import ModelSpec, load_model, load_tokenizer
from trl_rlaif.models.shared_model import SharedBase
from trl_rlaif.rl.prompts import tokenize_prompts
from trl_rlaif.rl.selection import StratifiedSampler
from trl_rlaif.stopping import named_stop_ids, stop_ids

if TYPE_CHECKING:
    from trl_rlaif.rl.ppo.config import PPOConfig
    from trl_rlaif.rl.ppo.trainer import PPOTrainer


def load_policy(path: str, tokenizer: Any, args: PPOConfig) -> tuple[nn.Module, Any]:
    """The policy of a path, and the tokenizer that was given or else the path's."""
    set_seed(args.seed)
    model = load_model(ModelSpec(path, "bfloat16" if args.bf16 else "float32"))
    return model, tokenizer or load_tokenizer(path)


def shared_base(model: Any, value_model: Any, ref_model: Any, config: LoraConfig | None) -> SharedBase | None:
    """One base for every role, unless the caller brought separate models (then None).

    Raises:
        UserError: A separate reference without a separate value model.
    """
    if isinstance(model, SharedBase):
        return model
    if value_model is not None:
        return None
    if ref_model is not None:
        raise UserError(
            "ref_model was given without value_model.",
            fix="Give both for separate models, or neither for one base with adapters.",
        )
    if isinstance(model, PeftModel):
        return SharedBase.around(model)
    return SharedBase(model, config or LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))


def prepare_base(shared: SharedBase | None, args: PPOConfig) -> None:
    """Make a shared base, if there is one, compute in the precision that is asked for, as fast as it can.

    Raises:
        UserError: float16 is asked for.
    """
    if args.fp16:
        raise UserError("fp16 is not supported in PPO.", fix="Use bf16, or neither for float32.")
    if shared is not None:
        fuse_lora(shared.peft)
        if args.bf16:
            cast_frozen_weights(shared.model)


def check_trunk(shared: SharedBase | None) -> None:
    """Refuse a value on the policy's trunk where there is none to share.

    Raises:
        UserError: The models are separate.
    """
    if shared is None:
        raise UserError("value: trunk needs one base for every role.", fix="Leave out value_model.")


def stop_ids_of(args: PPOConfig, tokenizer: Any, model: nn.Module) -> tuple[int, ...]:
    """The tokens that end a response, as the arguments say; none where they ask for the full length."""
    if args.stop_tokens is not None:
        return named_stop_ids(tokenizer, args.stop_tokens)
    if args.stop_token == "eos":
        return stop_ids(tokenizer, model)
    return () if args.stop_token_id is None else (args.stop_token_id,)


def longest_row(model: nn.Module, args: PPOConfig) -> int | None:
    """Most tokens of prompt and response together; None where nothing limits them."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limit = getattr(args, "max_prompt_length", None)
    limits = [n for n in (context, None if limit is None else limit + args.response_length) if n]
    return min(limits, default=None)


def tokenized(dataset: Any, tokenizer: Any, model: nn.Module, args: PPOConfig) -> Any:
    """A prompt dataset with ``input_ids``, without what leaves no room for the response."""
    if dataset is None:
        raise UserError("train_dataset is required.")
    limit = getattr(args, "max_prompt_length", None)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and args.score_at_end:
        context -= 1  # for the end of turn with which a cut response is scored
    if args.generation == "vllm" and args.vllm_max_model_length:
        context = min(context or args.vllm_max_model_length, args.vllm_max_model_length)
    if limit is None and context:
        limit = context - args.response_length
    return tokenize_prompts(dataset, tokenizer, max_length=limit, num_proc=args.dataset_num_proc)


def enable_gradient_checkpointing(trainer: PPOTrainer) -> None:
    """Of what learns: the shared base, or policy and value."""
    kwargs = trainer.args.gradient_checkpointing_kwargs or {"use_reentrant": False}
    model = trainer.accelerator.unwrap_model(trainer.model)
    for part in (model.policy,) if trainer.shared is not None else (model.policy, model.value_model):
        part.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def prompt_loader(trainer: PPOTrainer, strata: Sequence[Hashable] | None = None) -> DataLoader:
    """The parent's dataloader, over the trainer's present prompts.

    Args:
        strata: A label for each prompt: every batch holds them in like shares.
    """
    return DataLoader(
        trainer.train_dataset,
        batch_size=trainer.local_dataloader_batch_size,
        **({"shuffle": True} if strata is None else {"sampler": StratifiedSampler(strata)}),
        collate_fn=trainer.data_collator,
        drop_last=True,  # every update has the same number of rows
    )
