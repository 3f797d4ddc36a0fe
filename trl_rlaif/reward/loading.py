"""Loads reward models from disk or the Hub: adapter, heads and base together."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trl_rlaif.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trl_rlaif.models.loading import ModelSpec


def load_reward_model(
    path: str | Path,
    *,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    quantization: Literal["none", "nf4"] = "none",
) -> PreTrainedModel:
    """Load a reward model saved by ``RewardTrainer`` or a run, ready to score.

    Args:
        path: Folder or Hub id of a whole sequence classification model, or of a PEFT adapter of one; then the base
            that its configuration names is loaded too.
        dtype, quantization: Data type and quantization of the base's weights.

    Returns:
        A model in eval mode whose ``logits`` are (B, 1), or (B, 2) for an Advantage Model: r(x, y), and e(x) if the
        last token is the prompt's. They are read at the last token with ``attention_mask`` 1, whatever pads the rows.

    Raises:
        UserError: There is no such model, or the adapter has no score head.
    """
    from peft import PeftConfig, PeftModel
    from transformers import AutoConfig

    from trl_rlaif.models.loading import ModelSpec, load_model

    try:
        config = PeftConfig.from_pretrained(str(path))
    except ValueError:  # not an adapter
        outputs = AutoConfig.from_pretrained(str(path)).num_labels
        return _reading_by_mask(load_model(ModelSpec(str(path), dtype, quantization), num_labels=outputs).eval())
    base = load_reward_base(path, ModelSpec(config.base_model_name_or_path, dtype, quantization))
    return _reading_by_mask(PeftModel.from_pretrained(base, str(path)).eval())


def load_reward_base(path: str | Path, spec: ModelSpec) -> PreTrainedModel:
    """The classifier that a reward model's adapter is loaded onto, with a head of the adapter's size.

    Args:
        path: Folder or Hub id of the adapter.
        spec: The base.

    Raises:
        UserError: There is no such base, or the adapter has no score head.
    """
    from peft.utils import load_peft_weights
    from transformers import AutoConfig

    from trl_rlaif.models.loading import load_model, resolve
    from trl_rlaif.reward.heads import widen

    heads = [weight for name, weight in load_peft_weights(str(path), device="cpu").items() if "score.weight" in name]
    if not heads:
        raise UserError("The adapter has no score head: it is not a reward model.", where=str(path))
    outputs = len(heads[0])
    base_config = AutoConfig.from_pretrained(resolve(spec.path))
    # A base with its own head is loaded with that head's size; the adapter replaces the head.
    classifies = any("SequenceClassification" in name for name in base_config.architectures or ())
    base = load_model(spec, num_labels=base_config.num_labels if classifies else outputs)
    if base.score.out_features < outputs:
        widen(base.score)
        base.config.num_labels = base.num_labels = outputs
    return base


def _reading_by_mask(model: PreTrainedModel) -> PreTrainedModel:
    hooks = _ForeignPadding()
    model.register_forward_pre_hook(hooks.put_in, with_kwargs=True)
    model.register_forward_hook(hooks.take_out, always_call=True)
    return model


class _ForeignPadding:
    """Replaces the padding by a token that no row contains: a transformers classifier finds a row's end by it.

    If the padding token also ends responses, as is usual for models without their own padding token, the classifier
    would read a score at the token before the end.
    """

    def __init__(self) -> None:
        self._own: int | None = None

    def put_in(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before a forward pass with ``input_ids`` and a two-dimensional mask; others are unchanged."""
        config = model.config.get_text_config()
        self._own = config.pad_token_id
        given = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if ids is None or mask is None or mask.dim() != 2:
            return args, kwargs
        present = set(ids.masked_fill(~mask.bool(), -1).flatten().tolist())
        config.pad_token_id = next(id for id in range(len(present) + 1) if id not in present)
        return (), {**given, "input_ids": ids.masked_fill(~mask.bool(), config.pad_token_id)}

    def take_out(self, model: PreTrainedModel, *_: Any) -> None:
        """After the forward pass."""
        model.config.get_text_config().pad_token_id = self._own
