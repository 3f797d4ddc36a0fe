"""Merges a base and its adapter into a plain model that loads without PEFT and has the same outputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from trl_rlaif.encoding import chat_prompt, encode_prompt, encode_response
from trl_rlaif.errors import RunError, UserError
from trl_rlaif.export.templates import conversation_template
from trl_rlaif.models.classifier import classifier_config
from trl_rlaif.models.loading import load_model, resolve
from trl_rlaif.pipeline.trained import Trained
from trl_rlaif.progress import say
from trl_rlaif.reward.loading import load_reward_base
from trl_rlaif.stopping import end_of_turn, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Texts on which a merged model must have the outputs of base and adapter.
_TRIAL = (
    ("What is the capital of Australia?", "Canberra."),
    ("Name a color.", "Sydney is the largest city of Australia, but not its capital."),
    ("Write a word.", "the"),
)
# Maximum relative difference of these outputs, by bytes per weight: merging rounds each weight once. Observed for
# SmolLM2-135M: 1e-6 in float32, 0.02 to 0.04 in bfloat16; merging into the wrong weights gives about 1.
_TOLERANCE = {8: 1e-6, 4: 1e-3, 2: 0.3}
PAD = "<|pad|>"


def write_merged(trained: Trained, folder: Path) -> float:
    """Write a model and its tokenizer as ``from_pretrained`` loads them, without an adapter.

    The adapter's weights are added to the base's in the dtype of the run's base. An NF4 base is dequantized first:
    these are the weights that the adapter was trained on. Merged into 4-bit weights, it would be rounded to their 16
    values; merged into the original weights, it would be applied to a base that it was not trained on.

    A reward model becomes the model family's sequence classifier with one label: the score of a conversation, read at
    its last token, at which ``conversation_template`` ends it. The Advantage Model's e(x) is omitted: it is read at
    another position, and is the same for all responses to a prompt.

    Args:
        trained: Base and adapter.
        folder: Existing folder to write to.

    Returns:
        The relative difference of the merged model's outputs, in the L2 norm.

    Raises:
        UserError: transformers has no sequence classifier for the model family.
        RunError: The merged model's outputs differ from those of base and adapter.
    """
    tokenizer = trained.tokenizer()
    scores = trained.what == "reward"
    if scores:
        check_classifier(trained)
        base = load_reward_base(trained.path, trained.base)
        base.config.get_text_config().pad_token_id = None  # if it also ends turns, a row would end before it
    else:
        base = load_model(trained.base)
    if trained.base.quantization == "nf4":
        base = base.dequantize()
    adapted = PeftModel.from_pretrained(base, str(trained.path)).eval()
    rows = [_encoded(tokenizer, *text) for text in _TRIAL]
    before = _answers(adapted, rows)
    model = adapted.merge_and_unload(safe_merge=True)
    if scores:
        _as_classifier(model, tokenizer, trained)
    difference = _difference(before, _answers(model, rows))
    if not difference <= _TOLERANCE[model.dtype.itemsize]:
        raise RunError(
            f"The merged model's outputs differ from those of base and adapter (relative {difference:.1g}), so it "
            "was not written.",
            fix="Leave out --merge.",
        )
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return difference


def check_classifier(trained: Trained) -> None:
    """Raise a UserError if transformers has no sequence classifier for a reward model's family."""
    config = classifier_config(resolve(trained.base.path), 1)
    if config.model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise UserError(
            f"transformers has no sequence classifier of the family '{config.model_type}', so no other program could "
            "load this one.",
            where=trained.base.path,
            fix="Leave out --merge: trl_rlaif.load_reward_model loads the adapter with its head.",
        )


def _encoded(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> list[int]:
    return encode_prompt(tokenizer, chat_prompt(prompt, tokenizer)) + encode_response(tokenizer, response)


@torch.no_grad()
def _answers(model: nn.Module, rows: Sequence[list[int]]) -> torch.Tensor:
    """(rows, outputs) float64, the logits at each row's last token, or its score."""
    found = [model(input_ids=torch.tensor([ids])).logits for ids in rows]
    return torch.stack([(x[0, -1] if x.dim() == 3 else x[0, :1]).double() for x in found])


def _difference(before: torch.Tensor, after: torch.Tensor) -> float:
    return ((after - before).norm() / before.norm()).item()


def _as_classifier(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, trained: Trained) -> None:
    """Change model and tokenizer so that other programs read the score at the same token as the run."""
    head = nn.Linear(model.score.in_features, 1, bias=model.score.bias is not None, dtype=model.score.weight.dtype)
    head.load_state_dict({name: tensor[:1] for name, tensor in model.score.state_dict().items()})
    model.score, model.num_labels, model.config.num_labels = head, 1, 1
    model.config.problem_type = "regression"  # the raw score: pipelines and vLLM otherwise apply an activation
    if tokenizer.pad_token_id in stop_ids(tokenizer):
        # A row's end is found by its padding, so the padding token must differ from the one where the score is read.
        tokenizer.add_special_tokens({"pad_token": PAD})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if tokenizer.chat_template:
        end = tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer))
        rows = [_encoded(tokenizer, *text) for text in _TRIAL]
        tokenizer.chat_template = conversation_template(tokenizer.chat_template, end, trained.template_kwargs)
        if [_rendered(tokenizer, *text) for text in _TRIAL] != rows:
            say(
                "Warning: rendered text has other tokens than the run's rows had, as where the chat template ends a "
                "prompt with a space and a word follows. Its scores differ a little from the run's."
            )


def _rendered(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> list[int]:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
