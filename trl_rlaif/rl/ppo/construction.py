"""The parts of a PPOTrainer: models, roles, tokenized prompts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

from accelerate.utils import set_seed
from peft import LoraConfig, PeftModel
from torch import nn
from torch.utils.data import DataLoader

from trl_rlaif.encoding import set_template_kwargs
from trl_rlaif.errors import UserError
from trl_rlaif.models.loading import ModelSpec, load_model, load_tokenizer
from trl_rlaif.models.shared_model import SharedBase
from trl_rlaif.responses import ResponseReader
from trl_rlaif.rl.prompts import tokenize_prompts
from trl_rlaif.rl.selection import StratifiedSampler
from trl_rlaif.stopping import chosen_stop_ids

if TYPE_CHECKING:
    from trl_rlaif.rl.ppo.config import PPOConfig


def policy_of(model: Any, tokenizer: Any, args: PPOConfig) -> tuple[Any, Any]:
    """The policy, loaded if a path was given, and its tokenizer with the chat template's variables."""
    if isinstance(model, str):
        set_seed(args.seed)
        path, model = model, load_model(ModelSpec(model, "bfloat16" if args.bf16 else "float32"))
        tokenizer = tokenizer or load_tokenizer(path)
    if args.chat_template_kwargs is not None:
        set_template_kwargs(tokenizer, args.chat_template_kwargs)
    return model, tokenizer


def shared_base(
    model: Any, value_model: Any, ref_model: Any, config: LoraConfig | None, *, trunk: bool
) -> SharedBase | None:
    """One base for every role, unless the caller brought separate models (then None).

    Raises:
        UserError: A separate reference without a separate value model, or ``value: trunk`` with separate models.
    """
    if isinstance(model, SharedBase):
        return model
    if value_model is not None and trunk:
        raise UserError("value: trunk needs one base for every role.", fix="Leave out value_model.")
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


def reader_of(args: PPOConfig, tokenizer: Any, model: nn.Module) -> ResponseReader:
    """The parser of responses, with the stop tokens."""
    named = {name: getattr(args, name) for name in ("stop_tokens", "stop_token_id", "stop_token")}
    stops = chosen_stop_ids(tokenizer, model, **named)
    return ResponseReader(tokenizer, stops, reasoning=args.reasoning, tags=args.reasoning_tags)


def longest_row(model: nn.Module, args: PPOConfig) -> int | None:
    """Maximum tokens of prompt and response together; None if unlimited."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [context] if context else []
    if args.max_prompt_length is not None:
        limits.append(args.max_prompt_length + args.response_length)
    return min(limits, default=None)


def tokenized(dataset: Any, tokenizer: Any, model: nn.Module, args: PPOConfig) -> Any:
    """A prompt dataset with ``input_ids``, without prompts that leave no room for the response."""
    if dataset is None:
        raise UserError("train_dataset is required.")
    limit, context = args.max_prompt_length, getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and args.score_at_end:
        context -= 1  # for the end of turn that is appended to score a cut-off response
    if args.generation == "vllm" and args.vllm_max_model_length:
        context = min(context or args.vllm_max_model_length, args.vllm_max_model_length)
    if limit is None and context:
        limit = context - args.response_length
    return tokenize_prompts(dataset, tokenizer, max_length=limit, num_proc=args.dataset_num_proc)


def prompt_loader(
    prompts: Any, batch_size: int, collate: Callable[..., Any], strata: Sequence[Hashable] | None = None
) -> DataLoader:
    """TRL's dataloader over other prompts.

    Args:
        strata: A label for each prompt: every batch holds them in similar proportions.
    """
    return DataLoader(
        prompts,
        batch_size=batch_size,
        **({"shuffle": True} if strata is None else {"sampler": StratifiedSampler(strata)}),
        collate_fn=collate,
        drop_last=True,  # every update has the same number of rows
    )
