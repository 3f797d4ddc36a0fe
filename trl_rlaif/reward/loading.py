"""Reward models from disk or the Hub, adapter, heads and base as one thing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trl_rlaif.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_reward_model(
    path: str | Path,
    *,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    quantization: Literal["none", "nf4"] = "none",
) -> PreTrainedModel:
    """A reward model that ``RewardTrainer`` or a run wrote, ready to score.

    Args:
        path: Folder or Hub id of a whole sequence classification model, or of a PEFT adapter of one; then the base
            that its configuration names is loaded too.
        dtype, quantization: How the weights of the base are held.

    Returns:
        A model in eval mode whose ``logits`` are (B, 1), or (B, 2) of an Advantage Model: r(x, y), and what was e(x)
        if the last token was the prompt's.

    Raises:
        UserError: There is no such model, or an adapter without a score head.
    """
    from peft import PeftConfig, PeftModel
    from peft.utils import load_peft_weights
    from transformers import AutoConfig

    from trl_rlaif.models import ModelSpec, load_model, resolve
    from trl_rlaif.reward.heads import widen

    try:
        config = PeftConfig.from_pretrained(str(path))
    except ValueError:  # not an adapter
        outputs = AutoConfig.from_pretrained(str(path)).num_labels
        return load_model(ModelSpec(str(path), dtype, quantization), num_labels=outputs).eval()
    heads = [weight for name, weight in load_peft_weights(str(path), device="cpu").items() if "score.weight" in name]
    if not heads:
        raise UserError("The adapter has no score head: it is not a reward model's.", where=str(path))
    spec, outputs = ModelSpec(config.base_model_name_or_path, dtype, quantization), len(heads[0])
    base_config = AutoConfig.from_pretrained(resolve(spec.path))
    # A base with a head of its own keeps that one's size while it is loaded; the adapter brings another head.
    classifies = any("SequenceClassification" in name for name in base_config.architectures or ())
    base = load_model(spec, num_labels=base_config.num_labels if classifies else outputs)
    if base.score.out_features < outputs:
        widen(base.score)
        base.config.num_labels = base.num_labels = outputs
    return PeftModel.from_pretrained(base, str(path)).eval()
