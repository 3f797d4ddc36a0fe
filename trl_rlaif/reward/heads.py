"""The head of a reward model: the score of a response, and optionally the expected score for its prompt."""

from __future__ import annotations

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from trl_rlaif.errors import UserError
from trl_rlaif.models.shared_model import inner_model


def active_head(model: nn.Module) -> nn.Module:
    """The head ``score`` that a sequence classification model uses: the adapter's own, if it has one."""
    score = inner_model(model).score
    return score.modules_to_save[score.active_adapters[0]] if isinstance(score, ModulesToSaveWrapper) else score


@torch.no_grad()
def add_expected(model: nn.Module) -> None:
    """Give the head ``score`` a second output, e(x), initialized to zero; the first is unchanged.

    Both are then saved and loaded as one head of a sequence classification model with two labels.

    Raises:
        UserError: The model has no linear head ``score``, or one that is not trained.
    """
    inner = inner_model(model)
    score = getattr(inner, "score", None)
    heads = list(score.modules_to_save.values()) if isinstance(score, ModulesToSaveWrapper) else [score]
    if isinstance(score, ModulesToSaveWrapper):
        heads.append(score.original_module)
    if not all(isinstance(head, nn.Linear) for head in heads):
        raise UserError(f"{type(inner).__name__} has no linear head 'score', which e(x) would be added to.")
    if not any(head.weight.requires_grad for head in heads):
        raise UserError("The head 'score' is not trained.", fix="LoraConfig(modules_to_save=['score'], ...)")
    for head in heads:
        if head.out_features == 1:
            widen(head)
    inner.config.num_labels = inner.num_labels = 2


@torch.no_grad()
def widen(head: nn.Linear) -> None:
    """Give a head with one output a second one, initialized to zero."""
    trained = head.weight.requires_grad
    head.weight = nn.Parameter(torch.cat((head.weight, torch.zeros_like(head.weight))), requires_grad=trained)
    if head.bias is not None:
        head.bias = nn.Parameter(torch.cat((head.bias, torch.zeros_like(head.bias))), requires_grad=trained)
    head.out_features = 2
