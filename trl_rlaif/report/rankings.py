"""Reads rankings.jsonl, and prepares the page's section on rankings."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_rlaif.report.formatting import interval, label, number, section
from trl_rlaif.report.parsing import Turn, drawable, probability, spread, stored_lines, turn, turns

MAX_PROMPTS = 10
_MAX_RESPONSES = 16


@dataclass(frozen=True)
class RankedResponse:
    """A response with its strength, in nats above its prompt's average, and the 95% interval."""

    turn: Turn
    strength: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class RankedPrompt:
    """A prompt's responses, best first, and the number of questions asked about them."""

    category: str
    prompt: list[Turn]
    responses: list[RankedResponse]
    questions: int


@dataclass
class RankedPairs:
    """Probability by pair id that response_1 is better, and some prompts, evenly spaced."""

    probabilities: dict[str, float] = field(default_factory=dict)
    prompts: list[RankedPrompt] = field(default_factory=list)
    total: int = 0


def read_rankings(path: Path, notes: list[str]) -> RankedPairs:
    """The run's rankings; empty if it has none."""
    rows, found = stored_lines(path, notes), RankedPairs()
    for row in rows:
        known = {str(id): probability(p) for id, p in section(row, "pairs").items()}
        found.probabilities |= {id: p for id, p in known.items() if p is not None}
    found.total = len(rows)
    found.prompts = [_prompt(row) for row in spread(rows, MAX_PROMPTS)]
    return found


def _prompt(row: dict[str, Any]) -> RankedPrompt:
    texts, strengths, intervals, answers = (
        found if isinstance(found := row.get(key), list) else []
        for key in ("responses", "strengths", "intervals", "answers")
    )
    responses = [
        RankedResponse(turn("", text), strength, interval(ends))
        for text, value, ends in zip(texts, strengths, intervals, strict=False)
        if (strength := drawable(value)) is not None
    ]
    return RankedPrompt(label(row.get("category")), turns(row.get("prompt")), responses[:_MAX_RESPONSES], len(answers))


def ranking_part(ranked: RankedPairs, results: dict[str, Any]) -> dict[str, Any] | None:
    """Questions asked, position effect, certainty of the order, and some prompts; None without a ranking."""
    found = section(results, "label", "ranking")
    if not found:
        return None
    keys = ("prompts", "responses", "questions", "all_questions", "position", "wrong", "certain")
    return {key: number(found.get(key)) for key in keys} | {
        "method": label(found.get("method")).replace("_", " "),
        "position_interval": interval(found.get("position_interval")),
        "shown": ranked.prompts,
        "total": ranked.total,
    }
