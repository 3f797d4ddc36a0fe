"""Reads jury.jsonl, and prepares the page's section on the jury."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_rlaif.report.formatting import label, number, section
from trl_rlaif.report.parsing import lines, probability


@dataclass(frozen=True)
class Verdict:
    """A pair's aggregated probability, the members' votes by name, and the votes' standard deviation."""

    p: float | None
    votes: list[tuple[str, float]]
    disagreement: float | None


def read_verdicts(path: Path, notes: list[str]) -> dict[str, Verdict]:
    """The jury's verdicts by pair id; empty if the run has no jury."""
    return {str(row.get("id")): _verdict(row) for row in lines(path, notes)}


def _verdict(row: dict[str, Any]) -> Verdict:
    votes = [(label(name), probability(p)) for name, p in section(row, "votes").items()]
    return Verdict(
        probability(row.get("p")),
        [(name, p) for name, p in votes if p is not None],
        probability(row.get("disagreement")),
    )


def jury_part(results: dict[str, Any]) -> dict[str, Any] | None:
    """How votes were aggregated, how far they differ, and what was learned about each member; None without a jury."""
    found = section(results, "label", "jury")
    if not found:
        return None
    members = section(found, "members").items()
    return {
        "join": label(found.get("join")).replace("_", " "),
        "disagreement": number(found.get("disagreement")),
        "disputed": number(found.get("disputed")),
        "members": [
            {"name": label(name)} | {key: number(section(of).get(key)) for key in _LEARNED} for name, of in members
        ],
    }


_LEARNED = ("votes", "reliability", "with_jury")
