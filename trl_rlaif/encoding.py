"""Encodes prompts and responses as token ids in which no text from the data becomes a special token.

Sampling, judging, the reward model and PPO share these functions: in RL, a reward model sees the same token
layout that it was trained on (prompt, response, end token).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from trl_rlaif.chat_templates import Conversation
from trl_rlaif.errors import UserError
from trl_rlaif.stopping import end_of_turn
from trl_rlaif.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptLike = str | Sequence[dict[str, Any]]

# The attribute of a tokenizer that holds the variables for its chat template.
_KWARGS = "_trl_rlaif_template_kwargs"


def as_messages(prompt: PromptLike) -> list[dict[str, Any]]:
    """Convert a prompt to chat messages; a text becomes one user turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def as_text(prompt: PromptLike) -> str:
    """Convert a prompt to plain text for a person or a judge; several turns are prefixed with their roles."""
    messages = as_messages(prompt)
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in messages)


def follow_up(prompt: PromptLike, response: str, request: str) -> list[dict[str, Any]]:
    """Continue a conversation with the response to a prompt and the user's next request.

    Raises:
        UserError: The prompt is already rendered by a chat template, so its turns are unknown.
    """
    if isinstance(prompt, RenderedText):
        raise UserError(
            "The prompts are already rendered by a chat template, so nothing can follow the response.",
            fix="Give them as texts or messages.",
        )
    *before, last = as_messages(prompt)
    if last["role"] == "assistant":  # which the response continues
        before, response = list(before), last["content"] + response
    else:
        before = [*before, last]
    return [*before, {"role": "assistant", "content": response}, {"role": "user", "content": request}]


def chat_prompt(prompt: PromptLike, tokenizer: PreTrainedTokenizerBase) -> PromptLike:
    """A prompt in the form that the model was trained on: messages if it has a chat template.

    A text already rendered by a chat template is not wrapped again (see ``is_rendered``).
    """
    prompt = as_rendered(prompt, tokenizer)
    return as_messages(prompt) if tokenizer.chat_template and not isinstance(prompt, RenderedText) else prompt


@dataclass(frozen=True)
class _ControlTokens:
    """Patterns of the tokens that text must not become; None if there are none.

    Args:
        flagged: Tokens that the tokenizer marks as special.
        all: Also tokens added without that mark: <think>, those in the chat template, such as DeepSeek's <｜User｜>,
            and others of that form. Other added markup, such as Gemma's <table>, is text.
    """

    flagged: re.Pattern[str] | None
    all: re.Pattern[str] | None


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> _ControlTokens:
    # Everything that the result depends on is part of the cache key: users may change it.
    special = tuple(str(token) for token in tokenizer.all_special_tokens)
    return _cached_control_tokens(tokenizer, special, str(tokenizer.chat_template or ""))


@lru_cache(maxsize=16)
def _cached_control_tokens(
    tokenizer: PreTrainedTokenizerBase, special: tuple[str, ...], template: str
) -> _ControlTokens:
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    flagged = {*special, *(token.content for token in added if token.special)}
    controls = re.compile(r"[<\[][|｜].+[>\]]|</?think>")
    unflagged = {t.content for t in added if t.content in template or controls.fullmatch(t.content)}
    return _ControlTokens(_any_of(flagged), _any_of(flagged | unflagged))


def _any_of(tokens: set[str]) -> re.Pattern[str] | None:
    longest_first = sorted(filter(None, tokens), key=lambda token: (-len(token), token))
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None


def _plain(
    tokenizer: PreTrainedTokenizerBase, text: str, pattern: re.Pattern[str] | None, *, follows: bool
) -> list[int]:
    """Ids of text without control tokens: text that looks like one is split after its first character.

    Args:
        pattern: Matches the control tokens.
        follows: Whether other text precedes it. A tokenizer may add a space at the start of a text, which must not
            appear in the middle.
    """
    cuts = [match.start() + 1 for match in pattern.finditer(text)] if pattern else []
    ids: list[int] = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        piece = text[start:end]
        if not piece:
            continue
        before = tokenizer.eos_token if follows or start else ""
        encoded = tokenizer(before + piece, add_special_tokens=False)["input_ids"]
        ids += encoded[1:] if before else encoded
    return ids


def _encode_parts(tokenizer: PreTrainedTokenizerBase, parts: Sequence[tuple[str, bool]]) -> list[int]:
    """Encode (text, is_data) parts; special tokens are parsed only in parts that are not data."""
    pattern = _control_tokens(tokenizer).all
    ids: list[int] = []
    pending = ""
    for text, is_data in parts:
        pieces = [text] if is_data or pattern is None else pattern.split(text)
        for position, piece in enumerate(pieces):
            if position % 2:
                ids += _plain(tokenizer, pending, pattern, follows=bool(ids))
                ids.append(tokenizer.convert_tokens_to_ids(piece))
                pending = ""
            else:
                pending += piece
    return ids + _plain(tokenizer, pending, pattern, follows=bool(ids))


def _first_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a tokenizer puts before any text."""
    full, bare = tokenizer("x")["input_ids"], tokenizer("x", add_special_tokens=False)["input_ids"]
    count = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return full[:count]


# ---- Text already rendered by a chat template --------------------------------------------------------------


class RenderedText(str):
    """A text whose control tokens are parsed as such; only made from users' prompts."""

    __slots__ = ()


def _openings(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The control tokens with which the chat template can begin, for either first role."""
    return _openings_of(tokenizer, str(tokenizer.chat_template), tokenizer.bos_token)


@lru_cache(maxsize=8)  # rendering is too slow for every prompt
def _openings_of(tokenizer: PreTrainedTokenizerBase, template: str, bos: str | None) -> frozenset[str]:
    pattern, found = _control_tokens(tokenizer).all, set()
    for roles in (("user",), ("system", "user")):
        try:
            messages = [{"role": role, "content": "x"} for role in roles]
            rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError:  # a template without system turns
            continue
        while pattern is not None and (token := pattern.match(rendered)):
            found.add(token[0])
            rendered = rendered[token.end() :]
    return frozenset(found)


def is_rendered(prompt: PromptLike, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text was rendered by the tokenizer's chat template: it begins with one of its first control tokens."""
    if not isinstance(prompt, str) or not tokenizer.chat_template:
        return False
    return prompt.startswith(tuple(_openings(tokenizer)))


def as_rendered(prompt: PromptLike, tokenizer: PreTrainedTokenizerBase) -> PromptLike:
    """Convert a prompt rendered by a chat template to RenderedText; return any other unchanged.

    The template's BOS token is added if it is missing; it is dropped if the tokenizer puts it before every text anyway,
    here and in TRL's trainers.
    """
    if not isinstance(prompt, str) or not is_rendered(prompt, tokenizer):
        return prompt
    bos = tokenizer.bos_token
    if not bos or bos not in _openings(tokenizer):
        return RenderedText(prompt)
    bare = prompt.removeprefix(bos)
    own = _first_ids(tokenizer) == [tokenizer.bos_token_id] and is_rendered(bare, tokenizer)
    return RenderedText(bare if own else bos + bare)


def _rendered_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of RenderedText, with its control tokens."""
    bos = tokenizer.bos_token
    missing = bos and bos in _openings(tokenizer) and not text.startswith(bos)
    return tokenizer(bos + text if missing else text, add_special_tokens=False)["input_ids"]


def without_end_of_turn(tokenizer: PreTrainedTokenizerBase, response: str) -> str:
    """A response without the end-of-turn token of the chat template, if it ends with that."""
    end = tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer))
    found = response.rstrip()
    return found.removesuffix(end).rstrip() if end and found.endswith(end) else response


# ---- Prompts ------------------------------------------------------------------------------------------------


def template_kwargs(tokenizer: PreTrainedTokenizerBase, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Variables for a tokenizer's chat template: its own, set by ``set_template_kwargs``, overridden by those given."""
    return {**getattr(tokenizer, _KWARGS, {}), **(given or {})}


def set_template_kwargs(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Set variables of the tokenizer's chat template, with which it encodes every prompt from now on; return it.

    They are not saved with it. A keyword or column ``chat_template_kwargs``, as in TRL, overrides them.

    Args:
        tokenizer: Modified in place.
        kwargs: Such as ``{"enable_thinking": False}`` or ``{"reasoning_effort": "low"}``.
    """
    setattr(tokenizer, _KWARGS, dict(kwargs))
    return tokenizer


def _encode(tokenizer: PreTrainedTokenizerBase, parts: Sequence[tuple[str, bool]]) -> list[int]:
    """Encode (text, is_data) parts; in one call if no data looks like a control token."""
    pattern = _control_tokens(tokenizer).all
    if pattern is None or not any(is_data and pattern.search(text) for text, is_data in parts):
        return tokenizer("".join(text for text, _ in parts), add_special_tokens=False)["input_ids"]
    return _encode_parts(tokenizer, parts)


def _conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], kwargs: Mapping[str, Any] | None
) -> Conversation:
    if not tokenizer.chat_template:
        raise UserError(
            "The prompts are conversations, and the tokenizer has no chat template.",
            fix="Use a chat model, set tokenizer.chat_template, or give the prompts as text.",
        )
    return Conversation(tokenizer, messages, _control_tokens(tokenizer).all, template_kwargs(tokenizer, kwargs))


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptLike,
    *,
    opening: str | None = None,
    thought: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a prompt up to the start of the response.

    Args:
        tokenizer: With a chat template, if the prompt is a list of messages.
        prompt: Text (encoded as it is, after the tokenizer's own first token), or messages (rendered by the chat
            template up to the assistant's turn; if the last message is the assistant's, up to its end).
        opening: Text that opens the response, such as a judge's ending. It goes where the template puts the assistant's
            text; a thinking block that the template opens is closed first.
        thought: The model's reasoning before the opening; only if ``thinking_prompt`` is not None.
        chat_template_kwargs: Variables for the template; override the tokenizer's own.

    Returns:
        Ids. Text that looks like a special token stays text, except in a RenderedText.

    Raises:
        UserError: The prompt is messages, and the tokenizer has no chat template, or one without a place for the
            opening.
    """
    pattern = _control_tokens(tokenizer).all
    if isinstance(prompt, RenderedText):
        return _rendered_ids(tokenizer, prompt) + _plain(tokenizer, opening or "", pattern, follows=True)
    if isinstance(prompt, str):
        text = prompt + (opening or "")
        if pattern is None or not pattern.search(text):
            return tokenizer(text)["input_ids"]
        return _first_ids(tokenizer) + _plain(tokenizer, text, pattern, follows=False)
    conversation = _conversation(tokenizer, prompt, chat_template_kwargs)
    if thought is not None:
        return _encode(tokenizer, conversation.answer_behind(thought, opening or ""))
    return _encode(tokenizer, conversation.prompt() if opening is None else conversation.answer(opening))


def thinking_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[int], str] | None:
    """Token ids of messages up to the start of the model's reasoning, and the text that ends the reasoning.

    None if the chat template has no reasoning, or ``chat_template_kwargs`` turn it off.
    """
    conversation = _conversation(tokenizer, messages, chat_template_kwargs)
    parts = conversation.thinking()
    return None if parts is None else (_encode(tokenizer, parts), conversation.thought_end)


def reasoning_marks(
    tokenizer: PreTrainedTokenizerBase, tags: Sequence[str] | None = None
) -> tuple[str, str, str] | None:
    """Markers that separate reasoning from answer, by the chat template (see ``Conversation.reasoning_marks``).

    Args:
        tags: Opening and closing tag of reasoning, instead of the template's.
    """
    if tags is not None:
        opening, closing = tags
        return opening, closing, ""
    if not tokenizer.chat_template:
        return None
    return _conversation(tokenizer, as_messages("x"), None).reasoning_marks()


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str) -> list[int]:
    """Token ids of a response as a model would have sampled it, with the end-of-turn token.

    Only tokens marked as special are kept out: a policy writes others, such as <think>, as one token each.
    """
    flagged = _control_tokens(tokenizer).flagged
    return [*_plain(tokenizer, response, flagged, follows=True), end_of_turn(tokenizer)]


def usable_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give the tokenizer a padding token that ends no response, if its vocabulary has one; return it.

    If padding and end token were the same, code that finds a response's end by its padding would never see the end
    token, and a policy would not learn to stop.

    Raises:
        UserError: There is no end token at all.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("The tokenizer has no end-of-sequence token.", fix="Set tokenizer.eos_token.")
    ends = (tokenizer.eos_token_id, end_of_turn(tokenizer))
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        tokenizer.pad_token = _spare_token(tokenizer) or tokenizer.eos_token
    return tokenizer


def _spare_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A token that no text or template contains: a padding token, or else a reserved, unknown or special one."""
    template = str(tokenizer.chat_template or "")
    used = {tokenizer.eos_token_id, tokenizer.bos_token_id, end_of_turn(tokenizer)}
    spare = {id: t.content for id, t in sorted(tokenizer.added_tokens_decoder.items()) if t.content not in template}
    meant = [t for t in spare.values() if re.fullmatch(r"[<\[]\W*pad\W*[>\]]|.*_pad_id.*", t, re.IGNORECASE)]
    reserved = [t for t in spare.values() if re.search("reserved|unused", t, re.IGNORECASE)]
    special = [str(t) for t in (tokenizer.unk_token, *tokenizer.all_special_tokens) if t and str(t) not in template]
    candidates = (*meant, *reserved, *special)
    return next((t for t in candidates if tokenizer.convert_tokens_to_ids(t) not in used), None)
