"""What each stage holds: the parts that are there always, and those of each phase."""

from __future__ import annotations

from collections.abc import Callable

from trl_rlaif.memory.activations import FLOAT32
from trl_rlaif.memory.parts import JUDGE_TOKENS, Run, backward, generation, judge_pass, trained, update
from trl_rlaif.memory.plan import ALWAYS, Part
from trl_rlaif.memory.rl import rl
from trl_rlaif.memory.settings import setting
from trl_rlaif.recipe import JudgeSection

# TRL's chunk of its fine-tuning loss, in tokens.
SFT_CHUNK = 256


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
        *trained(run, "sft", "adapter", run.adapter.tensors, item),
        *update(activations, rows, length, checkpointing, head, chunk),
    ]


def sample(run: Run) -> list[Part]:
    """Responses of the start."""
    section = run.recipe.sample
    parts = [*run.base()]
    if run.recipe.sft:
        parts.append(Part("adapter of the start", FLOAT32 * run.adapter.numel, ALWAYS, ""))
    response = run.within(section.max_new_tokens)
    return parts + [*generation(run.activations(None), section.batch_size, run.prompt, response)]


def label(run: Run) -> list[Part]:
    """The judge on the pairs."""
    return [*judge_pass(run, run.recipe.label.judge, alone=True)]


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
        *trained(run, "reward", "adapter and head", (*run.adapter.tensors, run.shape.hidden), item),
        *backward(run.activations("reward", adapter_item=item), rows, length, checkpointing),
    ]


def evaluate(run: Run) -> list[Part]:
    """Responses of the policy and the start, rewards, and the judge, on one base."""
    recipe, section = run.recipe, run.recipe.evaluate
    adapters = 1 + (recipe.sft is not None) + ("reward" in recipe.rl.rewards)
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
        *generation(activations, rows, run.prompt, response),
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
