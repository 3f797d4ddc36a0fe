"""Conversations rendered by a chat template: which parts are data, and where answers and reasoning start."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from trl_rlaif.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Pieces of text, and whether each is data, in which nothing is a control token.
Parts = list[tuple[str, bool]]

# Markers of positions in a template's output. U+E000 in the data is marked itself, so no data can imitate them.
_ANSWER, _THOUGHT = "\ue000\ue001", "\ue000\ue000\ue001"
_DATA = re.compile("\ue000(\\d+)\ue001")
# Message fields in which templates look for the reasoning.
_THOUGHT_FIELDS = ("reasoning_content", "thinking", "reasoning")
# An open thinking block at the end of a text, and one at the start of an assistant message.
_NAME = r"[\w:]*(?:think|thought|reason)[\w:]*"
_OPENED = re.compile(rf"([<\[])({_NAME})([>\]])\s*$", re.IGNORECASE)
_SAID_THOUGHT = re.compile(r"\s*(?:<think>|\[THINK\])?(.*?)(?:</think>|\[/THINK\])", re.DOTALL)
# Words in a generation prompt that put the model into its reasoning, unless that is closed again.
_THINKS = re.compile(r"think|thought|reason|analysis", re.IGNORECASE)
_CLOSES = re.compile(r"</|\[/|end", re.IGNORECASE)

_TODAY = re.compile(r"""\bstrftime_now\(\s*(["'])(.*?)\1\s*\)""")


def has_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer's chat template writes today's date."""
    return isinstance(tokenizer.chat_template, str) and _TODAY.search(tokenizer.chat_template) is not None


def dated(template: str, day: date) -> str:
    """A chat template that uses a given day as today, so its output does not change tomorrow."""
    return _TODAY.sub(lambda found: json.dumps(day.strftime(found[2])), template)


@lru_cache(maxsize=8)
def _lookalikes(control: re.Pattern[str] | None) -> re.Pattern[str]:
    return re.compile("\ue000" if control is None else f"{control.pattern}|\ue000")


class Conversation:
    """Messages rendered by a chat template.

    Text in messages that looks like a control token is replaced by a marker for rendering, and restored as data
    afterwards. The exception is the thinking block at the start of an assistant message: the template sees it
    unchanged, and drops or keeps it.

    Args:
        tokenizer: With a chat template.
        messages: With ``role`` and ``content``; other fields are passed to the template.
        control: Matches text that the tokenizer would parse as a control token; None if there are none.
        kwargs: Variables for the template, such as ``enable_thinking``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: Sequence[dict[str, Any]],
        control: re.Pattern[str] | None,
        kwargs: dict[str, Any],
    ) -> None:
        self._tokenizer, self.control, self._kwargs = tokenizer, control, kwargs
        self._lookalike = _lookalikes(control)
        self._data: list[str] = []
        self._messages = [self._marked_message(message) for message in messages]

    # ---- Data -----------------------------------------------------------------------------------------

    def _marked_message(self, message: dict[str, Any]) -> dict[str, Any]:
        given = {key: value for key, value in message.items() if value is not None}
        content = given.get("content")
        thought = given.get("role") == "assistant" and isinstance(content, str) and _SAID_THOUGHT.match(content)
        marked = self._marked(given)
        if thought:
            start, end = thought.span(1)
            pieces = self._marked([thought[1], content[thought.end() :]])
            marked["content"] = content[:start] + pieces[0] + content[end : thought.end()] + pieces[1]
        return marked

    def _marked(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._lookalike.sub(self._mark, value)
        if isinstance(value, dict):
            return {self._marked(key): self._marked(item) for key, item in value.items()}
        return [self._marked(item) for item in value] if isinstance(value, list | tuple) else value

    def _mark(self, found: re.Match[str]) -> str:
        self._data.append(found[0])
        return f"\ue000{len(self._data) - 1}\ue001"

    def _parts(self, text: str) -> Parts:
        pieces = _DATA.split(text)
        return [(self._data[int(piece)], True) if i % 2 else (piece, False) for i, piece in enumerate(pieces)]

    # ---- Rendering ------------------------------------------------------------------------------------

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return self._tokenizer.apply_chat_template(messages, tokenize=False, **{**self._kwargs, **options})

    @property
    def _continues(self) -> bool:
        """Whether the last message is the assistant's, to be continued."""
        return self._messages[-1]["role"] == "assistant"

    def _prompt(self) -> str:
        if self._continues:
            return self._render(self._messages, continue_final_message=True)
        return self._render(self._messages, add_generation_prompt=True)

    def _said(self, **fields: str) -> str | None:
        """The conversation with another assistant message; None if the template does not accept one."""
        try:
            return self._render([*self._messages, {"role": "assistant", **fields}], add_generation_prompt=False)
        except Exception:  # expressions in templates may raise anything
            return None

    def _answer_start(self) -> str:
        """The text up to the start of an answer, including whatever opens an assistant message."""
        prompt = self._prompt()
        if self._continues:
            return prompt
        said = self._said(content=_ANSWER)
        if said is not None and _ANSWER not in said:
            raise UserError(
                "The chat template drops the assistant's text, so an answer cannot be started.",
                fix="Set tokenizer.chat_template to one that renders messages with text content.",
            )
        before = said[: said.rindex(_ANSWER)] if said else ""
        start = prompt if prompt.startswith(before) else before
        opened = _OPENED.search(start)
        own = start[len(before) or -40 :] if start == prompt else ""
        if not opened and _THINKS.search(own) and not _CLOSES.search(own):
            raise UserError(
                f"The chat template has no place for an answer without reasoning: it starts the model's turn with "
                f"{own[-40:]!r}.",
                fix="Turn its thinking off with chat_template_kwargs (many templates take enable_thinking: false).",
            )
        return start + _closing(opened) if opened else start

    def _thought_places(self) -> tuple[str, str] | None:
        """The text up to the start of the reasoning, and the text from its end to the answer."""
        prompt = self._prompt()
        said = self._said(content=_ANSWER, **dict.fromkeys(_THOUGHT_FIELDS, _THOUGHT)) or ""
        start, _, rest = said.partition(_THOUGHT)
        # With thinking turned off, a template has already closed the block, or not opened one.
        if _ANSWER in rest and start.startswith(prompt):
            return start, rest[: rest.rindex(_ANSWER)]
        opened = _OPENED.search(prompt)
        return (prompt, _closing(opened)) if opened else None

    # ---- Prompts --------------------------------------------------------------------------------------

    def prompt(self) -> Parts:
        """Up to the start of the assistant's turn, or to the end of its last message, if that is to be continued."""
        return self._parts(self._prompt())

    def answer(self, opening: str) -> Parts:
        """Up to the end of an answer's opening, without reasoning before it.

        Raises:
            UserError: The template has no place for an answer without reasoning.
        """
        return [*self._parts(self._answer_start()), (opening, True)]

    def thinking(self) -> Parts | None:
        """Up to the start of the model's reasoning; None if the template has none, or it is turned off."""
        places = self._thought_places()
        return places and self._parts(places[0])

    def answer_behind(self, thought: str, opening: str) -> Parts:
        """Like ``answer``, after a given reasoning; only if ``thinking`` is not None."""
        start, close = self._thought_places()
        return [*self._parts(start), (thought, True), (close, False), (opening, True)]

    @property
    def thought_end(self) -> str:
        """The text that ends the model's reasoning; only if ``thinking`` is not None."""
        close = self._thought_places()[1].strip()
        token = self.control.search(close) if self.control else None
        return close[: token.end()] if token else close

    def reasoning_marks(self) -> tuple[str, str, str] | None:
        """Markers that separate a response's reasoning from its answer; None if the template has no reasoning.

        Returns:
            The text that begins the reasoning, in the response or at the end of the prompt; the text between reasoning
            and answer; and the text that begins an answer without reasoning.
        """
        prompt, places = self._prompt(), self._thought_places()
        if places is None:
            return None
        said = self._said(content=_ANSWER) or ""
        header = said[len(prompt) : said.rindex(_ANSWER)] if _ANSWER in said and said.startswith(prompt) else ""
        opened = _OPENED.search(prompt)
        opening = places[0][len(prompt) :] or (opened[0] if opened else "")
        return tuple(text.strip() for text in (opening, places[1], header))


def _closing(opened: re.Match[str]) -> str:
    """The text that closes a thinking block, with line breaks as in its opening."""
    line = "\n" if opened[0].endswith("\n") else ""
    return f"{line}{opened[1]}/{opened[2]}{opened[3]}{line * 2}"
