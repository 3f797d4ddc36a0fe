"""Forgetting with checkable answers: PPO on a reward that favors one subject, with and without rehearsal.

    python benchmarks/forgetting.py --output benchmarks/results/forgetting.md

A small language model is taught eight subjects by supervised fine-tuning: each of sixteen questions of a subject has
one right answer of five words, however it is worded. One subject (the favored one) is taught badly. The reward of PPO
is the fraction of right words, in full for the favored subject and a tenth of it for all others: raters care about one
thing. The forget set is held-out wordings of the other subjects' questions, which the fine-tuned model was good at.
There is no KL penalty by default, since it, too, keeps a policy near the initial one.

Variants: plain PPO; Selective Rehearsal with equally many pairs from 1, 8 and 32 clusters; as many random pairs;
smaller rehearsal weights. Reported over seeds: the final reward (on all prompts and on the favored subject), the win
rate of the trained model's greedy answers over the fine-tuned model's on the forget set (more right words win, a tie
counts half), and the NLL of the better half of the fine-tuned model's own answers there, over the run."""

from __future__ import annotations

import argparse
import copy
import random
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from settings import QUIET, word_tokenizer
from tables import interval
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, logging
from trl_rlaif_rehearsal import SelectiveRehearsal

from trl_rlaif import PPOConfig, PPOTrainer
from trl_rlaif.evaluation.forgetting import ForgettingTracker

SUBJECTS = ("history", "botany", "cooking", "music", "sailing", "chess", "weather", "law")
FAVOURED, OTHERS_WEIGHT = SUBJECTS[0], 0.1
QUESTIONS, WORDINGS, WORDS, LENGTH = 16, 8, 40, 5
VOCABULARY = [
    "<pad>", "<end>", *SUBJECTS, *(f"question{i}" for i in range(QUESTIONS)), *(f"wording{i}" for i in range(WORDINGS)),
    *(f"word{i}" for i in range(WORDS)),
]  # fmt: skip
INDEX = {word: i for i, word in enumerate(VOCABULARY)}
_facts = random.Random(0)
ANSWERS = {
    (subject, f"question{i}"): [f"word{_facts.randrange(WORDS)}" for _ in range(LENGTH)]
    for subject in SUBJECTS
    for i in range(QUESTIONS)
}


@dataclass(frozen=True)
class Variant:
    """A training variant: without rehearsal (no clusters), or with clusters, a criterion and a weight."""

    name: str
    clusters: int = 0
    criterion: str = "advantage"
    coef: float = 1.0

    @property
    def title(self) -> str:
        """Its name, with its weight if it has one."""
        return f"{self.name}, gamma = {self.coef:g}" if self.clusters else self.name


VARIANTS = (
    Variant("plain"),
    Variant("selected, c = 1", 1),
    Variant("selected, c = 8", 8),
    Variant("selected, c = 32", 32),
    Variant("random", 1, "random"),
    Variant("selected, c = 8", 8, coef=0.1),
    Variant("selected, c = 8", 8, coef=0.01),
)


def right(prompt: str, answer: str) -> float:
    """Fraction of an answer's words that are right."""
    subject, question, _ = prompt.split()
    wanted = ANSWERS[subject, question]
    return sum(a == b for a, b in zip(answer.split(), wanted, strict=False)) / LENGTH


def reward(prompts: list[str], completions: list[str], category: list[str], **columns: Any) -> list[float]:
    """Fraction of right words, in full for the favored subject, a tenth of it for all others."""
    rows = zip(prompts, completions, category, strict=True)
    return [right(p, c) * (1.0 if subject == FAVOURED else OTHERS_WEIGHT) for p, c, subject in rows]


def _request(rng: random.Random, subject: str | None = None) -> str:
    subject = subject or rng.choice(SUBJECTS)
    return f"{subject} question{rng.randrange(QUESTIONS)} wording{rng.randrange(WORDINGS)}"


def _ids(words: Sequence[str]) -> list[int]:
    return [INDEX[word] for word in words]


def _taught(seed: int, args: argparse.Namespace) -> LlamaForCausalLM:
    """A language model fine-tuned on the subjects with imperfect answers."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY), hidden_size=args.width, intermediate_size=2 * args.width, num_hidden_layers=3,
            num_attention_heads=4, max_position_embeddings=32, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.lessons)
    for _ in range(args.lessons):
        rows = []
        for _ in range(128):
            request = _request(rng).split()
            errors = args.favoured_errors if request[0] == FAVOURED else args.errors
            answer = ANSWERS[request[0], request[1]]
            answer = [f"word{rng.randrange(WORDS)}" if rng.random() < errors else word for word in answer]
            rows.append(_ids([*request, *answer, "<end>"]))
        ids = torch.tensor(rows)
        logits = model(input_ids=ids[:, :-1]).logits[:, 2:]
        cross_entropy(logits.flatten(0, 1), ids[:, 3:].flatten()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def _all_right(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    return [right(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def _preferred(prompts: list[str], ours: list[str], start: list[str]) -> list[float]:
    gains = np.sign(np.subtract(_all_right(prompts, ours), _all_right(prompts, start)))
    return ((gains + 1) / 2).tolist()


def _selector(variant: Variant, args: argparse.Namespace) -> SelectiveRehearsal:
    return SelectiveRehearsal(
        clusters=variant.clusters,
        per_cluster=args.pairs // variant.clusters,
        criterion=variant.criterion,
        num_responses=args.responses,
        duplicates=1.0,  # two wordings of a question are similar, and both may be rehearsed
    )


def _ppo(model: LlamaForCausalLM, variant: Variant, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One run: reward by update, the results on the forget set, and rehearsal's fraction of the time."""
    rng = random.Random(3000 + seed)
    requests = [_request(rng, FAVOURED if rng.random() < args.favoured_share else None) for _ in range(args.prompts)]
    data = Dataset.from_dict({"prompt": requests, "category": [request.split()[0] for request in requests]})
    known = set(requests)
    every = [f"{s} question{q} wording{w}" for s in SUBJECTS[1:] for q in range(QUESTIONS) for w in range(WORDINGS)]
    held_out = rng.sample([prompt for prompt in every if prompt not in known], 280)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            PPOConfig(
                folder,
                seed=seed,
                per_device_train_batch_size=64,
                total_episodes=64 * args.updates,
                learning_rate=args.learning_rate,
                lr_scheduler_type="constant",
                kl_coef=args.kl_coef,
                response_length=LENGTH + 1,
                stop_token="eos",
                temperature=1.0,
                rehearsal_coef=variant.coef,
                num_sample_generations=0,
                logging_steps=1,
                **QUIET,
            ),
            word_tokenizer(INDEX),
            copy.deepcopy(model),
            reward_funcs=[reward],
            train_dataset=data,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
            data_selectors=[_selector(variant, args)] if variant.clusters else [],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(
            ForgettingTracker(
                trainer,
                {"forget": held_out},
                _preferred,
                every=args.every,
                score=lambda prompts, completions, **_: _all_right(prompts, completions),
                batch_size=280,
            )
        )
        trainer.train()
    return _numbers(trainer.state.log_history)


def _numbers(history: list[dict[str, float]]) -> dict[str, Any]:
    updates = [entry for entry in history if "objective/scores" in entry]
    measured = [entry for entry in history if "forgetting/forget/nll" in entry]
    late = measured[len(measured) // 2 :]
    mean = lambda entries, key: float(np.mean([e[key] for e in entries if key in e]))  # noqa: E731
    return {
        "reward": mean(updates[-10:], "objective/scores"),
        "favoured": mean(updates[-10:], f"reward/{FAVOURED}"),
        "favoured_start": mean(updates[:3], f"reward/{FAVOURED}"),
        "lost": 0.5 - mean(late, "forgetting/forget/win_rate"),
        "nll_start": measured[0]["forgetting/forget/nll"],
        "nll": mean(late, "forgetting/forget/nll"),
        "kl": mean(updates[-10:], "objective/kl"),
        "share": sum(e.get("time/rehearsal", 0.0) for e in updates) / sum(e["time/update"] for e in updates),
        "curve": [(e["step"], e["forgetting/forget/win_rate"], e["forgetting/forget/nll"]) for e in measured],
    }


def main() -> None:
    """Run all variants with all seeds; print the tables and, with ``--output``, write them."""
    args = _arguments()
    logging.set_verbosity_error()
    disable_progress_bars()
    torch.set_num_threads(args.threads)
    found: dict[Variant, list[dict[str, Any]]] = defaultdict(list)
    for seed in range(args.seeds):
        model = _taught(seed, args)
        for variant in VARIANTS:
            found[variant].append(_ppo(model, variant, args, seed))
            shown = {k: round(v, 3) for k, v in found[variant][-1].items() if k != "curve"}
            print(seed, variant, shown, flush=True)
    lines = _table(args, found)
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--every", type=int, default=10, help="updates between measurements of the forget set")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=64, help="to rehearse, in every variant that rehearses")
    parser.add_argument("--responses", type=int, default=4, help="of the start to each prompt, to choose from")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--kl-coef", type=float, default=0.0)
    parser.add_argument(
        "--favoured-share", type=float, default=0.5, help="of PPO's prompts, beside its share of the rest"
    )
    parser.add_argument("--lessons", type=int, default=1500, help="steps of supervised fine-tuning")
    parser.add_argument("--errors", type=float, default=0.12, help="of the teachers, a word")
    parser.add_argument("--favoured-errors", type=float, default=0.5, help="the same in the favoured subject")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def _table(args: argparse.Namespace, found: dict[Variant, list[dict[str, Any]]]) -> list[str]:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "trl-rlaif"))
    plain = found[VARIANTS[0]]
    lines = [
        f"<!-- python benchmarks/forgetting.py --seeds {args.seeds} --updates {args.updates} --pairs {args.pairs} "
        f"--learning-rate {args.learning_rate:g} --kl-coef {args.kl_coef:g} "
        f"--favoured-share {args.favoured_share:g} -->",
        "",
        f"{versions}; mean over {args.seeds} seeds and 95% interval. The reward is that of the last ten updates; lost "
        "win rate and NLL are means over the second half of the run; shares of what plain PPO has, of the means.",
        "",
        f"Before PPO: the favoured subject {np.mean([r['favoured_start'] for r in plain]):.3f}, "
        f"NLL {np.mean([r['nll_start'] for r in plain]):.3f}.",
        "",
        "| variant | gamma | reward | of plain's | favoured subject | lost win rate | of plain's | NLL | KL | time |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        runs = found[variant]
        part = {key: np.mean([r[key] for r in runs]) / np.mean([r[key] for r in plain]) for key in ("reward", "lost")}
        columns = [interval([r[key] for r in runs], 3) for key in ("reward", "favoured", "lost", "nll", "kl")]
        columns[1:1] = [f"{part['reward']:.0%}"]
        columns[4:4] = [f"{part['lost']:.0%}"]
        gamma, share = (
            (f"{variant.coef:g}", f"{np.mean([r['share'] for r in runs]):.0%}") if variant.clusters else ("", "")
        )
        lines.append(f"| {variant.name} | {gamma} | " + " | ".join(columns) + f" | {share} |")
    steps = [step for step, *_ in plain[0]["curve"]]
    for title, column in (("Win rate on the forget set", 1), ("NLL of the start's right answers", 2)):
        lines += ["", f"{title}, by update:", "", "| variant | " + " | ".join(map(str, steps)) + " |"]
        lines.append("|---|" + "---|" * len(steps))
        for variant in VARIANTS:
            means = np.mean([[point[column] for point in run["curve"]] for run in found[variant]], axis=0)
            lines.append(f"| {variant.title} | " + " | ".join(f"{value:.2f}" for value in means) + " |")
    return lines


if __name__ == "__main__":
    main()
