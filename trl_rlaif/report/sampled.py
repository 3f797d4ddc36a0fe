"""Reads pairs made by a plugin's sampler, and prepares the page's section on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trl_rlaif.pipeline.rows import PairRow
from trl_rlaif.report.formatting import label, number, reasons, section
from trl_rlaif.report.parsing import Turn, spread, turn, turns

MAX_PAIRS = 20
_MAX_COLUMNS = 6


@dataclass(frozen=True)
class SampledPair:
    """A pair, with the text columns that the data and the sampler added, by name."""

    category: str
    prompt: list[Turn]
    responses: tuple[Turn, Turn]
    columns: list[tuple[str, Turn]]


def read_sampled(recipe: dict[str, Any], pairs: Sequence[dict[str, Any]]) -> list[SampledPair]:
    """Some pairs, evenly spaced; empty if no sampler made them."""
    return [_pair(row) for row in spread(pairs, MAX_PAIRS)] if _sampler(recipe) else []


def _sampler(recipe: dict[str, Any]) -> str:
    found = section(recipe, "sample").get("sampler")
    return label(next(iter(found), "") if isinstance(found, dict) else found)


def _pair(row: dict[str, Any]) -> SampledPair:
    texts = [(label(name), turn("", text)) for name, text in row.items()
             if name not in PairRow.__annotations__ and isinstance(text, str)]  # fmt: skip
    first, second = (turn("", row.get(f"response_{i}")) for i in (1, 2))
    return SampledPair(label(row.get("category")), turns(row.get("prompt")), (first, second), texts[:_MAX_COLUMNS])


def sampler_part(
    recipe: dict[str, Any], results: dict[str, Any], shown: list[SampledPair], labels: int, second: int
) -> dict[str, Any] | None:
    """The sampler, its number of pairs, dropped prompts, preferred responses, and some pairs; None without a sampler.

    Args:
        labels: Number of pairs with a label.
        second: Number of labels that prefer the second response.
    """
    name, found = _sampler(recipe), section(results, "sample")
    if not name or not (found or shown):
        return None
    return {
        "name": name,
        "pairs": number(found.get("pairs")),
        "revisions": number(found.get("revisions")),
        "dropped": reasons(found.get("dropped")),
        "labels": labels,
        "second": second / labels if labels else None,
        "shown": shown,
    }
