"""A local judge's text before its answer: a rationale that its prompt asks for, or the model's own reasoning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trl_rlaif.encoding import encode_prompt, thinking_prompt
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.judging.question import Message, Question
from trl_rlaif.stopping import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EMPTY: list[Message] = [{"role": "user", "content": ""}]


class Writing:
    """Questions as tokens, with any text written before their endings: here, none.

    Args:
        tokenizer: With a chat template, questions go through it; without, they are plain text.
        prompt: The prompt; no rationale may imitate its headers.
        kwargs: Variables for the chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: JudgePrompt, kwargs: Mapping[str, Any]) -> None:
        self.tokenizer, self.prompt, self.kwargs = tokenizer, prompt, kwargs

    def encode(self, messages: Sequence[Message], opening: str, thought: str | None = None) -> list[int]:
        """Token ids of messages and the start of their answer."""
        if not self.tokenizer.chat_template:
            text = "".join(message["content"] + "\n\n" for message in messages)
            return encode_prompt(self.tokenizer, text, opening=opening)
        how = {"opening": opening, "thought": thought, "chat_template_kwargs": self.kwargs}
        return encode_prompt(self.tokenizer, list(messages), **how)

    def opened(self, opening: str) -> list[int]:
        """Token ids of an empty question with the start of its answer, for comparing endings and candidates."""
        return self.encode(_EMPTY, opening)

    def begin(self, question: Question) -> list[int]:
        """Token ids up to where the judge begins to write or to answer."""
        return self.encode(question.messages, question.ending)


class Rationale(Writing):
    """A rationale that the prompt asks for, placed before the ending (two-step chain of thought)."""

    def begin(self, question: Question) -> list[int]:
        """Token ids up to where the rationale begins."""
        return self.encode(question.messages, question.thinking)

    def behind(self, question: Question, text: str) -> list[int]:
        """Token ids up to where the candidates are read, after the rationale."""
        opening = f"{question.thinking} {self.prompt.quote(text)}\n\n{question.ending}"
        return self.encode(question.messages, opening)

    def stop_ids(self, model: Any) -> tuple[int, ...]:
        """The tokens that end the text."""
        return stop_ids(self.tokenizer, model)

    def room(self, ending: str) -> int:
        """Tokens between a rationale and the candidates."""
        return len(self.encode(_EMPTY, f" \n\n{ending}")) - len(self.encode(_EMPTY, ""))

    def texts(self, rows: Sequence[Sequence[int]], ending: str) -> list[str]:
        """The rationales. If the judge continues to the answer itself, that part is removed."""
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [(text.split(ending.strip())[0] if ending.strip() else text).strip() for text in texts]


class Thoughts(Rationale):
    """The model's own reasoning, where its chat template places it.

    Args:
        tokenizer, prompt, kwargs: As in Writing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: JudgePrompt, kwargs: Mapping[str, Any]) -> None:
        # For templates with optional thinking. The others ignore it.
        super().__init__(tokenizer, prompt, {"enable_thinking": True, **kwargs})

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, prompt: JudgePrompt, kwargs: Mapping[str, Any]) -> Thoughts | None:
        """None if the model has no reasoning of its own, or it is disabled."""
        if not tokenizer.chat_template or kwargs.get("enable_thinking") is False:
            return None
        made = cls(tokenizer, prompt, kwargs)
        return made if made._begun(_EMPTY) is not None else None

    def _begun(self, messages: Sequence[Message]) -> tuple[list[int], str] | None:
        return thinking_prompt(self.tokenizer, list(messages), chat_template_kwargs=self.kwargs)

    def opened(self, opening: str) -> list[int]:
        """As in Writing, after a thought of one token."""
        return self.encode(_EMPTY, opening, thought="x")

    def begin(self, question: Question) -> list[int]:
        """Token ids up to where the thoughts begin."""
        return self._begun(question.messages)[0]

    def behind(self, question: Question, text: str) -> list[int]:
        """Token ids up to where the candidates are read: the thoughts are closed, whether or not the model did."""
        return self.encode(question.messages, question.ending, thought=text)

    def stop_ids(self, model: Any) -> tuple[int, ...]:
        """The tokens that end the text; also the model's end-of-thought mark, if it is one token."""
        end = self.tokenizer(self._begun(_EMPTY)[1], add_special_tokens=False)["input_ids"]
        return (*super().stop_ids(model), *(end if len(end) == 1 else ()))

    def room(self, ending: str) -> int:
        """Tokens between the thoughts and the candidates."""
        return len(self.opened(ending)) - len(self._begun(_EMPTY)[0]) - 1  # the thought's own token

    def texts(self, rows: Sequence[Sequence[int]], ending: str) -> list[str]:
        """The thoughts, up to the model's end mark or the token budget."""
        end = self._begun(_EMPTY)[1]
        # With special tokens, since the end mark often is one.
        return [text.split(end)[0].strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=False)]
