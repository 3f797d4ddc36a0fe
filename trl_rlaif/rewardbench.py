"""Evaluates a run's reward model on a benchmark in RewardBench's format: its scores and results by subset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from trl_rlaif import distributed
from trl_rlaif.batching import token_batches
from trl_rlaif.data.benchmark import REF, TIED, BenchmarkRow, is_ties, load_benchmark
from trl_rlaif.data.overlap import prompt_key
from trl_rlaif.encoding import chat_prompt, encode_prompt, encode_response
from trl_rlaif.errors import RunError, UserError
from trl_rlaif.evaluation.benchmark import ScoredRow, accuracy_by, benchmark_accuracy, ties_score
from trl_rlaif.evaluation.categories import UNNAMED
from trl_rlaif.files import to_line, write_atomically
from trl_rlaif.pipeline.trained import Trained, find_trained
from trl_rlaif.progress import progress_bar
from trl_rlaif.report.formatting import count, percent
from trl_rlaif.reward.collator import SoftPreferenceCollator
from trl_rlaif.reward.loading import load_reward_base
from trl_rlaif.reward.scoring import can_pack, score_pairs


def run_benchmark(
    folder: str | Path, source: str | Path, *, batch_tokens: int = 8192, scores: Path | None = None
) -> dict[str, Any]:
    """Score a benchmark with a run's reward model, as in the run: scores are read at the end-of-turn token.

    Args:
        folder: The run's folder.
        source: A preference file in RewardBench's or RewardBench 2's format, as in ``load_benchmark``.
        batch_tokens: Maximum tokens per forward pass.
        scores: A .jsonl file for the scores of every row; None: not written.

    Returns:
        ``subsets``: results of ``benchmark_accuracy`` by name, or of ``ties_score`` for a subset Ties. ``sections``, if
        the file names any, and ``all``: the accuracy of these rows, without Ties. ``mean_of_subsets``: the mean rate or
        score, by which RewardBench 2 ranks models. ``left_out``: number of rows longer than the model's context, by
        subset.

    Raises:
        UserError: There is no trained reward model, rows are invalid (with file and line), or all rows are too long.
        RunError: A score is not finite.
    """
    trained, rows = find_trained(folder, "reward"), load_benchmark(source)
    kept, scored, left_out = _scored(trained, rows, batch_tokens)
    if not kept:
        raise UserError("Every row is longer than the model's context.", where=str(source))
    if scores is not None:
        write_atomically(scores, "".join(to_line(_score_row(*each)) for each in zip(kept, scored, strict=True)))
    return _figures(kept, scored) | {"left_out": dict(left_out)}


def _score_row(row: BenchmarkRow, scored: ScoredRow) -> dict[str, Any]:
    known = {"id": row.id, "subset": row.subset, "section": row.section}
    return {**known, "chosen": list(scored.chosen), "rejected": list(scored.rejected)}


# ---- Scores ---------------------------------------------------------------------------------------------


def _scored(
    trained: Trained, rows: Sequence[BenchmarkRow], batch_tokens: int
) -> tuple[list[BenchmarkRow], list[ScoredRow], Counter[str]]:
    """The rows that fit into the model's context, with their scores; and the number of others, by subset."""
    tokenizer, base = trained.tokenizer(), load_reward_base(trained.path, trained.base)
    model = PeftModel.from_pretrained(base, str(trained.path)).eval()
    if trained.base.quantization != "nf4":
        model = model.to(distributed.join().device)
    room = getattr(base.config.get_text_config(), "max_position_embeddings", None) or 10**9
    kept, left_out, pairs = [], Counter[str](), []
    for row in rows:
        prompt = encode_prompt(tokenizer, chat_prompt(row.prompt, tokenizer))
        responses = [prompt + encode_response(tokenizer, text) for text in (*row.chosen, *row.rejected)]
        if max(map(len, responses)) > room:
            left_out[row.subset or UNNAMED] += 1
            continue
        kept.append(row)
        # In pairs, as in packed rows; with an odd number, the last one is paired with itself.
        pairs += [
            {"chosen_ids": one, "rejected_ids": other, "prompt_length": len(prompt)}
            for one, other in zip(responses[::2], [*responses[1::2], *responses[-1:]], strict=False)
        ]
    scores = iter(_pair_scores(model, pairs, tokenizer.pad_token_id, batch_tokens))
    found = []
    for row in kept:
        size = len(row.chosen) + len(row.rejected)
        values = [score for _ in range(-(-size // 2)) for score in next(scores)][:size]
        number = len(row.chosen)
        found.append(ScoredRow(values[:number], values[number:], prompt_key(row.prompt)))
    return kept, found, left_out


def _pair_scores(
    model: PeftModel, pairs: Sequence[dict[str, Any]], pad_id: int, batch_tokens: int
) -> list[tuple[float, float]]:
    packed = can_pack(model)
    collator = SoftPreferenceCollator(pad_token_id=pad_id, packed=packed)
    lengths = [2 * max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) for pair in pairs]
    found: dict[int, tuple[float, float]] = {}
    with progress_bar("Scoring", len(pairs), unit="pairs") as advance:
        for batch in token_batches(lengths, batch_tokens):
            some = [pairs[i] for i in batch]
            chosen, rejected, _ = score_pairs(model, some, collator, len(some), batch_tokens)
            if not torch.cat((chosen, rejected)).isfinite().all():
                raise RunError("The reward model's scores are not finite: its training has diverged.")
            found |= dict(zip(batch, zip(chosen.tolist(), rejected.tolist(), strict=True), strict=True))
            advance(len(batch))
    return [found[i] for i in range(len(pairs))]


# ---- Results --------------------------------------------------------------------------------------------


def _figures(rows: Sequence[BenchmarkRow], scored: Sequence[ScoredRow]) -> dict[str, Any]:
    both = list(zip(rows, scored, strict=True))
    single = [(row, found) for row, found in both if not is_ties(row.subset)]
    subsets = accuracy_by([row.subset for row, _ in single], [found for _, found in single])
    ties: dict[str, dict[int, ScoredRow]] = {REF: {}, TIED: {}}
    for kind, number, found in ((*row.ties, found) for row, found in both if row.ties is not None):
        ties[kind][number] = found
    if ties[REF].keys() & ties[TIED].keys():
        subsets[next(row.subset or "" for row in rows if row.ties)] = ties_score(ties[REF], ties[TIED])
    figures = {"subsets": subsets}
    if any(row.section for row, _ in single):
        figures["sections"] = accuracy_by([row.section for row, _ in single], [found for _, found in single])
    rates: list[float] = [of["rate"] if "rate" in of else of["score"] for of in subsets.values()]
    return figures | {
        "all": benchmark_accuracy([found for _, found in single]) if single else None,
        "mean_of_subsets": sum(rates) / len(rates),
    }


def describe(found: dict[str, Any]) -> str:
    """The results as a text table."""
    parts = [*found["subsets"].items(), *((f"section {name}", of) for name, of in found.get("sections", {}).items())]
    if found["all"]:
        parts.append(("all rows", found["all"]))
    width = max(len(name) for name, _ in parts) + 2
    lines = [f"{'':<{width}}accuracy  95% interval      rows"]
    for name, of in parts:
        ends = f"{percent(of['interval'][0])} to {percent(of['interval'][1])}" if of["interval"] else "-"
        ties = f" ({count(of['ties'], 'equal score')})" if of.get("ties") else ""
        rate = percent(of.get("rate", of.get("score")))
        lines.append(f"{name:<{width}}{rate:>8}  {ends:<16}{of['n']:>6,}{ties}")
    lines.append(f"{'mean of subsets':<{width}}{percent(found['mean_of_subsets']):>8}")
    for name, rows in found["left_out"].items():
        lines.append(f"Left out of {name}: {count(rows, 'row')} longer than the model's context.")
    return "\n".join(lines)
