"""Memory of the stages by part: permanent ones, and those of a phase."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from trl_rlaif.memory.activations import FLOAT32, Activations, Precision
from trl_rlaif.memory.counting import Adapter, ModelShape, adapter, optimizer_bytes, weight_bytes
from trl_rlaif.memory.plan import ALWAYS, Part
from trl_rlaif.memory.settings import rl_batch, rl_rows, setting
from trl_rlaif.recipe import JudgeSection, Recipe, VLLMJudgeSection

# Assumed length of prompts if the recipe sets no limit.
ASSUMED_PROMPT = 512
# Tokens per batch of a judge if no section sets them.
JUDGE_TOKENS = 8192


@dataclass
class MemoryRun:
    """A recipe with the shapes of its models; assumptions are collected in ``notes``.

    Args:
        recipe: The recipe.
        shape: Shape of the base.
        judge: Shape of a local judge that is a separate model.
    """

    recipe: Recipe
    shape: ModelShape
    judge: ModelShape | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def nf4(self) -> bool:
        """Whether the base is quantized."""
        return self.recipe.model.quantization == "nf4"

    @property
    def dtype(self) -> str:
        """Dtype of all weights that are not quantized; auto counts as bfloat16."""
        return "bfloat16" if self.recipe.model.dtype == "auto" else self.recipe.model.dtype

    @property
    def item(self) -> int:
        """Bytes per element of this dtype."""
        return FLOAT32 if self.dtype == "float32" else 2

    def setting(self, stage: str, key: str) -> Any:
        """The value of a key of ``sft``, ``reward`` or ``rl``; None if it is not set."""
        return setting(self.recipe, stage, key)

    @cached_property
    def adapter(self) -> Adapter:
        """The adapter of each role."""
        return adapter(self.shape, self.recipe.model.lora)

    def activations(self, stage: str | None, *, bare: bool = False) -> Activations:
        """Activations of a training stage; if None, of inference without autocast."""
        autocast = bool(self.setting(stage, "bf16")) if stage else False
        precision = Precision(self.item, autocast, self.nf4, lean=stage == "rl")
        return Activations(self.shape, None if bare else self.adapter, precision)

    def generating(self, *, adapters: bool) -> Activations:
        """Activations of sampling and evaluation, which use autocast with adapters on 16-bit weights."""
        if not (adapters and self.item == 2):
            return self.activations(None, bare=not adapters)
        return Activations(self.shape, self.adapter, Precision(2, True, self.nf4, lean=True))

    @property
    def prompt(self) -> int:
        """Longest prompt in tokens."""
        limit = self.setting("rl", "max_prompt_length") if self.recipe.rl else None
        if limit is None:
            limit = ASSUMED_PROMPT
            self.notes.append(f"Prompts are taken to have {limit} tokens at most; rl.max_prompt_length makes it so.")
        return limit

    def within(self, length: int) -> int:
        """A length, capped at the model's context."""
        return min(length, self.shape.context or length)

    def base(self, *, head: bool = True, held: bool = False) -> Iterator[Part]:
        """The frozen base; ``held``: cast as in PPO under autocast."""
        held = held and self.item == FLOAT32
        dtype = f"{self.dtype}, linear layers bfloat16" if held else self.dtype
        sizes = weight_bytes(self.shape, nf4=self.nf4, item=self.item, head=head, held=held)
        yield from _weights(self.shape, self.nf4, sizes, self.item, dtype, "base")


def _weights(shape: ModelShape, nf4: bool, sizes: tuple[int, int], item: int, dtype: str, what: str) -> Iterator[Part]:
    quantized, rest = sizes
    if not nf4:
        yield Part(f"{what}: weights ({dtype})", rest, ALWAYS, "")
        return
    yield Part(f"{what}: weights (NF4, double quantization)", quantized, ALWAYS, "")
    yield Part(f"{what}: embeddings, norms and output head ({dtype})", rest, ALWAYS, "")
    largest = max((x.numel for x in shape.quantizable), default=0)
    yield Part(f"{what}: one 4-bit weight, dequantized for a product", item * largest, ALWAYS, "")


LAYERS, HEAD = "update: layers", "update: output head"


def trained(run: MemoryRun, stage: str, what: str, tensors: tuple[int, ...], *, head: bool = True) -> Iterator[Part]:
    """Weights, gradients and optimizer states of a stage's trained tensors; gradients are freed after each update.

    Args:
        head: Whether the update has an output head.
    """
    optim = run.setting(stage, "optim")
    optim = getattr(optim, "value", optim)  # transformers' default is an enum
    size = FLOAT32 * sum(tensors)
    resident, paged = optimizer_bytes(optim, tensors)
    yield Part(f"{what}: weights", size, ALWAYS, "")
    for phase in (LAYERS, HEAD) if head else (LAYERS,):
        yield Part(f"{what}: gradients", size, phase, "")
    yield Part(f"{what}: optimizer states ({optim})", resident, ALWAYS, "")
    yield Part(f"{what}: optimizer states ({optim})", paged, ALWAYS, "", paged=True)


def backward(activations: Activations, rows: int, length: int, checkpointing: bool) -> Iterator[Part]:
    """The update without an output head."""
    kept = activations.kept(rows, length, checkpointing=checkpointing)
    peak = activations.peak(rows, length, checkpointing=checkpointing)
    size = f"{rows} x {length} tokens"
    how = f"hidden states, one a layer, {size}" if checkpointing else f"activations of all layers, {size}"
    yield Part(how, kept, LAYERS, "")
    yield Part("one layer, computed again" if checkpointing else "their gradients", peak - kept, LAYERS, "")


def update(
    activations: Activations, rows: int, length: int, checkpointing: bool, head: int, chunk: int
) -> Iterator[Part]:
    """The update with an output head, a chunk of tokens at a time."""
    yield from backward(activations, rows, length, checkpointing)
    # The head's chunks accumulate the gradient of the last hidden state.
    hidden = rows * length * activations.precision.stream * activations.shape.hidden
    yield Part("gradient of the last hidden state", hidden, LAYERS, "")
    kept = activations.kept(rows, length, checkpointing=checkpointing)
    how = "hidden states, one a layer" if checkpointing else "activations of all layers"
    yield Part(f"{how}, {rows} x {length} tokens", kept + hidden, HEAD, "")
    yield Part(f"output head, {chunk} tokens at a time", head, HEAD, "")


def generation(activations: Activations, rows: int, prompt: int, response: int) -> Iterator[Part]:
    cache = activations.cache(rows, prompt + response)
    for when in ("generation: prompts", "generation: tokens"):
        yield Part(f"keys and values, {rows} x ({prompt} + {response}) tokens", cache, when, "")
    yield Part("activations of the prompts", activations.live(rows, prompt), "generation: prompts", "")
    step = activations.step_logits(rows) + activations.live(rows, 1)
    # A growing cache is copied one layer at a time.
    yield Part("one step, with its logits", step + cache // activations.shape.layers, "generation: tokens", "")


def policy_training(run: MemoryRun) -> list[Part]:
    """PPO on one base: generation, passes without gradient, update."""
    recipe = run.recipe
    rows, response = (run.setting("rl", key) for key in ("per_device_train_batch_size", "response_length"))
    prompt, activations = run.prompt, run.activations("rl")
    length = run.within(prompt + response)
    at_once = min(rl_batch(recipe), run.setting("rl", "local_rollout_forward_batch_size") or 64)
    chunk = min(_head_chunk(run.shape), rows * response)
    hidden = rows * length * activations.precision.stream * run.shape.hidden
    # An update splits a micro-batch if the recipe limits its tokens.
    limit = run.setting("rl", "micro_batch_tokens")
    trained = rl_rows(recipe)
    trained = max(1, min(trained, limit // length)) if limit else trained
    learned = min(chunk, trained * response)
    return [
        *_roles(run),
        *generation(activations, at_once, prompt, response),
        Part(f"a pass without gradient, {rows} x {length} tokens", activations.live(rows, length),
             "scoring: layers", ""),
        Part("last hidden states", hidden, "scoring: output head", ""),
        Part(f"output head, {chunk} tokens at a time", activations.head(chunk, gradient=False),
             "scoring: output head", ""),
        *update(activations, trained, length, bool(run.setting("rl", "gradient_checkpointing")),
                 activations.head(learned, gradient=True), learned),
    ]  # fmt: skip


def _head_chunk(shape: ModelShape) -> int:
    """Tokens per chunk of logits in the loop; those of whole responses would be the largest tensor of the run."""
    from trl_rlaif.models.kernels import HEAD_ELEMENTS

    return max(16, HEAD_ELEMENTS // shape.vocab)


def _roles(run: MemoryRun) -> Iterator[Part]:
    """The base with the adapters and heads of every role."""
    recipe = run.recipe
    frozen = {"reward": "reward" in recipe.rl.reward_names, "reference": _has_reference(recipe)}
    yield from run.base(held=bool(run.setting("rl", "bf16")))
    tensors, what = run.adapter.tensors, "policy adapter and value head"
    if (run.setting("rl", "value") or "adapter") == "adapter":
        tensors, what = tensors * 2, "policy and value adapters"
    yield from trained(run, "rl", what, (*tensors, run.shape.hidden))
    for role, there in frozen.items():
        yield frozen_adapters(run, f"{role} adapter (frozen)", there)


def _has_reference(recipe: Recipe) -> bool:
    """Whether rl's reference is another adapter rather than the bare base."""
    return recipe.sft is not None or (recipe.rounds is not None and recipe.rounds.reference == "previous")


def judging(run: MemoryRun, judge: object, *, alone: bool) -> Iterator[Part]:
    """A judge's forward passes, and its weights if it is a separate model or the only one loaded."""
    section = run.recipe.label
    tokens = section.batch_tokens if section else JUDGE_TOKENS
    if isinstance(judge, VLLMJudgeSection):
        share = judge.gpu_memory_utilization
        run.notes.append(f"A judge in vLLM takes {share:.0%} of the GPU (gpu_memory_utilization), and is not counted.")
        return
    if isinstance(judge, JudgeSection) and run.judge is not None:
        dtype = "bfloat16" if judge.dtype == "auto" else judge.dtype
        item = FLOAT32 if dtype == "float32" else 2
        nf4 = judge.quantization == "nf4"
        yield from _weights(run.judge, nf4, weight_bytes(run.judge, nf4=nf4, item=item), item, dtype, "judge")
        activations = Activations(run.judge, None, Precision(item, False, nf4))
    elif isinstance(judge, str):
        if alone:
            yield from run.base()
        activations = run.activations(None, bare=True)
    else:  # a server
        return
    yield judge_pass("judge", activations, tokens)


def judge_pass(who: str, activations: Activations, tokens: int) -> Part:
    """A forward pass of a judge or a scorer."""
    return Part(f"a pass of the {who}, {tokens} tokens", activations.live(1, tokens), "judging", "")


def frozen_adapters(run: MemoryRun, what: str, count: int) -> Part:
    """Adapters that are not trained."""
    return Part(what, count * FLOAT32 * run.adapter.numel, ALWAYS, "")
