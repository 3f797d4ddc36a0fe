"""What the stage rl holds, by its algorithm."""

from __future__ import annotations

from collections.abc import Iterator

from trl_rlaif.memory.activations import FLOAT32
from trl_rlaif.memory.counting import ModelShape
from trl_rlaif.memory.parts import Run, generation, judge_pass, trained, update
from trl_rlaif.memory.plan import ALWAYS, Part
from trl_rlaif.memory.settings import rl_batch, setting

# Of prompt and response, where DPO's recipe does not say (TRL's default).
DPO_LENGTH = 1024


def rl(run: Run) -> list[Part]:
    """By the recipe's algorithm; those of TRL's own trainers were not measured on a GPU."""
    algorithm = run.recipe.rl.algorithm
    if algorithm == "dpo":
        return _dpo(run)
    parts = _groups(run) if algorithm in ("rloo", "grpo") else _ppo(run)
    rewards = run.recipe.rl.rewards
    if "direct" in rewards:
        parts += judge_pass(run, run.recipe.label.judge if run.recipe.label else "same", alone=False)
    functions = [name for name in rewards if name not in ("reward", "direct")]
    if functions:
        run.notes.append(f"What {', '.join(functions)} needs on the GPU is not counted.")
    return parts


def _ppo(run: Run) -> list[Part]:
    """PPO on one base: generation, passes without gradient, update."""
    from trl_rlaif.ppo.cache import BLOCK

    recipe = run.recipe
    rows, response = (setting(recipe, "rl", key) for key in ("per_device_train_batch_size", "response_length"))
    prompt, activations = run.prompt, run.activations("rl")
    length = run.within(prompt + response)
    at_once = min(rl_batch(recipe), setting(recipe, "rl", "local_rollout_forward_batch_size") or 64)
    chunk = min(_head_chunk(run.shape), rows * response)
    hidden = rows * length * activations.precision.stream * run.shape.hidden
    # An update takes a micro-batch in parts where the recipe limits their tokens.
    limit = setting(recipe, "rl", "micro_batch_tokens")
    part = max(1, min(rows, limit // length)) if limit else rows
    learned = min(chunk, part * response)
    return [
        *_roles(run),
        *generation(activations, at_once, prompt, response, BLOCK),
        Part(f"a pass without gradient, {rows} x {length} tokens", activations.live(rows, length),
             "scoring: layers", ""),
        Part("last hidden states", hidden, "scoring: output head", ""),
        Part(f"output head, {chunk} tokens at a time", activations.head(chunk, gradient=False),
             "scoring: output head", ""),
        *update(activations, part, length, bool(setting(recipe, "rl", "gradient_checkpointing")),
                 activations.head(learned, gradient=True), learned),
    ]  # fmt: skip


def _head_chunk(shape: ModelShape) -> int:
    """Tokens whose logits the loop computes at once; a whole response's would be the largest tensor of the run."""
    from trl_rlaif.compute.head import HEAD_ELEMENTS

    return max(16, HEAD_ELEMENTS // shape.vocab)


def _roles(run: Run) -> Iterator[Part]:
    """The base with the adapters and heads of every role."""
    recipe = run.recipe
    yield from run.base(held=bool(setting(recipe, "rl", "bf16")))
    tensors, what = run.adapter.tensors, "policy adapter and value head"
    if (setting(recipe, "rl", "value") or "adapter") == "adapter":
        tensors, what = tensors * 2, "policy and value adapters"
    yield from trained(run, "rl", what, (*tensors, run.shape.hidden), FLOAT32)
    yield from _frozen(run)


def _frozen(run: Run) -> Iterator[Part]:
    """The adapters that only score."""
    frozen = {"reward": "reward" in run.recipe.rl.rewards, "reference": run.recipe.sft is not None}
    for role, there in frozen.items():
        yield Part(f"{role} adapter (frozen)", there * FLOAT32 * run.adapter.numel, ALWAYS, "")


def _groups(run: Run) -> list[Part]:
    """RLOO and GRPO by TRL's trainers on a base that is held as PPO's: the logits of all responses at once."""
    recipe = run.recipe
    _say_unmeasured(run)
    rows, response = (setting(recipe, "rl", key) for key in ("per_device_train_batch_size", "response_length"))
    prompt, activations = run.prompt, run.activations("rl", adapter_item=_held(run))
    length, tokens = run.within(prompt + response), rows * response
    scored = f"a pass without gradient, {rows} x {length} tokens"
    return [
        *run.base(held=bool(setting(recipe, "rl", "bf16"))),
        *_learning(run),
        *_frozen(run),
        *generation(activations, rl_batch(recipe), prompt, response),
        Part(scored, activations.live(rows, length), "scoring: layers", ""),
        Part(f"logits of {rows} x {response} tokens", activations.head(tokens, gradient=False),
             "scoring: output head", ""),
        *update(activations, rows, length, bool(setting(recipe, "rl", "gradient_checkpointing")),
                activations.head(tokens, gradient=True), tokens),
    ]  # fmt: skip


def _dpo(run: Run) -> list[Part]:
    """DPO by TRL's trainer: chosen and rejected are rows of one batch, the logits of all their tokens at once."""
    recipe = run.recipe
    _say_unmeasured(run)
    rows = 2 * setting(recipe, "rl", "per_device_train_batch_size")
    length = run.within(recipe.rl.config.get("max_length") or DPO_LENGTH)
    activations = run.activations("rl", adapter_item=_held(run), lean=False)
    checkpointing, tokens = bool(setting(recipe, "rl", "gradient_checkpointing")), rows * length
    started = recipe.sft is not None
    return [
        *run.base(),
        *_learning(run),
        Part("reference adapter (frozen)", started * _held(run) * run.adapter.numel, ALWAYS, ""),
        *update(activations, rows, length, checkpointing, activations.head(tokens, gradient=True), tokens),
    ]


def _say_unmeasured(run: Run) -> None:
    run.notes.append(f"The plan of rl.algorithm: {run.recipe.rl.algorithm} was compared with tensors on a CPU alone.")


def _held(run: Run) -> int:
    """Bytes of an adapter's weight: TRL holds the adapter of a 4-bit base in bfloat16."""
    return 2 if run.nf4 else FLOAT32


def _learning(run: Run) -> Iterator[Part]:
    yield from trained(run, "rl", "policy adapter", run.adapter.tensors, _held(run))
