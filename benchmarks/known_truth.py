"""A task with a known true reward: requests of three kinds, raters who rate the kinds differently, and PPO.

A request ("code", "chat" or "facts") is answered with six words. Every kind has its own good and bad words; the true
reward is the fraction of good words of the request's kind. A scorer, a small language model with a score head, first
learns absolute ratings, in which raters are generous with code and strict with facts (offset) and separate good from
bad more or less clearly (scale), and then comparisons of two answers to a request. Both answers of a comparison are of
the request's kind, as in real data, so nothing teaches that an answer of another kind is wrong. A policy can thus gain
by answering everything with code. PPO trains LoRA on a policy that was taught to answer, and that occasionally uses a
word of another kind.
"""

from __future__ import annotations

import copy
import math
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from settings import QUIET, word_tokenizer
from torch.nn.functional import cross_entropy
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PrinterCallback,
)
from trl import RewardConfig

from trl_rlaif import PPOConfig, PPOTrainer, RewardTrainer

KINDS = ("code", "chat", "facts")
# Absolute ratings by kind: rating = offset + scale * true reward.
RATINGS = {"code": (1.5, 2.0), "chat": (0.0, 1.0), "facts": (-1.5, 0.5)}
PER_KIND, LENGTH, TOPICS = 4, 6, 8
WORDS = [f"{kind}-{quality}{i}" for kind in KINDS for quality in ("good", "bad") for i in range(PER_KIND)]
VOCABULARY = ["<pad>", "<end>", *KINDS, *(f"topic{i}" for i in range(TOPICS)), *WORDS]
INDEX = {word: i for i, word in enumerate(VOCABULARY)}


def truth(kind: str, words: list[str]) -> float:
    """Good words of the request's kind as a fraction of an answer's maximum length."""
    return sum(word.startswith(f"{kind}-good") for word in words) / LENGTH


def asked(rng: random.Random) -> tuple[str, list[str]]:
    """A request: its kind, and its words."""
    kind = rng.choice(KINDS)
    return kind, [kind, f"topic{rng.randrange(TOPICS)}", f"topic{rng.randrange(TOPICS)}"]


def _answer(rng: random.Random, kind: str, slip: float) -> list[str]:
    """Words of the request's kind, each of another kind with probability ``slip``; the number of good ones varies."""
    good = rng.random()
    kinds = [rng.choice(KINDS) if rng.random() < slip else kind for _ in range(LENGTH)]
    return [f"{k}-{'good' if rng.random() < good else 'bad'}{rng.randrange(PER_KIND)}" for k in kinds]


def _config(**options: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        pad_token_id=0,
        eos_token_id=1,
        **options,
    )


def _ids(words: list[str]) -> list[int]:
    return [INDEX[word] for word in words]


def taught_policy(seed: int) -> LlamaForCausalLM:
    """A language model that answers with words of the request's kind, and one in ten of another kind."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        rows = []
        for _ in range(64):
            kind, request = asked(rng)
            rows.append(_ids(request + _answer(rng, kind, 0.1)))
        ids = torch.tensor(rows)
        logits = model(input_ids=ids[:, :-1]).logits[:, 2:]
        cross_entropy(logits.flatten(0, 1), ids[:, 3:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def fresh_scorer(seed: int) -> LlamaForSequenceClassification:
    """A score head on an untrained small model."""
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(_config(num_labels=1)).eval()


def rated_scorer(seed: int, steps: int = 300) -> LlamaForSequenceClassification:
    """A score head on a small model, trained on the raters' absolute scores."""
    rng = random.Random(1000 + seed)
    model = fresh_scorer(seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        rows, ratings = [], []
        for _ in range(64):
            kind, request = asked(rng)
            words = _answer(rng, kind, 0.0)
            offset, scale = RATINGS[kind]
            rows.append(_ids(request + words))
            ratings.append(offset + scale * truth(kind, words))
        loss = (model(input_ids=torch.tensor(rows)).logits[:, 0] - torch.tensor(ratings)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@dataclass(frozen=True)
class Comparison:
    """Two answers to a request, and the probability that humans prefer the first."""

    request: list[str]
    answers: tuple[list[str], list[str]]
    p: float


def comparisons(seed: int, count: int) -> list[Comparison]:
    """Random comparisons for humans, who err if the answers are almost equally good."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        kind, request = asked(rng)
        first, second = (_answer(rng, kind, 0.0) for _ in range(2))
        p = 1 / (1 + math.exp(6 * (truth(kind, second) - truth(kind, first))))
        found.append(Comparison(request, (first, second), p))
    return found


def preferences(found: Sequence[Comparison], seed: int) -> list[dict[str, Any]]:
    """One human choice per comparison, as rows for the reward trainer."""
    rng, rows = random.Random(seed), []
    for comparison in found:
        better, worse = comparison.answers[:: 1 if rng.random() < comparison.p else -1]
        rows.append(_row(comparison.request, better, worse))
    return rows


def labeled(found: Sequence[Comparison], scorer: LlamaForSequenceClassification) -> list[dict[str, Any]]:
    """A scorer's soft label for each comparison, as rows for the reward trainer."""
    p = probabilities(found, scorer)
    return [_row(c.request, *c.answers) | {"p": float(p)} for c, p in zip(found, p, strict=True)]


def _row(request: list[str], better: list[str], worse: list[str]) -> dict[str, Any]:
    return {"chosen_ids": _ids(request + better), "rejected_ids": _ids(request + worse), "prompt_length": len(request)}


@torch.no_grad()
def probabilities(found: Sequence[Comparison], scorer: LlamaForSequenceClassification) -> list[float]:
    """The scorer's probabilities that humans prefer the first answer."""
    sides = [torch.tensor([_ids(c.request + c.answers[side]) for c in found]) for side in (0, 1)]
    first, second = (scorer(input_ids=ids).logits[:, 0].double() for ids in sides)
    return torch.sigmoid(first - second).tolist()


def learned(
    start: LlamaForSequenceClassification,
    rows: list[dict[str, Any]],
    seed: int,
    *,
    transforms: Sequence[Any] = (),
    centre: float | None = None,
    epochs: int = 4,
) -> LlamaForSequenceClassification:
    """A copy of ``start``, trained on the comparisons by this project's trainer."""
    scorer = copy.deepcopy(start)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = RewardTrainer(
            model=scorer,
            args=RewardConfig(
                folder,
                seed=seed,
                per_device_train_batch_size=32,
                num_train_epochs=epochs,
                learning_rate=5e-4,
                center_rewards_coefficient=centre,
                logging_strategy="no",
                **QUIET,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=word_tokenizer(INDEX),
            reward_transforms=list(transforms),
        )
        trainer.train()
    return scorer.eval()


class _Watched(PPOTrainer):
    """Logs the true reward in addition to the proxy reward."""

    def compute_metrics(self, rollout: Any, scores: torch.Tensor, stats: Any) -> dict[str, float]:
        """The base trainer's metrics, the true reward, and the fraction of words of another kind."""
        metrics = super().compute_metrics(rollout, scores, stats)
        true, other = [], []
        for kind, text in zip(rollout.columns["category"], rollout.completions, strict=True):
            words = text.split()
            true.append(truth(kind, words))
            other.append(sum(not word.startswith(kind) for word in words) / max(1, len(words)))
        return metrics | {"truth": float(np.mean(true)), "other_kind": float(np.mean(other))}


def ppo(
    policy: LlamaForCausalLM,
    scorer: LlamaForSequenceClassification,
    seed: int,
    *,
    updates: int,
    transforms: Sequence[Any] = (),
    kl_coef: float = 0.05,
) -> list[dict[str, float]]:
    """True reward, proxy, KL and fraction of other kinds' words at every update."""
    rng = random.Random(3000 + seed)
    requests = [asked(rng) for _ in range(512)]
    data = Dataset.from_dict({"prompt": [" ".join(r) for _, r in requests], "category": [k for k, _ in requests]})
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _Watched(
            PPOConfig(
                folder,
                seed=seed,
                per_device_train_batch_size=64,
                total_episodes=64 * updates,
                num_ppo_epochs=4,
                learning_rate=2e-3,
                lr_scheduler_type="constant",
                kl_coef=kl_coef,
                response_length=LENGTH,
                temperature=1.0,
                num_sample_generations=0,
                logging_steps=1,
                **QUIET,
            ),
            word_tokenizer(INDEX),
            copy.deepcopy(policy),
            reward_model=scorer,
            train_dataset=data,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
            reward_transforms=list(transforms),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    names = {"truth": "truth", "kl": "objective/kl", "other_kind": "other_kind", "proxy": "score/model"}
    return [{short: entry[name] for short, name in names.items()} for entry in trainer.state.log_history]
