"""Sampled tokens parsed as a response: answer, reasoning, and whether it ended."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from trl_rlaif.encoding import PromptLike, as_messages, encode_prompt, reasoning_marks
from trl_rlaif.errors import UserError
from trl_rlaif.stopping import end_of_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Marks of reasoning for models whose vocabulary contains them, but whose template does not mark reasoning.
_COMMON_TAGS = ("<think>", "</think>")
# Number of tokens at the end of a prompt that are searched for the start of the reasoning.
_TAIL = 16


@dataclass(frozen=True)
class Response:
    """A sampled response.

    Args:
        answer: Text without the reasoning and the stop token.
        reasoning: Text; None if there is none, or it is kept in the answer.
        answer_ids: The answer's tokens as sampled, without the stop token.
        ended: Whether a stop token was sampled, after the reasoning.
    """

    answer: str
    reasoning: str | None
    answer_ids: list[int]
    ended: bool

    def as_completion(self, prompt: PromptLike) -> PromptLike:
        """The answer in the form of its prompt: text, or a message, which may also have ``reasoning_content``."""
        if isinstance(prompt, str):
            return self.answer
        reasoning = {} if self.reasoning is None else {"reasoning_content": self.reasoning}
        return [{"role": "assistant", "content": self.answer, **reasoning}]


class ResponseReader:
    """Parses sampled tokens into the response that rewards, judges and reports see.

    Args:
        tokenizer: Its chat template determines how reasoning is marked, unless ``tags`` are given.
        stop_ids: The tokens that end a response.
        reasoning: ``strip`` takes the reasoning out of the answer, ``keep`` leaves it there.
        tags: Opening and closing tag of reasoning, such as ``("<think>", "</think>")``.

    Attributes:
        end_id: The end-of-turn token, with which every response ends in the rows of a reward model.
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

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that count as a response's end, whether or not sampling stops there."""
        return self.stop_ids or (self.tokenizer.eos_token_id,)

    @cached_property
    def prompted(self) -> bool:
        """Whether a prompt from the chat template already begins the reasoning."""
        if self._marks is None or not self.tokenizer.chat_template:
            return False
        return self._begins_reasoning(encode_prompt(self.tokenizer, as_messages("x")))

    def _begins_reasoning(self, prompt_ids: Sequence[int]) -> bool:
        return self._raw(list(prompt_ids[-_TAIL:])).rstrip().endswith(self._marks[0])

    def read(self, ids: Sequence[int], prompt_ids: Sequence[int] | None = None) -> Response:
        """Parse a response of any length, including its stop token if one was sampled.

        Args:
            ids: The response's tokens.
            prompt_ids: Its prompt, which may begin the reasoning; None: decided by the chat template's prompts.
        """
        ids = list(ids)
        ended = bool(ids) and ids[-1] in self.stop_ids
        ids = ids[:-1] if ended else ids
        if self._marks is None:
            return Response(self._text(ids), None, ids, ended)
        opening, close, header = self._marks
        text = self._raw(ids)
        begun = self.prompted if prompt_ids is None else self._begins_reasoning(prompt_ids)
        if header and text.lstrip().startswith(header):
            start = self._first(ids, lambda text: text.lstrip().startswith(header))
            # An empty block of reasoning counts as none.
            return self._answered(ids, start, None, ended)
        if not begun and not text.lstrip().startswith(opening):
            # An answer may mention the tag that ends reasoning; the text before it must not be dropped.
            return Response(self._text(ids), None, ids, ended)
        reasoning, closed, _ = text.lstrip().removeprefix(opening).partition(close)
        if not closed:
            return Response("", reasoning.strip(), [], ended=False)
        start = self._first(ids, lambda text: close in text)
        return self._answered(ids, start, reasoning.strip() or None, ended)

    def row(self, ids: Sequence[int], prompt_ids: Sequence[int] | None = None) -> list[int]:
        """A response's tokens for a reward model: the answer's as sampled, and the end-of-turn token."""
        return [*self.read(ids, prompt_ids).answer_ids, self.end_id]

    def _answered(self, ids: list[int], start: int, reasoning: str | None, ended: bool) -> Response:
        while start < len(ids) and not self._raw(ids[start : start + 1]).strip():
            start += 1  # the line breaks before an answer
        return Response(self._text(ids[start:]), reasoning, ids[start:], ended)

    def _first(self, ids: list[int], holds: Callable[[str], bool]) -> int:
        """The smallest number of tokens for whose text ``holds`` is true; it must be monotonic."""
        return bisect_left(range(len(ids) + 1), True, key=lambda count: holds(self._raw(ids[:count])))

    def _raw(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def _marks(tokenizer: PreTrainedTokenizerBase, tags: Sequence[str] | None) -> tuple[str, str, str] | None:
    if tags is not None and (len(tags) != 2 or not all(tags)):
        raise UserError(
            "reasoning_tags must be the opening and the closing tag of reasoning.",
            fix="Write, for example, ['<think>', '</think>'].",
        )
    found = reasoning_marks(tokenizer, tags)
    if found is None and {*_COMMON_TAGS} <= {token.content for token in tokenizer.added_tokens_decoder.values()}:
        return (*_COMMON_TAGS, "")
    return found
