"""What each stage holds: the parts that are there always, and those of each phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from trl_rlaif.algorithms import ALGORITHMS
from trl_rlaif.memory.activations import FLOAT32, Activations, Precision
from trl_rlaif.memory.counting import Adapter, ModelShape, adapter, optimizer_bytes, weight_bytes
from trl_rlaif.memory.plan import ALWAYS, Part
from trl_rlaif.memory.settings import rl_batch, setting
from trl_rlaif.recipe import JudgeSection, Recipe

# Prompts are this long where the recipe sets no limit.
ASSUMED_PROMPT = 512
# Tokens that a judge computes at once where no section says, and TRL's chunk of its fine-tuning loss.
JUDGE_TOKENS, SFT_CHUNK = 8192, 256


@dataclass
class Run:
    """A recipe with the shapes of its models; assumptions are collected in ``notes``.

    Args:
        recipe: The recipe.
        shape: The base.
        judge: A local judge that is another model.
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
        """Type of all weights that are not quantized."""
        if self.recipe.model.dtype != "auto":
            return self.recipe.model.dtype
        if self.shape.dtype is None:
            self.notes.append("The model's configuration names no dtype: its weights are taken as bfloat16.")
        return self.shape.dtype or "bfloat16"

    @property
    def item(self) -> int:
        """Its bytes."""
        return FLOAT32 if self.dtype == "float32" else 2

    @cached_property
    def adapter(self) -> Adapter:
        """The adapter of each role."""
        return adapter(self.shape, self.recipe.model.lora)

    def activations(self, stage: str | None, *, adapter_item: int = FLOAT32, bare: bool = False) -> Activations:
        """Activations of a training stage; without one, of inference without autocast."""
        autocast = bool(setting(self.recipe, stage, "bf16")) if stage else False
        precision = Precision(self.item, autocast, self.nf4, adapter_item, lean=stage == "rl")
        return Activations(self.shape, None if bare else self.adapter, precision)

    @property
    def prompt(self) -> int:
        """Longest prompt in tokens."""
        limit = setting(self.recipe, "rl", "max_prompt_length") if self.recipe.rl else None
        if limit is None:
            limit = ASSUMED_PROMPT
            self.notes.append(f"Prompts are taken to have {limit} tokens at most; rl.max_prompt_length makes it so.")
        return limit

    def within(self, length: int) -> int:
        """A length, at most the model's context."""
        return min(length, self.shape.context or length)

    def base(self, *, head: bool = True, held: bool = False) -> Iterator[Part]:
        """The frozen base; ``held``: as PPO holds it under autocast."""
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


def _trained(run: Run, stage: str, what: str, tensors: tuple[int, ...], item: int) -> Iterator[Part]:
    """Weights, gradients and optimizer states of what a stage trains."""
    optim = setting(run.recipe, stage, "optim")
    optim = getattr(optim, "value", optim)  # transformers' default is an enum
    size = item * sum(tensors)
    resident, paged = optimizer_bytes(optim, tensors, item)
    yield Part(f"{what}: weights", size, ALWAYS, "")
    yield Part(f"{what}: gradients", size, ALWAYS, "")
    yield Part(f"{what}: optimizer states ({optim})", resident, ALWAYS, "")
    yield Part(f"{what}: optimizer states ({optim})", paged, ALWAYS, "", paged=True)


def _backward(activations: Activations, rows: int, length: int, checkpointing: bool) -> Iterator[Part]:
    """The update without an output head."""
    kept = activations.kept(rows, length, checkpointing=checkpointing)
    peak = activations.peak(rows, length, checkpointing=checkpointing)
    size = f"{rows} x {length} tokens"
    how = f"hidden states, one a layer, {size}" if checkpointing else f"activations of all layers, {size}"
    yield Part(how, kept, "update: layers", "")
    yield Part("one layer, computed again" if checkpointing else "their gradients", peak - kept, "update: layers", "")


def _update(
    activations: Activations, rows: int, length: int, checkpointing: bool, head: int, chunk: int
) -> Iterator[Part]:
    """The update with an output head, a chunk of tokens at a time."""
    yield from _backward(activations, rows, length, checkpointing)
    # The last hidden state waits for the gradient that the head's chunks fill in.
    hidden = rows * length * activations.precision.stream * activations.shape.hidden
    yield Part("gradient of the last hidden state", hidden, "update: layers", "")
    kept = activations.kept(rows, length, checkpointing=checkpointing)
    how = "hidden states, one a layer" if checkpointing else "activations of all layers"
    yield Part(f"{how}, {rows} x {length} tokens", kept + hidden, "update: output head", "")
    yield Part(f"output head, {chunk} tokens at a time", head, "update: output head", "")


def _generation(activations: Activations, rows: int, prompt: int, response: int, block: int = 1) -> Iterator[Part]:
    cache = activations.cache(rows, -(-(prompt + response) // block) * block)
    for when in ("generation: prompts", "generation: tokens"):
        yield Part(f"keys and values, {rows} x ({prompt} + {response}) tokens", cache, when, "")
    yield Part("activations of the prompts", activations.live(rows, prompt), "generation: prompts", "")
    step = activations.step_logits(rows) + activations.live(rows, 1)
    # A cache that grows is copied a layer at a time.
    yield Part("one step, with its logits", step + cache // activations.shape.layers, "generation: tokens", "")


def sft(run: Run) -> list[Part]:
    """Fine-tuning with TRL's trainer, rows as long as max_length."""
    recipe, item = run.recipe, 2 if run.nf4 else FLOAT32  # TRL holds the adapter of a 4-bit base in bfloat16
    rows = setting(recipe, "sft", "per_device_train_batch_size")
    length = run.within(setting(recipe, "sft", "max_length") or 1024)
    activations = run.activations("sft", adapter_item=item)
    chunked = setting(recipe, "sft", "loss_type") in (None, "chunked_nll")
    chunk = min(SFT_CHUNK, rows * length) if chunked else rows * length
    head = activations.sft_head(chunk) if chunked else activations.head(chunk, gradient=True)
    checkpointing = bool(setting(recipe, "sft", "gradient_checkpointing"))
    return [
        *run.base(),
        *_trained(run, "sft", "adapter", run.adapter.tensors, item),
        *_update(activations, rows, length, checkpointing, head, chunk),
    ]


def sample(run: Run) -> list[Part]:
    """Responses of the start."""
    section = run.recipe.sample
    parts = [*run.base()]
    if run.recipe.sft:
        parts.append(Part("adapter of the start", FLOAT32 * run.adapter.numel, ALWAYS, ""))
    response = run.within(section.max_new_tokens)
    return parts + [*_generation(run.activations(None), section.batch_size, run.prompt, response)]


def label(run: Run) -> list[Part]:
    """The judge on the pairs."""
    return [*_judge(run, run.recipe.label.judge, alone=True)]


def reward(run: Run) -> list[Part]:
    """The reward adapter with TRL's trainer: both responses of a pair are rows."""
    recipe, item = run.recipe, 2 if run.nf4 else FLOAT32
    rows = 2 * setting(recipe, "reward", "per_device_train_batch_size")
    longest = setting(recipe, "reward", "max_length")
    if recipe.sample is not None:
        made = run.prompt + recipe.sample.max_new_tokens
        longest = made if longest is None else min(made, longest)
    length = run.within(longest or 1024)
    checkpointing = bool(setting(recipe, "reward", "gradient_checkpointing"))
    return [
        *run.base(head=False),
        *_trained(run, "reward", "adapter and head", (*run.adapter.tensors, run.shape.hidden), item),
        *_backward(run.activations("reward", adapter_item=item), rows, length, checkpointing),
    ]


def rl(run: Run) -> list[Part]:
    """PPO on one base: generation, passes without gradient, update."""
    from trl_rlaif.models.kernels import BLOCK

    recipe = run.recipe
    rows, response = (setting(recipe, "rl", key) for key in ("per_device_train_batch_size", "response_length"))
    prompt, activations = run.prompt, run.activations("rl")
    length = run.within(prompt + response)
    at_once = min(rl_batch(recipe), setting(recipe, "rl", "local_rollout_forward_batch_size") or 64)
    chunk = min(_head_chunk(run.shape), rows * response)
    hidden = rows * length * activations.precision.stream * run.shape.hidden
    # An update takes a micro-batch in parts where the recipe limits their tokens.
    limit = setting(recipe, "rl", "micro_batch_tokens")
    trained = max(1, min(rows, limit // length)) if limit else rows
    learned = min(chunk, trained * response)
    parts = [
        *_roles(run),
        *_generation(activations, at_once, prompt, response, BLOCK),
        Part(f"a pass without gradient, {rows} x {length} tokens", activations.live(rows, length),
             "scoring: layers", ""),
        Part("last hidden states", hidden, "scoring: output head", ""),
        Part(f"output head, {chunk} tokens at a time", activations.head(chunk, gradient=False),
             "scoring: output head", ""),
        *_update(activations, trained, length, bool(setting(recipe, "rl", "gradient_checkpointing")),
                 activations.head(learned, gradient=True), learned),
    ]  # fmt: skip
    if ALGORITHMS[recipe.rl.algorithm].config:
        run.notes.append(
            f"rl.algorithm: {recipe.rl.algorithm} is planned as PPO on the same base; TRL's trainer may differ."
        )
    if "direct" in recipe.rl.reward_names:
        parts += _judge(run, recipe.label.judge if recipe.label else "same", alone=False)
    functions = [name for name in recipe.rl.reward_names if name not in ("reward", "direct")]
    if functions:
        run.notes.append(f"What {', '.join(functions)} needs on the GPU is not counted.")
    return parts


def _head_chunk(shape: ModelShape) -> int:
    """Tokens whose logits the loop computes at once; a whole response's would be the largest tensor of the run."""
    from trl_rlaif.models.kernels import HEAD_ELEMENTS

    return max(16, HEAD_ELEMENTS // shape.vocab)


def _roles(run: Run) -> Iterator[Part]:
    """The base with the adapters and heads of every role."""
    recipe = run.recipe
    frozen = {"reward": "reward" in recipe.rl.reward_names, "reference": recipe.sft is not None}
    yield from run.base(held=bool(setting(recipe, "rl", "bf16")))
    tensors, what = run.adapter.tensors, "policy adapter and value head"
    if (setting(recipe, "rl", "value") or "adapter") == "adapter":
        tensors, what = tensors * 2, "policy and value adapters"
    yield from _trained(run, "rl", what, (*tensors, run.shape.hidden), FLOAT32)
    for role, there in frozen.items():
        yield Part(f"{role} adapter (frozen)", there * FLOAT32 * run.adapter.numel, ALWAYS, "")


def _judge(run: Run, judge: object, *, alone: bool) -> Iterator[Part]:
    """A judge's forward passes, and its weights where it is a model of its own or there is nothing else."""
    section = run.recipe.label
    tokens = section.batch_tokens if section else JUDGE_TOKENS
    if isinstance(judge, JudgeSection) and run.judge is not None:
        dtype = run.judge.dtype or "bfloat16" if judge.dtype == "auto" else judge.dtype
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
    yield Part(f"a pass of the judge, {tokens} tokens", activations.live(1, tokens), "judging", "")


def evaluate(run: Run) -> list[Part]:
    """Responses of the policy and the start, rewards, and the judge, on one base."""
    recipe, section = run.recipe, run.recipe.evaluate
    adapters = 1 + (recipe.sft is not None) + ("reward" in recipe.rl.reward_names)
    response = section.max_new_tokens or recipe.rl.config.get("response_length")
    response = response or (recipe.sample.max_new_tokens if recipe.sample else 128)
    activations = run.activations(None)
    parts = [*run.base(), Part(f"{adapters} adapters (frozen)", adapters * FLOAT32 * run.adapter.numel, ALWAYS, "")]
    if isinstance(section.judge, JudgeSection):
        run.notes.append("The judge of 'evaluate' is a model of its own, and is not counted.")
    own = [name for name, further in section.judges.items() if isinstance(further.judge, JudgeSection)]
    if own:
        run.notes.append(f"Models of their own among evaluate.judges ({', '.join(own)}) are not counted.")
    rows = max(1, section.batch_size // section.num_responses) * section.num_responses
    return [
        *parts,
        *_generation(activations, rows, run.prompt, response),
        Part(f"a pass of the reward model or judge, {JUDGE_TOKENS} tokens", activations.live(1, JUDGE_TOKENS),
             "judging", ""),
    ]  # fmt: skip


STAGE_PARTS: dict[str, Callable[[Run], list[Part]]] = {
    "sft": sft,
    "sample": sample,
    "label": label,
    "reward": reward,
    "rl": rl,
    "evaluate": evaluate,
}
