"""One frozen base, many roles: LoRA adapters switched exactly, without cost or copies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from trl_rlaif.errors import UserError
from trl_rlaif.models.loading import keep_gradients

ADAPTER_FILE = "adapter_model.safetensors"
# A value model's head, next to its adapter or alone.
HEAD_FILE = "head.safetensors"
# TRL's name for its copy of a trained adapter that serves as the reference.
TRL_REFERENCE = "ref"


@contextmanager
def active_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Context with one adapter active, or none.

    PEFT's own ``set_adapter`` and ``disable_adapter`` also set ``requires_grad``, which would freeze or
    thaw roles behind the optimizer's back; this sets the two flags that a forward pass reads, and always
    restores them. It nests.
    """
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def inner_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def backbone(model: nn.Module) -> nn.Module:
    """The transformer below a model's head (a multimodal one's text model): it outputs ``last_hidden_state``.

    It is the innermost transformers model that holds the token embedding: attribute names differ by family.
    """
    inner = inner_model(model)
    embedding = inner.get_input_embeddings()
    above = takewhile(lambda module: module is not embedding, inner.modules())
    holders = [m for m in above if isinstance(m, PreTrainedModel) and embedding in m.modules()]
    return holders[-1] if len(holders) > 1 else getattr(inner, inner.base_model_prefix)


def save_adapter(model: PeftModel, name: str, folder: str | Path) -> None:
    """Write one adapter so that ``PeftModel.from_pretrained(base, folder)`` loads it.

    (``save_pretrained`` puts every adapter except ``default`` into a subfolder.)
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    save_file({k: v.contiguous().cpu() for k, v in state.items()}, folder / ADAPTER_FILE, {"format": "pt"})
    config = model.peft_config[name]
    training, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = training


def set_reference(model: PeftModel, name: str, folder: str | Path | None) -> None:
    """Replace a trainer's reference, an inactive adapter, with the one in a folder.

    Args:
        name: The adapter.
        folder: Written by ``save_adapter``; None removes the adapter, making the bare base the reference.
    """
    if name in model.peft_config:
        model.delete_adapter(name)
    if folder is not None:
        model.add_adapter(name, _for_causal_lm(_read_config(folder)))
        set_peft_model_state_dict(model, _read_state(folder), adapter_name=name)


class SharedBase(nn.Module):
    """A causal language model that is policy, value, reward and reference at once.

    The policy is the adapter ``policy``. The reference is the adapter ``reference``, a frozen copy of the initial
    policy, if that is an adapter; otherwise it is the base without an adapter. Value and reward are adapters, each with
    a scalar head.

    Args:
        model: The base, which is frozen as a whole. Plain or NF4.
        policy: LoRA configuration of a new policy, or folder of an adapter to start from.
        reference: Folder of the reference adapter; None: the base without an adapter.

    Raises:
        UserError: LoRA does not work on the policy's target modules. In a multimodal base, only the text model is
            adapted.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: LoraConfig | str | Path,
        *,
        reference: str | Path | None = None,
    ) -> None:
        from trl_rlaif.models.adapters import fitted  # which needs this module

        super().__init__()
        given = isinstance(policy, PeftConfig)
        config = fitted(_for_causal_lm(policy if given else _read_config(policy)), model)
        self.peft = get_peft_model(keep_gradients(model), config, adapter_name="policy")
        self.heads = nn.ModuleDict()
        if not given:
            set_peft_model_state_dict(self.peft, _read_state(policy), adapter_name="policy")
        if reference is not None:
            self.add_adapter("reference", _for_causal_lm(_read_config(reference)), _read_state(reference))
        self._set_trainable()

    @classmethod
    def around(cls, peft: PeftModel) -> SharedBase:
        """Roles on a PeftModel whose active adapter is already the policy; it is named ``policy`` here."""
        shared = cls.__new__(cls)
        nn.Module.__init__(shared)
        shared.peft, shared.heads = keep_gradients(peft), nn.ModuleDict()
        name = peft.active_adapter
        config = _for_causal_lm(peft.peft_config[name])
        state = get_peft_model_state_dict(peft, adapter_name=name)
        shared.add_adapter("policy", config, state)
        shared.add_adapter("reference", config, state)
        peft.set_adapter("policy")  # for a trainer without roles
        peft.delete_adapter(name)
        shared._set_trainable()
        return shared

    @property
    def model(self) -> nn.Module:
        """The causal language model; ``role`` selects its role."""
        return self.peft.get_base_model()

    @property
    def reference(self) -> str | None:
        """The reference policy's adapter, or None if the bare base is the reference."""
        return "reference" if "reference" in self.peft.peft_config else None

    def compare_with(self, folder: str | Path | None) -> None:
        """Change the reference: the adapter in a folder, or the bare base."""
        set_reference(self.peft, "reference", folder)
        self._set_trainable()

    def role(self, name: str | None):
        """Context manager: the model has this role inside. None is the bare base."""
        if name is not None and name not in self.peft.peft_config:
            raise KeyError(f"no role '{name}'; there are {sorted(self.peft.peft_config)}")
        return active_adapter(self.peft, name)

    def add_adapter(self, name: str, config: PeftConfig, state: dict[str, torch.Tensor] | None = None) -> None:
        """Add an adapter, new or with given weights."""
        self.peft.add_adapter(name, config)
        if state is not None:
            set_peft_model_state_dict(self.peft, state, adapter_name=name)
        self._set_trainable()

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Add an adapter from a folder written by PEFT; ``role(name)`` activates it.

        Raises:
            UserError: There is none, or it does not fit this base.
        """
        self._load(name, _read_config(folder), _read_state(folder), folder)

    def _load(self, name: str, config: PeftConfig, state: dict[str, torch.Tensor], folder: str | Path) -> None:
        try:
            self.peft.add_adapter(name, _for_causal_lm(config))
            unknown = set_peft_model_state_dict(self.peft, state, adapter_name=name).unexpected_keys
        except (RuntimeError, ValueError) as error:  # a shape mismatch, or no layer of that name
            raise UserError(f"The adapter does not fit this base: {error}", where=str(folder)) from None
        if unknown:
            what = f"The adapter does not fit this base: it holds weights for {len(unknown)} more layers"
            raise UserError(f"{what}, such as {unknown[0]}.", where=str(folder))
        self._set_trainable()

    def add_value(self, *, trunk: bool = False) -> ValueView:
        """Add the value role: an adapter like the policy's, and a head initialized to zero.

        Args:
            trunk: Only the head, on the policy's own hidden states.
        """
        if "value" not in self.heads:
            if not trunk:
                self.add_adapter("value", self.peft.peft_config["policy"])
            self.heads["value"] = self._head()
        return ValueView(self)

    def save_value(self, folder: Path) -> None:
        """Write the value's head, and its adapter if it has its own, for ``load_value``."""
        folder.mkdir(parents=True, exist_ok=True)
        if "value" in self.peft.peft_config:
            save_adapter(self.peft, "value", folder)
        save_file({"weight": self.heads["value"].weight.detach().cpu()}, folder / HEAD_FILE)

    def load_value(self, folder: Path) -> None:
        """Add the value role from ``save_value``'s files instead of a new one; its training continues.

        Raises:
            UserError: It does not fit this base.
        """
        if (folder / ADAPTER_FILE).exists():
            self.load_adapter("value", folder)
        self.heads["value"] = self._head()
        self.heads["value"].load_state_dict(load_file(folder / HEAD_FILE))

    def add_reward(self, folder: str | Path) -> None:
        """Add the reward role from a folder written by the reward stage or ``RewardTrainer``.

        Raises:
            UserError: The folder holds no adapter with a score head, or it does not fit this base.
        """
        config, state = _read_config(folder), _read_state(folder)
        score = [k for k in state if k.endswith("score.weight")]
        if not score:
            raise UserError("The reward adapter has no score head.", where=str(folder))
        weight = state.pop(score[0])
        head = self._head(len(weight))  # two outputs, if there is an e(x)
        if weight.shape != head.weight.shape:
            raise UserError(
                f"The reward head expects {weight.shape[-1]} features, the base has {head.weight.shape[-1]}: "
                "it was trained on another model.",
                where=str(folder),
            )
        head.weight.data.copy_(weight)
        self._load("reward", config, state, folder)
        self.heads["reward"] = head.requires_grad_(False)

    def hidden(self, role: str | None, **inputs: torch.Tensor) -> torch.Tensor:
        """Last hidden states under a role: (batch, sequence, hidden), in the base's dtype."""
        with self.role(role):
            return backbone(self.peft)(**inputs, use_cache=False).last_hidden_state

    def head(self, role: str, hidden: torch.Tensor) -> torch.Tensor:
        """A role's head on hidden states: (..., H) to (..., outputs), float32."""
        head = self.heads[role]
        return head(hidden.to(head.weight.dtype))

    def _head(self, outputs: int = 1) -> nn.Linear:
        embedding = self.model.get_input_embeddings().weight
        width = self.model.config.get_text_config().hidden_size
        head = nn.Linear(width, outputs, bias=False, device=embedding.device)
        nn.init.zeros_(head.weight)
        return head

    def _set_trainable(self) -> None:
        """Enable gradients only for policy and value. PEFT changes this whenever it adds an adapter."""
        for name, parameter in self.peft.named_parameters():
            parameter.requires_grad_(".policy." in name or ".value." in name)


class ValueView(nn.Module):
    """The value role of a shared base, in the form of a value model for TRL's trainer."""

    base_model_prefix = "backbone"

    def __init__(self, shared: SharedBase) -> None:
        super().__init__()
        self.score = shared.heads["value"]
        # Not a submodule: the base belongs to the policy, and must not be saved or moved twice.
        role = "value" if "value" in shared.peft.peft_config else "policy"
        self.backbone = lambda **inputs: shared.hidden(role, **inputs)


def _for_causal_lm(config: PeftConfig) -> PeftConfig:
    """The adapter's configuration without its classifier-specific parts."""
    config = type(config)(**{**config.to_dict(), "task_type": "CAUSAL_LM", "modules_to_save": None})
    config.inference_mode = False
    return config


def _read_config(folder: str | Path) -> PeftConfig:
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"There is no PEFT adapter: {error}", where=str(folder)) from None


def _read_state(folder: str | Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(Path(folder) / ADAPTER_FILE)
    except Exception as error:  # safetensors has its own exception type for a broken file
        raise UserError(f"The adapter cannot be read: {error}", where=str(Path(folder) / ADAPTER_FILE)) from None
