"""PPO on CPU tensors that say they are on a GPU: which operations would mix devices there, and which make the CPU wait.

    PYTHONPATH=. python benchmarks/gpu/pretend.py

No GPU is needed. For every phase of an update it prints, by line, operations on tensors of both devices ("mixed": a GPU
refuses them) and those that read a value on the CPU ("waits").
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from trl_rlaif.models.role_models import SharedRoleModels
from trl_rlaif.models.shared_model import SharedBase
from trl_rlaif.responses import ResponseReader
from trl_rlaif.rl.generation import RolloutGenerator
from trl_rlaif.rl.ppo.update_step import MicroBatch, PPOStep, divisors_of
from trl_rlaif.rl.prompts import PromptCollator
from trl_rlaif.testing.models import make_llama, make_tokenizer

_setup_privateuseone_for_python_backend("pretend")
DEVICE = torch.device("pretend", 0)
# These take an index or a source from the CPU on a GPU, too.
_TAKES_BOTH = {"index", "index_put", "index_put_", "_index_put_impl_", "copy_", "_to_copy", "_unsafe_index", "copy"}
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal"}
_MAKE = torch.tensor  # makes its result without a dispatch
mixed: Counter[tuple[str, str]] = Counter()
waits: Counter[tuple[str, str]] = Counter()


class Pretended(torch.Tensor):
    """A CPU tensor behind a device of another name."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Pretended:
        kept = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "layout": inner.layout}
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), dtype=inner.dtype, device=DEVICE, **kept)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def tolist(self) -> Any:
        """As of a tensor; the CPU waits for it."""
        waits["tolist", _line()] += 1
        return self.inner.tolist()

    def new_tensor(self, data: Any, *, dtype: Any = None, **_: Any) -> Pretended:
        """As of a tensor."""
        return Pretended(_MAKE(data, dtype=dtype or self.dtype))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class Pretending(TorchDispatchMode):
    """Inside, tensors that are made on ``DEVICE`` are ``Pretended``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


def _line() -> str:
    frames = (f for f in reversed(traceback.extract_stack()) if "/trl_rlaif/" in f.filename)
    return next((f"{f.filename.split('/trl_rlaif/')[-1]}:{f.lineno} {f.line}" for f in frames), "elsewhere")


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, tensors = func.overloadpacket.__name__, [x for x in tree_flatten((args, kwargs))[0] if _is_tensor(x)]
    pretended = [x for x in tensors if isinstance(x, Pretended)]
    there = bool(pretended)
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == "pretend"
        kwargs = {**kwargs, "device": "cpu"}
    if pretended and name not in _TAKES_BOTH and any(not isinstance(x, Pretended) and x.dim() for x in tensors):
        mixed[name, _line()] += 1
    by_mask = name.startswith("index") and any(x.dtype == torch.bool for x in tensors)
    if pretended and (name in _WAITS or by_mask or (name == "_to_copy" and not there)):
        waits[name, _line()] += 1
    if name == "_fused_sdp_choice":
        return 0
    there = isinstance(args[0], Pretended) if name == "copy_" else there and name != "_local_scalar_dense"
    found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if name.endswith("_") and not name.startswith("_") and _is_tensor(args[0]):
        return args[0]
    return tree_map(lambda x: Pretended(x) if _is_tensor(x) and not isinstance(x, Pretended) else x, found) if (
        there
    ) else found  # fmt: skip


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Pretended) else value


def move(model: nn.Module) -> nn.Module:
    """The model with its parameters and buffers on ``DEVICE``."""
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[name] = nn.Parameter(Pretended(p.data), requires_grad=p.requires_grad)
        for name, b in list(module._buffers.items()):
            if b is not None:
                module._buffers[name] = Pretended(b)
    return model


def _tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
    found = _MAKE(data, *args, **kwargs)
    return Pretended(found) if device is not None and torch.device(device).type == "pretend" else found


def phase(name: str, run: Callable[[], Any]) -> Any:
    """Run one phase, print what was seen, and give back its result."""
    mixed.clear(), waits.clear()
    with Pretending():
        found = run()
    print(f"== {name}: {sum(mixed.values())} mixed, {sum(waits.values())} waits")
    for what, seen in (("MIXED", mixed), ("waits", waits)):
        for (operation, line), count in seen.most_common():
            print(f"  {what} {count:4} {operation:<22} {line}")
    return found


def main() -> None:
    """Draw, score and update once, on a tiny shared base."""
    tokenizer, torch.tensor = make_tokenizer(), _tensor
    type(torch.pretend).get_amp_supported_dtype = lambda self: [torch.bfloat16]
    shared = SharedBase(make_llama(hidden_size=64), LoraConfig(r=4, target_modules="all-linear"))
    shared.add_value()
    shared.heads["reward"] = shared._head().requires_grad_(False)
    shared.add_adapter("reward", shared.peft.peft_config["policy"])
    roles = SharedRoleModels(move(shared))
    args = SimpleNamespace(
        temperature=1.0, generation="transformers", bf16=False, response_length=6, local_rollout_forward_batch_size=2,
        per_device_train_batch_size=2, micro_batch_tokens=40, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1,
        score_at_end=True,
    )  # fmt: skip
    accelerator = SimpleNamespace(
        device=DEVICE, gradient_accumulation_steps=1, num_processes=1, distributed_type="NO", sync_gradients=True,
        backward=lambda loss: loss.backward(), gather=lambda x: x, reduce=lambda x, how: x,
    )  # fmt: skip
    generator = RolloutGenerator(args, accelerator, ResponseReader(tokenizer, (tokenizer.eos_token_id,)))
    generator._unverified.clear()  # verification compares on the CPU
    rows = [{"input_ids": torch.randint(3, 300, (n,)).tolist(), "category": "a"} for n in (5, 9, 4, 7)]
    rollout = phase("generation", lambda: generator.draw(roles, PromptCollator(tokenizer)(rows)))
    phase("scores", lambda: generator.scores(roles, rollout))

    def update() -> None:
        parts = torch.arange(4).split(2)
        learned = torch.zeros_like(rollout.values)
        for part, divisors in zip(parts, divisors_of(rollout, parts, accelerator), strict=True):
            PPOStep(roles, accelerator, args, 1.0).backward(MicroBatch(rollout, learned, learned, part, divisors))

    phase("update", update)


if __name__ == "__main__":
    main()
