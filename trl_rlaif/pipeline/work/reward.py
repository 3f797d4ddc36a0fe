"""The reward model: a LoRA adapter with a score head, trained on soft labels or human choices."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trl_rlaif.components import numbered
from trl_rlaif.data.overlap import prompt_key
from trl_rlaif.encoding import as_rendered, encode_prompt, encode_response
from trl_rlaif.errors import RunError, UserError
from trl_rlaif.evaluation import category_figures, is_even, outcome_calibration_error, pairwise_accuracy
from trl_rlaif.files import to_line, write_atomically, write_folder
from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.earlier_rewards import accuracy_before, resumed, split, starting_adapter, with_earlier_pairs
from trl_rlaif.pipeline.preferences import preferences_of_people
from trl_rlaif.pipeline.results import RewardResults
from trl_rlaif.pipeline.training import last_checkpoint, settings_of
from trl_rlaif.progress import progress_bar, say
from trl_rlaif.reward.scoring import score_pairs
from trl_rlaif.states import save_state
from trl_rlaif.types import ScoredBatch

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase

    from trl_rlaif.reward.config import RewardConfig


def run(context: Context) -> RewardResults:
    """Train ``reward/``, and write ``reward_scores.jsonl``; return its accuracy on held-out pairs."""
    section, started = context.recipe.reward, time.monotonic()
    left_out = preferences_of_people(context, "reward") if context.recipe.label is None else {}
    config = trainer_config(context)
    train, held_out, too_long = _datasets(context, section.eval_fraction, config.max_length)
    if section.policies:
        train = _with_log_ratios(context, train)
    fresh, earlier = train, 0
    if context.previous:
        train, earlier = with_earlier_pairs(
            context, fresh, held_out, lambda folder: _tokenized(context, folder, config.max_length)[0]
        )
    torch.manual_seed(context.recipe.run.seed)
    trainer = _trainer(context, config, train)
    before = accuracy_before(trainer, fresh, held_out) if starting_adapter(context) else None
    callback = context.callback("reward", "Training the reward model")
    callback.attach(trainer)
    try:
        trainer.train(resume_from_checkpoint=last_checkpoint(config.output_dir))
    finally:
        callback.close()
    write_folder(context.folder / artifacts.REWARD, lambda folder: _save(trainer, context, folder))
    numbers = {
        "train_pairs": len(train),
        "eval_pairs": len(held_out),
        "eval_prompts": len(set(held_out["prompt_key"])),
        "skipped": left_out | too_long,
    }
    if context.previous:
        numbers |= {"earlier_pairs": earlier, "before": before}
    if len(held_out):
        numbers |= _held_out_numbers(context, trainer, held_out)
    return numbers | {"seconds": time.monotonic() - started}


def trainer_config(context: Context) -> RewardConfig:
    """The trainer's settings."""
    from trl_rlaif.reward.config import RewardConfig

    with settings_of(context.recipe, "reward"):
        return RewardConfig(**context.trainer_arguments("reward", context.recipe.reward.config))


def _datasets(
    context: Context, eval_fraction: float, max_length: int | None
) -> tuple[Dataset, Dataset, dict[str, int]]:
    """Tokenized training and held-out pairs, which share no prompt, and the number of pairs that were too long."""
    tokenized, too_long = _tokenized(context, context.folder / artifacts.PREFERENCES, max_length)
    if not len(tokenized):
        raise UserError(
            "There is no usable preference to train on.",
            where=context.recipe.line(("reward",)),
            fix="Give more pairs, or raise reward.max_length.",
        )
    training, held_out = split(context, tokenized["prompt_key"], eval_fraction)
    if eval_fraction and not held_out:
        say(
            "Warning (reward): no pairs are held out. All pairs of a prompt are held out together, and no prompt has "
            f"as few as {eval_fraction:.0%} of the {len(tokenized)} pairs. Raise reward.eval_fraction."
        )
    return tokenized.select(training), tokenized.select(held_out), too_long


def _tokenized(context: Context, folder: Path, max_length: int | None) -> tuple[Dataset, dict[str, int]]:
    """The pairs of a ``preferences/`` folder that are not too long, and the number of those that are."""
    from datasets import load_from_disk

    dataset = load_from_disk(str(folder))
    tokenized = dataset.map(
        lambda row: tokenize_preference(context.tokenizer, row) | {"prompt_key": prompt_key(row["prompt"])},
        remove_columns=[c for c in dataset.column_names if c not in ("p", "category", "human", "margin")],
        load_from_cache_file=False,
    )
    kept = [i for i, row in enumerate(tokenized) if max_length is None or row["length"] <= max_length]
    too_long = {"longer than max_length": len(tokenized) - len(kept)} if len(kept) < len(tokenized) else {}
    return tokenized.select(kept), too_long


def _with_log_ratios(context: Context, train: Dataset) -> Dataset:
    """The training pairs with the initial policy's importance weights against the named policies."""
    from trl_rlaif.models.shared_model import SharedBase
    from trl_rlaif.reward.log_ratios import add_log_ratios

    shared = SharedBase(context.load_base(), context.start or context.lora)
    roles: list[str | None] = []
    for k, folder in enumerate(context.recipe.reward.policies):
        roles.append(None if folder == "base" else f"writer{k}")
        if folder != "base":
            shared.load_adapter(f"writer{k}", folder)

    def as_role(role: str | None) -> Any:
        return lambda: (shared.role(role), shared.model)

    with progress_bar("Importance weights", len(train), unit="pairs") as advance:
        found = add_log_ratios(train, as_role("policy"), [as_role(role) for role in roles])
        advance(len(train))
    return found


def tokenize_preference(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> dict[str, Any]:
    """``chosen_ids`` and ``rejected_ids`` (prompt, response and end token, as in PPO), and their lengths."""
    prompt = encode_prompt(tokenizer, as_rendered(row["prompt"], tokenizer))

    def text(response: Any) -> str:
        return response if isinstance(response, str) else response[0]["content"]

    chosen = prompt + encode_response(tokenizer, text(row["chosen"]))
    rejected = prompt + encode_response(tokenizer, text(row["rejected"]))
    return {
        "chosen_ids": chosen,
        "rejected_ids": rejected,
        "prompt_length": len(prompt),
        "length": max(len(chosen), len(rejected)),
    }


def _trainer(context: Context, config: Any, train: Dataset) -> Any:
    from trl_rlaif.models.loading import load_model
    from trl_rlaif.reward.trainer import RewardTrainer

    torch.set_float32_matmul_precision(context.recipe.model.matmul_precision)
    lora: LoraConfig | None = context.lora
    lora.task_type, lora.modules_to_save = "SEQ_CLS", ["score"]
    model, transforms = load_model(context.model_spec, num_labels=1), context.transforms("reward")
    adapter = starting_adapter(context)
    if adapter is not None:
        names = [ref.name for ref in context.recipe.reward.transforms]
        model, lora = resumed(model, transforms, names, adapter), None
    with settings_of(context.recipe, "reward"):
        return RewardTrainer(
            model=model,
            args=config,
            train_dataset=train,
            processing_class=context.tokenizer,
            peft_config=lora,
            reward_transforms=transforms,
            packing=context.recipe.reward.packing,
            batch_tokens=context.recipe.reward.batch_tokens,
        )


def _save(trainer: Any, context: Context, folder: Path) -> None:
    trainer.model.save_pretrained(str(folder))
    context.tokenizer.save_pretrained(str(folder))
    for ref, transform in zip(context.recipe.reward.transforms, trainer.reward_transforms, strict=True):
        save_state(transform.state_dict(), folder / artifacts.transform_of(ref.name))


def _held_out_numbers(context: Context, trainer: Any, held_out: Dataset) -> RewardResults:
    """The model's results on held-out pairs: ranking accuracy, calibration, and scores by prompt category.

    Accuracy by labels leaves out labels of 0.5; accuracy by human choices, ties and pairs without a choice. Equal
    scores count half.

    Raises:
        RunError: A score is not finite.
    """
    size = trainer.args.per_device_eval_batch_size
    with progress_bar("Scoring held-out pairs", len(held_out), unit="pairs") as advance:
        chosen, rejected, expected = score_pairs(
            trainer.model, held_out, trainer.data_collator, size, trainer.batch_tokens
        )
        advance(len(held_out))
    raw, categories = torch.cat((chosen, rejected)), list(held_out["category"])
    if not raw.isfinite().all():
        raise RunError("The reward model's scores are not finite: its training has diverged.",
                       fix="Lower reward.learning_rate.")  # fmt: skip
    without_end = [
        {**row, "chosen_ids": row["chosen_ids"][:-1], "rejected_ids": row["rejected_ids"][:-1]} for row in held_out
    ]
    cut = torch.cat(score_pairs(trainer.model, without_end, trainer.data_collator, size, trainer.batch_tokens)[:2])
    labels, people = _ranking(chosen.tolist(), rejected.tolist(), held_out)
    names: list[str] = []
    for ref in context.recipe.reward.transforms:
        names.append(numbered(ref.name, names))
    steps = transformed(trainer.reward_transforms, raw, expected, categories)
    figures = [category_figures(scores.tolist(), categories * 2) for scores in steps]
    after = steps[-1] if steps else None
    _write_scores(context.folder / artifacts.REWARD_SCORES, held_out, raw, after)
    return {
        "accuracy": labels["rate"] if labels else None,
        "accuracy_interval": labels["interval"] if labels else None,
        "agreement": people,
        **_calibration(torch.sigmoid(chosen - rejected).tolist(), held_out),
        "scores": category_figures(raw.tolist(), categories * 2)
        | {"accuracy": {name: of["rate"] for name, of in labels["by_category"].items()} if labels else {}},
        "without_end": _without_end(raw, cut),
        "after_each": dict(zip(names, figures, strict=True)),
        "transformed": figures[-1] if figures else None,
    }


def _calibration(p: list[float], held_out: Dataset) -> RewardResults:
    """Calibration error of sigmoid(chosen - rejected) against human choices if there are any, else the soft labels."""
    people = [None if human is None else float(human) for human in held_out["human"]]
    asked = len(people) - people.count(None)
    outcomes = people if asked else list(held_out["p"])
    against, pairs = ("people", asked) if asked else ("labels", len(outcomes))
    return {"ece": outcome_calibration_error(p, outcomes), "ece_against": against, "ece_pairs": pairs}


def _without_end(scores: torch.Tensor, cut: torch.Tensor) -> dict[str, float | None]:
    """Compare scores at the end token with those at the last token before it, where no score is trained.

    The latter are not used: the end token is appended to truncated responses. They show the cost of not doing so.
    """
    both = torch.stack((scores, cut)).double()
    correlation = torch.corrcoef(both)[0, 1].item() if both.std(1).min() > 0 else None
    return {"correlation": correlation, "difference": (both[0] - both[1]).mean().item()}


def _ranking(
    chosen: list[float], rejected: list[float], held_out: Dataset
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Accuracy by labels (overall and by category), and by human choices; None if there are none."""
    columns = (held_out[name] for name in ("category", "prompt_key", "p", "human"))
    rows = list(zip(chosen, rejected, *columns, strict=True))
    sure = [row[:4] for row in rows if not is_even(row[4])]
    asked = [(c, r, of) if human else (r, c, of) for c, r, _, of, _, human in rows if human is not None]
    labels = pairwise_accuracy(*zip(*sure, strict=True)) if sure else None
    if not asked:
        return labels, None
    right, wrong, of = zip(*asked, strict=True)
    return labels, pairwise_accuracy(right, wrong, clusters=of)


def _write_scores(path: Path, held_out: Dataset, raw: torch.Tensor, after: torch.Tensor | None) -> None:
    """Write a line per held-out pair: the model's scores and, with transforms, the scores as PPO gets them."""
    columns = {name: list(held_out[name]) for name in ("prompt_key", "category", "p", "human")}
    columns["chosen"], columns["rejected"] = (half.tolist() for half in raw.chunk(2))
    if after is not None:
        columns["chosen_after"], columns["rejected_after"] = (half.tolist() for half in after.chunk(2))
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    write_atomically(path, "".join(map(to_line, rows)))


def transformed(
    transforms: list[Any], raw: torch.Tensor, expected: torch.Tensor | None, categories: list[str | None]
) -> list[torch.Tensor]:
    """Scores of chosen, then rejected responses after each transform, as PPO gets them."""
    batch = ScoredBatch(
        prompts=[""] * len(raw),
        completions=[""] * len(raw),
        lengths=torch.zeros(len(raw), dtype=torch.int64),
        kl=torch.full_like(raw, torch.nan),
        columns={"category": categories * 2},
        parts={"model": raw},
        model_scores=raw,
        expected=None if expected is None else expected.repeat(2),
    )
    steps = []
    for transform in transforms:
        raw = transform.transform_pool(raw.clone(), batch)  # it may modify its argument
        steps.append(raw)
    return steps
