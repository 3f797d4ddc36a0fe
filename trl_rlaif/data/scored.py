"""Pairs from rows with scored responses, and from rows with one response labeled good or bad."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

from trl_rlaif.data.fields import parse_number
from trl_rlaif.data.formats import SCORED_KEYS, find_prompt
from trl_rlaif.data.messages import RowError, RowSkip, blank, parse_prompt, short
from trl_rlaif.data.rows import Row, kind_of
from trl_rlaif.data.splitting import EMPTY_RESPONSE
from trl_rlaif.types import Skip

FEW = "fewer than two responses with a score"
UNPAIRED = "no row of the same prompt with the other label"

# If a response is an object: the keys of its text and of its score.
_TEXT, _SCORE = ("response", "completion", "content", "text"), ("overall_score", "score", "rating")
_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def scored_pairs(row: Row, row_id: str, which: str) -> Iterator[Row]:
    """A preference row for each pair of the row's responses; equal scores make it a tie.

    Args:
        row: A prompt, ``responses`` (or ``completions``) and their ``scores``; or objects that hold both.
        row_id: Prefix of the pairs' ids, which end with the positions of both responses, counted from 1.
        which: "all", or "best_worst" for the first of the best against the last of the worst.

    Raises:
        RowError: There is not one number for each response.
        RowSkip: Fewer than two responses have a score.
    """
    values = row.values
    key = next((key for key in SCORED_KEYS if values.get(key) is not None), SCORED_KEYS[0])
    scored = [(i, *each) for i, each in enumerate(_responses(values, key), 1) if each[1] is not None]
    if len(scored) < 2:
        raise RowSkip(FEW)
    pairs = list(combinations(scored, 2))
    if which == "best_worst":
        best = max(scored, key=lambda each: each[2])
        pairs = [(best, min((each for each in reversed(scored) if each is not best), key=lambda each: each[2]))]
    rest = {name: value for name, value in values.items() if name not in (*SCORED_KEYS, "scores")}
    for pair in pairs:
        better, worse = sorted(pair, key=lambda each: each[2], reverse=True)
        sides = {"chosen": better[1], "rejected": worse[1], "score_chosen": better[2], "score_rejected": worse[2]}
        yield replace(row, values=rest | sides | {"id": f"{row_id}-{better[0]}-{worse[0]}"})


def _responses(values: dict[str, Any], key: str) -> list[tuple[Any, float | None]]:
    """Each response with its score, None if it has none."""
    responses, scores = values.get(key), values.get("scores")
    if responses is None:
        raise RowSkip(FEW)
    if not isinstance(responses, list):
        raise RowError(f"{key!r} is {kind_of(responses)}.", "Write a list of texts.")
    if scores is None and any(isinstance(each, dict) for each in responses):
        return [_of_object(each, f"entry {number} of {key!r}") for number, each in enumerate(responses, 1)]
    if not isinstance(scores, list) or len(scores) != len(responses):
        found = f"{len(scores)} scores" if isinstance(scores, list) else f"'scores' is {kind_of(scores)}"
        raise RowError(f"{key!r} holds {len(responses)} responses, and {found}.", 'Write one number each in "scores".')
    return [(each, parse_number(score, "scores")) for each, score in zip(responses, scores, strict=True)]


def _of_object(value: Any, name: str) -> tuple[Any, float | None]:
    keys = value.keys() if isinstance(value, dict) else ()
    text, score = (next((key for key in known if key in keys), None) for known in (_TEXT, _SCORE))
    if text is None or score is None:
        raise RowError(
            f"There is no text with a score in {name}: {short(value)}.",
            'Write {"response": "...", "score": 1}, or texts, and numbers in "scores".',
        )
    return value[text], parse_number(value[score], score)


class Unpaired:
    """Pairs rows with one good or bad response each with the next of the same prompt and the opposite label."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[tuple[Row, str, bool]]] = {}

    def pairs(self, row: Row, row_id: str) -> Iterator[Row]:
        """A preference row, with the good row's id and other columns, or none yet.

        Raises:
            RowError: The row has no prompt, or its label is neither true nor false.
            RowSkip: It has no label or no response.
        """
        prompt = find_prompt(row.values)
        prompt = parse_prompt(None) if prompt is None else prompt
        label = parse_label(row.values.get("label"))
        if blank(row.values.get("completion")):
            raise RowSkip(EMPTY_RESPONSE)
        waiting = self._waiting.setdefault(json.dumps(prompt), [])
        if not waiting or waiting[0][2] == label:
            waiting.append((row, row_id, label))
            return
        other, other_id, _ = waiting.pop(0)
        good, good_id, bad = (row, row_id, other) if label else (other, other_id, row)
        rest = {name: value for name, value in good.values.items() if name not in ("completion", "label")}
        sides = {"chosen": good.values.get("completion"), "rejected": bad.values.get("completion")}
        yield replace(row, values=rest | sides | {"id": good_id})

    def left(self) -> list[Skip]:
        """The rows without a partner."""
        return [Skip(row.where, UNPAIRED) for waiting in self._waiting.values() for row, *_ in waiting]


def parse_label(value: Any) -> bool:
    """Whether a response is labeled good; in CSV, labels are text.

    Raises:
        RowSkip: There is no label.
        RowError: It is neither true nor false.
    """
    if blank(value):
        raise RowSkip("no label")
    found = _LABELS.get(str(value).strip().lower()) if not isinstance(value, (list, dict)) else None
    if found is None:
        raise RowError(f"'label' is {short(value)}.", "Write true for a good response, false for a bad one.")
    return found
