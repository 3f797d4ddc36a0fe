"""Pairs of responses: sampled from the initial policy, or read from the recipe's data."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from trl_rlaif.batching import length_batches
from trl_rlaif.data import Pair, Prompt
from trl_rlaif.data.splitting import unusable
from trl_rlaif.distributed import divided, is_first
from trl_rlaif.encoding import is_rendered, without_end_of_turn
from trl_rlaif.errors import UserError
from trl_rlaif.files import append_lines, each_line, to_line, write_atomically
from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.context import Context, pair_row
from trl_rlaif.pipeline.pair_sampling import PluginPairs, StartingPolicy
from trl_rlaif.pipeline.results import SampleResults
from trl_rlaif.pipeline.rows import DrawnRow, PairRow
from trl_rlaif.progress import progress_bar
from trl_rlaif.recipe import SampleSection
from trl_rlaif.recipe.inputs import read_pairs
from trl_rlaif.responses import Response
from trl_rlaif.stored_lines import StoredRows

# Counts of a prompt's samples, which are not part of a pair.
_DRAWN = ("redraws", "responses", "ended", "tokens")


def run(context: Context) -> SampleResults:
    """Write ``pairs.jsonl``; return the number of pairs, and what was dropped by reason."""
    return _read_pairs(context) if context.recipe.data.pairs else _sample_pairs(context)


def _read_pairs(context: Context) -> SampleResults:
    started, stream = time.monotonic(), read_pairs(context.recipe)
    as_meant = context.meaning(context.recipe.data.pairs, stream.items)
    counts, unused = Counter[str](), Counter[str]()

    def rows() -> Iterator[PairRow]:
        for pair in (_without_control_tokens(context, as_meant(pair)) for pair in stream.items):
            reason = unusable(pair.response_1, pair.response_2)
            if reason is None:
                counts.update(pairs=1, ties=pair.human == 0)
                yield pair_row(pair)
            else:
                unused[reason] += 1

    _write_pairs(context, rows())
    return {
        "pairs": counts["pairs"],
        "ties": counts["ties"],
        "dropped": dict(Counter(stream.skip_counts()) + unused),
        "seconds": time.monotonic() - started,
    }


def _without_control_tokens(context: Context, pair: Pair) -> Pair:
    """Remove the chat template's end-of-turn token from rendered responses: it is not part of their text."""
    if not is_rendered(pair.prompt, context.tokenizer):
        return pair
    first, second = (without_end_of_turn(context.tokenizer, text) for text in (pair.response_1, pair.response_2))
    return replace(pair, response_1=first, response_2=second)


def _sample_pairs(context: Context) -> SampleResults:
    section, started = context.recipe.sample, time.monotonic()
    base = context.load_base()
    policy = StartingPolicy(context, section, base)
    prompts, tokens, skipped = context.encoded_prompts(context.recipe.data.prompts, section.max_new_tokens, base)
    drawn = _Drawn(context.folder / artifacts.PARTIAL_PAIRS, section)
    sampler = _Sampler(policy) if section.sampler is None else PluginPairs(policy)
    at_once = 1 if section.sampler else section.num_responses
    batches = length_batches([len(t) for t in tokens], max(1, section.batch_size // at_once))
    with progress_bar("Sampling", len(prompts), len(drawn.lines), "prompts") as advance, policy.role:
        # A batch that a kill left incomplete is sampled again as a whole, since samples depend on their batch.
        todo = [batch for batch in batches if any(prompts[i].id not in drawn.lines for i in batch)]
        for _, rows in divided(todo, lambda of: sampler.draw([prompts[i] for i in of], [tokens[i] for i in of])):
            advance(drawn.add(rows))
    counts = drawn.counts
    if not counts["pairs"]:
        raise _no_pairs(section, drawn.dropped)
    if is_first():
        _write_drawn(context, drawn, [prompt.id for prompt in prompts])
        drawn.path.unlink()
    numbers: SampleResults = {"revisions": counts["revisions"]} if section.sampler else {}
    return numbers | {
        "prompts": len(prompts),
        "pairs": counts["pairs"],
        "dropped": skipped | dict(drawn.dropped),
        "redrawn": counts["redrawn"],
        "ended": drawn.per_response("ended"),
        "tokens": drawn.per_response("tokens"),
        "seconds": time.monotonic() - started,
    }


class _Drawn:
    """The outcome for the prompts so far: rows on disk, and their counts.

    Args:
        path: The rows' file, possibly left by a killed run.

    Attributes:
        lines: The line of each prompt's row in the file, by prompt id.
        counts: Of pairs, revisions, redrawn prompts, and the inputs of ``per_response``.
        dropped: The number of prompts without a pair, by reason.
    """

    def __init__(self, path: Path, section: SampleSection) -> None:
        self.path, self._section = path, section
        self.lines, self.counts, self.dropped = dict[str, int](), Counter[str](), Counter[str]()
        for row in each_line(path):
            self._take(row)

    def add(self, rows: Iterable[DrawnRow]) -> int:
        """Append the rows of prompts that have none yet; returns their number."""
        fresh = [row for row in rows if row["id"] not in self.lines]
        append_lines(self.path, fresh)
        for row in fresh:
            self._take(row)
        return len(fresh)

    def _take(self, row: DrawnRow) -> None:
        self.lines[row["id"]] = len(self.lines)
        pairs, revisions = len(_pairs_of(row, self._section)), len(row.get("revisions", ()))
        self.counts.update(pairs=pairs, revisions=revisions, redrawn=row["redraws"] > 0)
        self.dropped.update([row["dropped"]] if "dropped" in row else [])
        for name in ("ended", "tokens"):
            if name in row:  # missing in rows of an earlier release
                self.counts.update({name: row[name], f"responses with {name}": row["responses"]})

    def per_response(self, name: str) -> float | None:
        """The mean of ``ended`` or ``tokens`` per response; None without responses."""
        responses = self.counts[f"responses with {name}"]
        return self.counts[name] / responses if responses else None

    def rows(self, ids: Sequence[str]) -> StoredRows:
        """The rows of these prompts."""
        return StoredRows(self.path, lines=[self.lines[id] for id in ids])


def _write_drawn(context: Context, drawn: _Drawn, ids: Sequence[str]) -> None:
    section, rows = context.recipe.sample, drawn.rows(ids)
    if drawn.counts["revisions"]:
        revisions = (revision for row in rows for revision in row.get("revisions", ()))
        write_atomically(context.folder / artifacts.REVISIONS, map(to_line, revisions))
    _write_pairs(context, (pair for row in rows for pair in _pairs_of(row, section)))


def _pairs_of(row: Mapping[str, Any], section: SampleSection) -> list[dict[str, Any]]:
    """A prompt's lines of pairs.jsonl."""
    if "dropped" in row:
        return []
    several = section.keep_pairs == "all" or section.sampler is not None
    return row["pairs"] if several else [{k: v for k, v in row.items() if k not in _DRAWN}]


def _no_pairs(section: SampleSection, dropped: Mapping[str, int]) -> UserError:
    if section.sampler is None:
        fix = "Raise sample.temperature or sample.redraws."
        return UserError("No prompt gave two different responses.", fix=fix)
    reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items())
    what = f"The sampler '{section.sampler.name}' made no pair ({reasons})."
    return UserError(what, where=section.sampler.where, fix="Change its options, or use a more capable model.")


def _write_pairs(context: Context, rows: Iterable[Mapping[str, Any]]) -> None:
    write_atomically(context.folder / artifacts.PAIRS, map(to_line, rows))


@dataclass
class _Sampler:
    """Samples responses for a batch of prompts until two per prompt differ, or the redraws are used up."""

    policy: StartingPolicy

    def draw(self, prompts: list[Prompt], tokens: list[list[int]]) -> list[DrawnRow]:
        """One row per prompt: one or more pairs, or ``dropped`` with the reason."""
        responses: dict[str, list[Response]] = {prompt.id: [] for prompt in prompts}
        section, redraws = self.policy.section, dict.fromkeys(responses, 0)
        missing = list(range(len(prompts)))
        for attempt in range(section.redraws + 1):
            ids = [prompts[i].id for i in missing]
            batch = [tokens[i] for i in missing]
            drawn = self.policy.draw(batch, attempt, *ids, num_responses=section.num_responses)
            for i, of_prompt in zip(missing, drawn, strict=True):
                responses[prompts[i].id] += of_prompt
                redraws[prompts[i].id] = attempt
            missing = [i for i in missing if len(_different(responses[prompts[i].id])) < 2]
            if not missing:
                break
        return [self._row(p, responses[p.id], redraws[p.id]) for p in prompts]

    def _row(self, prompt: Prompt, responses: list[Response], redraws: int) -> DrawnRow:
        drawn: DrawnRow = {
            "redraws": redraws,
            "responses": len(responses),
            "ended": sum(r.ended for r in responses),
            "tokens": sum(len(r.answer_ids) for r in responses),
        }
        different = _different(responses)
        if len(different) < 2:
            cut = "reasoning without an answer" if any(r.reasoning for r in responses) else "empty response"
            return {"id": prompt.id, "dropped": "responses are identical" if different else cut, **drawn}
        if self.policy.section.keep_pairs == "first":
            return _pair(prompt, prompt.id, *different[:2]) | drawn
        chosen = combinations(enumerate(different, 1), 2)
        pairs = [_pair(prompt, f"{prompt.id}-{i}-{j}", first, second) for (i, first), (j, second) in chosen]
        return {"id": prompt.id, "pairs": pairs} | drawn


def _pair(prompt: Prompt, id: str, first: Response, second: Response) -> PairRow:
    reasoning = {"reasoning_1": first.reasoning, "reasoning_2": second.reasoning}
    extra = prompt.extra | {name: text for name, text in reasoning.items() if text is not None}
    return pair_row(Pair(id, prompt.prompt, first.answer.strip(), second.answer.strip(), prompt.category, None, extra))


def _different(responses: list[Response]) -> list[Response]:
    """The first response with each distinct, nonempty answer."""
    by_answer: dict[str, Response] = {}
    for response in responses:
        by_answer.setdefault(response.answer.strip(), response)
    return [response for answer, response in by_answer.items() if answer]
