"""A third-party plugin: the labeler `keyword`, which counts a word and does not use a judge."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

from pydantic import Field

from trl_rlaif import Judge, Label, Labeler, Options, Pair, hookimpl


class KeywordOptions(Options):
    """Options of `keyword`."""

    word: str = Field(min_length=1, description="The word to count, in any case.")
    weight: float = Field(1.0, gt=0, description="Log-odds of one more of it.")


class KeywordLabeler(Labeler):
    """Prefers the response that contains the word more often; pairs without it are skipped."""

    Options = KeywordOptions
    options: KeywordOptions

    def label(self, pairs: Sequence[Pair], judge: Judge, done: Collection[str] = ()) -> Iterator[Label]:
        """Yield a label for each pair that is not done."""
        for pair in pairs:
            if pair.id not in done:
                yield self._label(pair)

    def _label(self, pair: Pair) -> Label:
        word = self.options.word.lower()
        first, second = (text.lower().count(word) for text in (pair.response_1, pair.response_2))
        if not first and not second:
            return Label(pair.id, judge="keyword", skipped="the word is in neither response")
        p = 1 / (1 + math.exp(-self.options.weight * (first - second)))
        return Label(pair.id, p=p, judge="keyword")


@hookimpl
def register_labelers(register):
    """Register the labeler under its name."""
    register("keyword", KeywordLabeler)
