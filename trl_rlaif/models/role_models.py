"""The models of PPO's roles: on one shared base, or separate. The loop sees one interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from peft import PeftModel
from torch import nn

from trl_rlaif.errors import UserError
from trl_rlaif.models.shared_model import SharedBase, active_adapter, backbone, inner_model


class RoleModels(Protocol):
    """Forward passes of the four roles. ``inputs`` are input_ids, attention_mask and position_ids.

    A trained role must run its backward pass inside its own ``role`` context: gradient checkpointing recomputes the
    forward pass there, which must see the same adapter.
    """

    one_trunk: bool
    """Whether the value head reads the policy's own hidden states, so that one forward pass gives both."""

    has_value: bool
    """Whether there is a value model; RLOO and GRPO have none."""

    def role(self, part: str) -> AbstractContextManager:
        """Context for a role: policy, value, reward or reference."""

    def model(self, part: str) -> nn.Module:
        """The causal language model of policy or reference; use it inside ``role(part)``."""

    def adapter(self) -> tuple[PeftModel, str]:
        """The model whose adapter is the policy, and the adapter's name.

        Raises:
            UserError: The policy is not an adapter.
        """

    def trained(self) -> Sequence[nn.Module]:
        """The transformers models that gradients pass through."""

    def value_hidden(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, S, H) hidden states that the value head reads; use it inside ``role("value")``."""

    def value_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Values of hidden states: their shape without the last axis."""

    def scores(self, inputs: dict[str, torch.Tensor], prompt_end: int) -> torch.Tensor:
        """(B, 1) scores of whole responses, read at each row's last token; or (B, 2), if the head has an e(x).

        e(x) is read at the column ``prompt_end``, where every row's prompt ends.
        """


class SharedRoleModels:
    """All roles on one base; the reward may be a separate model."""

    def __init__(self, shared: SharedBase, reward: nn.Module | None = None) -> None:
        self.shared, self.reward = shared, reward
        self.one_trunk, self.has_value = "value" not in shared.peft.peft_config, "value" in shared.heads

    def role(self, part: str) -> AbstractContextManager:
        if part == "value" and self.one_trunk:
            part = "policy"
        return self.shared.role(self.shared.reference if part == "reference" else part)

    def model(self, part: str) -> nn.Module:
        return self.shared.model

    def adapter(self) -> tuple[PeftModel, str]:
        return self.shared.peft, "policy"

    def trained(self) -> Sequence[nn.Module]:
        return (self.shared.peft,)

    def value_hidden(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.shared.hidden("policy" if self.one_trunk else "value", **inputs)

    def value_head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.shared.head("value", hidden).squeeze(-1)

    def scores(self, inputs: dict[str, torch.Tensor], prompt_end: int) -> torch.Tensor:
        if self.reward is not None:
            return _separate_scores(self.reward, inputs, prompt_end)
        hidden = self.shared.hidden("reward", **inputs)
        return _scores(lambda states: self.shared.head("reward", states), hidden, inputs, prompt_end)


class SeparateRoleModels:
    """As in TRL's own trainer: one model per role.

    Args:
        policy: Causal language model, plain or PEFT.
        reference: The same kind of model, or None: the policy without its adapter, or with the adapter
            ``ref_adapter``.
        value: Sequence classification model with a ``score`` head.
        reward: The same, or None if all rewards come from functions.
        ref_adapter: Name of the reference's adapter on the policy.
    """

    one_trunk, has_value = False, True

    def __init__(
        self,
        policy: nn.Module,
        reference: nn.Module | None,
        value: nn.Module,
        reward: nn.Module | None,
        ref_adapter: str | None = None,
    ) -> None:
        self.policy, self.reference, self.value, self.reward = policy, reference, value, reward
        self.ref_adapter = ref_adapter

    def role(self, part: str) -> AbstractContextManager:
        if part == "reference" and self.reference is None:
            return active_adapter(self.policy, self.ref_adapter)
        return nullcontext()

    def model(self, part: str) -> nn.Module:
        return inner_model(self.policy if part == "policy" or self.reference is None else self.reference)

    def adapter(self) -> tuple[PeftModel, str]:
        if not isinstance(self.policy, PeftModel):
            raise UserError("The policy is trained whole: there is no adapter.", fix="Leave out vllm_sync: adapter.")
        return self.policy, self.policy.active_adapter

    def trained(self) -> Sequence[nn.Module]:
        return inner_model(self.policy), inner_model(self.value)

    def value_hidden(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return backbone(self.value)(**inputs, use_cache=False).last_hidden_state

    def value_head(self, hidden: torch.Tensor) -> torch.Tensor:
        return inner_model(self.value).score(hidden).squeeze(-1)

    def scores(self, inputs: dict[str, torch.Tensor], prompt_end: int) -> torch.Tensor:
        return _separate_scores(self.reward, inputs, prompt_end)


def _separate_scores(reward: nn.Module, inputs: dict[str, torch.Tensor], prompt_end: int) -> torch.Tensor:
    hidden = backbone(reward)(**inputs, use_cache=False).last_hidden_state
    return _scores(inner_model(reward).score, hidden, inputs, prompt_end)


def _scores(
    head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, inputs: dict[str, torch.Tensor], prompt_end: int
) -> torch.Tensor:
    scores = head(last_hidden(hidden, inputs))
    if scores.shape[-1] == 2:
        scores = torch.stack((scores[:, 0], head(hidden[:, prompt_end])[:, 1]), 1)
    return scores


def last_hidden(hidden: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Each row's hidden state at its last unmasked token: (B, S, H) to (B, H)."""
    last = inputs["attention_mask"].cumsum(1).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]
