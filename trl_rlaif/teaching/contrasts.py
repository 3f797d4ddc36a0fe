"""Pairs whose better response is known by construction, made from existing responses without human labels.

Wang et al. 2024, "Self-Taught Evaluators" (arXiv 2408.02666), have the model write a response to a changed
instruction. Here the worse response is made from existing responses: nothing is sampled.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, get_args

from trl_rlaif.data import Pair
from trl_rlaif.data.overlap import prompt_key
from trl_rlaif.types import Message

Contrast = Literal["other_prompt", "cut_off", "looping", "shuffled", "substituted", "constraint"]
KINDS: tuple[Contrast, ...] = get_args(Contrast)

# Splits a text into sentences or lines, each with its list number and the separator after it.
_SENTENCE = re.compile(r"(?:\d+[.)][^\S\n]+)?\S.*?(?:[.!?。！？]+[\"'”’)\]]*(?=\s|$)|[。！？]+|(?=\n)|$)\s*", re.DOTALL)
_ENDED = re.compile(r"[.!?。！？][\"'”’)\]]*\s*$")
# Number of other prompts' responses searched for one of about the same length.
_OTHERS = 8
# Minimum number of words in a response for a part of it to be recognizable as a part.
_FEWEST_WORDS = 6
# The constraint: a single sentence, or more.
_SHORT = ("Answer in one sentence.", "Use a single sentence.", "Reply with one sentence only.")
_LONG = ("Answer in several sentences.", "Use more than one sentence.", "Explain it in a few sentences.")


def make_contrasts(pairs: Sequence[Pair], kinds: Sequence[Contrast], count: int, seed: int) -> list[Pair]:
    """Contrasts from the responses of pairs, as many of each kind as possible, without duplicates.

    The better response is a response of the data up to its last complete sentence. The worse one

    - ``other_prompt``: answers another prompt, at about the same length;
    - ``cut_off``: stops within a sentence, earlier or later than the better one ends;
    - ``looping``: repeats a few of its words up to the same number of words;
    - ``shuffled``: has its words in another order;
    - ``substituted``: has some of its words replaced by words of responses to other prompts;
    - ``constraint``: has one sentence where a constraint added to the prompt asks for several, or the reverse.

    Args:
        pairs: The source of the responses.
        kinds: Which contrasts, in turn.
        count: Maximum number.
        seed: Of all random choices.

    Returns:
        Pairs with ``human``, the better response, which is the first in about half of them, and the kind as
        ``category``. Fewer than ``count`` if the responses do not yield more.
    """
    draw = random.Random(seed)
    sources = [(pair, text) for pair in pairs for text in (pair.response_1, pair.response_2)]
    found: dict[tuple[str, ...], Pair] = {}
    waiting = {kind: draw.sample(sources, len(sources)) for kind in kinds}
    while len(found) < count and any(waiting.values()):
        for kind in kinds:
            before = len(found)
            while waiting[kind] and len(found) == before < count:
                pair, text = waiting[kind].pop()
                made = _contrast(kind, pair, text, sources, draw)
                if made is not None:
                    key = (prompt_key(made.prompt), *sorted(made.responses))
                    found.setdefault(key, replace(made, extra=pair.extra))  # the judge's prompt may name a column
    return [replace(pair, id=f"contrast-{number}") for number, pair in enumerate(found.values(), 1)]


def sentences(text: str) -> list[str]:
    """Sentences and lines of a text, in order, without surrounding whitespace."""
    return [part.strip() for part in _SENTENCE.findall(text) if part.strip()]


def complete(text: str) -> str:
    """A text up to the end of its last complete sentence; empty if there is none."""
    parts = [match for match in _SENTENCE.finditer(text) if _ENDED.search(match[0])]
    return text[: parts[-1].end()].strip() if parts else ""


Source = tuple[Pair, str]


def _contrast(kind: Contrast, pair: Pair, text: str, sources: Sequence[Source], draw: random.Random) -> Pair | None:
    """One contrast; None if the response is too short for it."""
    good = complete(text)
    if len(good.split()) < _FEWEST_WORDS:
        return None
    if kind == "constraint":
        return _constraint(pair, good, draw)
    bad = _SPOILED[kind](pair, text, good, sources, draw)
    return None if bad is None or bad == good else _as_pair(kind, pair.prompt, good, bad, draw)


def _as_pair(kind: str, prompt: str | list[Message], good: str, bad: str, draw: random.Random) -> Pair:
    first = draw.random() < 0.5
    responses = (good, bad) if first else (bad, good)
    return Pair("", prompt, *responses, category=kind, human=1 if first else 2)


def _other_prompt(pair: Pair, text: str, good: str, sources: Sequence[Source], draw: random.Random) -> str | None:
    own = prompt_key(pair.prompt)
    drawn = draw.sample(sources, min(len(sources), 2 * _OTHERS))
    others = [complete(other) for of, other in drawn if prompt_key(of.prompt) != own][:_OTHERS]
    return min(filter(None, others), key=lambda other: abs(len(other) - len(good)), default=None)


def _cut_off(pair: Pair, text: str, good: str, sources: Sequence[Source], draw: random.Random) -> str | None:
    if len(text.strip()) > len(good) and draw.random() < 0.5:
        return text.strip()  # longer than the better one: length alone must not reveal the better one
    words = good.split(" ")
    kept = draw.randrange(len(words) // 3, len(words) - 1)
    cut = " ".join(words[: max(1, kept)])
    return None if _ENDED.search(cut) else cut


def _looping(pair: Pair, text: str, good: str, sources: Sequence[Source], draw: random.Random) -> str | None:
    words = good.split()
    first = draw.randrange(len(words) // 3 + 1)
    rest = len(words) - first
    said = words[first : first + draw.randint(2, max(2, rest // 3))]
    return " ".join([*words[:first], *(said * rest)[:rest]])


def _shuffled(pair: Pair, text: str, good: str, sources: Sequence[Source], draw: random.Random) -> str | None:
    words = good.split()
    first = draw.randrange(len(words) // 3 + 1)
    middle = words[first : first + max(_FEWEST_WORDS, len(words) // 2)]
    mixed = draw.sample(middle, len(middle))
    return " ".join([*words[:first], *mixed, *words[first + len(middle) :]])


def _substituted(pair: Pair, text: str, good: str, sources: Sequence[Source], draw: random.Random) -> str | None:
    own = prompt_key(pair.prompt)
    drawn = draw.sample(sources, min(len(sources), _OTHERS))
    others = [word for of, other in drawn if prompt_key(of.prompt) != own for word in other.split()]
    words = good.split()
    places = range(draw.randrange(len(words) // 3 + 1), len(words))
    for place in draw.sample(places, draw.randint(len(places) // 4, len(places) // 2)) if others else ():
        words[place] = draw.choice(others)
    return " ".join(words)


def _constraint(pair: Pair, good: str, draw: random.Random) -> Pair | None:
    parts = sentences(good)
    if len(parts) < 2 or not isinstance(pair.prompt, str):
        return None
    short = draw.random() < 0.5
    asked = draw.choice(_SHORT if short else _LONG)
    kept, other = (parts[0], good) if short else (good, parts[0])
    return _as_pair("constraint", f"{pair.prompt.rstrip()} {asked}", kept, other, draw)


_SPOILED: dict[str, Callable[[Pair, str, str, Sequence[Source], random.Random], str | None]] = {
    "other_prompt": _other_prompt,
    "cut_off": _cut_off,
    "looping": _looping,
    "shuffled": _shuffled,
    "substituted": _substituted,
}
