"""Sampled tokens read as a response: its answer, its reasoning, and whether it came to an end."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trl_rlaif.encoding import PromptLike, reasoning_marks
from trl_rlaif.errors import UserError
from trl_rlaif.stopping import end_of_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The marks of reasoning in a model whose vocabulary has them, while its template does not tell.
_COMMON_TAGS = ("<think>", "</think>")


@dataclass(frozen=True)
class Response:
    """A sampled response.

    Args:
        answer: Text without its reasoning, and without what ended it.
        reasoning: Text; None where there is none, or it is kept in the answer.
        answer_ids: The answer's tokens as sampled, without the one that ended it.
        ended: Whether a stop token was sampled, after the reasoning.
    """

    answer: str
    reasoning: str | None
    answer_ids: list[int]
    ended: bool

    def as_completion(self, prompt: PromptLike) -> PromptLike:
        """The answer in the form of its prompt: text, or a message, which has ``reasoning_content`` beside it."""
        if isinstance(prompt, str):
            return self.answer
        reasoning = {} if self.reasoning is None else {"reasoning_content": self.reasoning}
        return [{"role": "assistant", "content": self.answer, **reasoning}]


class ResponseReader:
    """Reads sampled tokens as what rewards, judges and reports see of a response.

    Args:
        tokenizer: Its chat template says how reasoning is marked, unless ``tags`` do.
        stop_ids: The tokens that end a response.
        reasoning: ``strip`` takes the reasoning out of the answer, ``keep`` leaves it there.
        tags: What reasoning begins and ends with, such as ``("<think>", "</think>")``.

    Attributes:
        end_id: The end of a turn, with which every response ends in the rows of a reward model.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int],
        *,
        reasoning: Literal["strip", "keep"] = "strip",
        tags: Sequence[str] | None = None,
    ) -> None:
        self.tokenizer, self.stop_ids, self.end_id = tokenizer, tuple(stop_ids), end_of_turn(tokenizer)
        self._marks = _marks(tokenizer, tags) if reasoning == "strip" else None

    def read(self, ids: Sequence[int]) -> Response:
        """A response of any number of tokens, with the one that ended it, where there was one."""
        ids = list(ids)
        ended = bool(ids) and ids[-1] in self.stop_ids
        ids = ids[:-1] if ended else ids
        if self._marks is None:
            return Response(self._text(ids), None, ids, ended)
        opening, close, header = self._marks
        text = self._raw(ids)
        if header and text.lstrip().startswith(header):
            start = self._first(ids, lambda text: text.lstrip().startswith(header))
            # An empty block of reasoning is none.
            return self._answered(ids, start, None, ended)
        if close in text:
            start = self._first(ids, lambda text: close in text)
            reasoning = text[: text.index(close)].lstrip().removeprefix(opening)
            return self._answered(ids, start, reasoning.strip() or None, ended)
        if not opening or text.lstrip().startswith(opening):
            return Response("", text.lstrip().removeprefix(opening).strip(), [], ended=False)
        return Response(self._text(ids), None, ids, ended)

    def row(self, ids: Sequence[int]) -> list[int]:
        """A response's tokens as a reward model reads them: the answer's as sampled, and the end of a turn."""
        return [*self.read(ids).answer_ids, self.end_id]

    def _answered(self, ids: list[int], start: int, reasoning: str | None, ended: bool) -> Response:
        while start < len(ids) and not self._raw(ids[start : start + 1]).strip():
            start += 1  # the line breaks before an answer
        return Response(self._text(ids[start:]), reasoning, ids[start:], ended)

    def _first(self, ids: list[int], holds: object) -> int:
        """How many tokens it takes until this holds of their text, which then holds of more tokens, too."""
        return bisect_left(range(len(ids) + 1), True, key=lambda count: holds(self._raw(ids[:count])))

    def _raw(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def _marks(tokenizer: PreTrainedTokenizerBase, tags: Sequence[str] | None) -> tuple[str, str, str] | None:
    if tags is not None and (len(tags) != 2 or not all(tags)):
        raise UserError(
            "reasoning_tags must be what reasoning begins and ends with.", fix="Write ['<think>', '</think>'], say."
        )
    found = reasoning_marks(tokenizer, tags)
    if found is None and {*_COMMON_TAGS} <= {token.content for token in tokenizer.added_tokens_decoder.values()}:
        return (*_COMMON_TAGS, "")
    return found
