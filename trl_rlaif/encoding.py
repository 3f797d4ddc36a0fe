"""Prompts and responses to token ids, so that no text in the data can pass for a special token.

The same functions serve sampling, judging, the reward model and PPO: a reward model sees at RL time the
very layout of tokens that it was trained on (prompt, response, end token).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from trl_rlaif.errors import UserError
from trl_rlaif.stopping import end_of_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptLike = str | Sequence[dict[str, Any]]


def as_messages(prompt: PromptLike) -> list[dict[str, Any]]:
    """A prompt as chat messages: a text becomes one user turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def as_text(prompt: PromptLike) -> str:
    """A prompt as plain text for a person or a judge: one turn as it is, several with their speakers."""
    messages = as_messages(prompt)
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in messages)


def chat_prompt(prompt: PromptLike, tokenizer: PreTrainedTokenizerBase) -> PromptLike:
    """A text prompt in the form that the model was taught: messages where it has a chat template."""
    return as_messages(prompt) if tokenizer.chat_template else prompt


@dataclass(frozen=True)
class _ControlTokens:
    """Patterns of the tokens that text must not become; None where there are none.

    Args:
        flagged: Those that the tokenizer itself calls special.
        all: Also those that were added without the flag: what the chat template writes, such as <think> or
            DeepSeek's <｜User｜>, and others of that form. Markup that was added for its own sake, such as Gemma's
            <table>, is text.
    """

    flagged: re.Pattern[str] | None
    all: re.Pattern[str] | None


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> _ControlTokens:
    # What the answer depends on is part of the cache's key: users change all of it.
    special = tuple(str(token) for token in tokenizer.all_special_tokens)
    return _cached_control_tokens(tokenizer, special, str(tokenizer.chat_template or ""))


@lru_cache(maxsize=16)
def _cached_control_tokens(
    tokenizer: PreTrainedTokenizerBase, special: tuple[str, ...], template: str
) -> _ControlTokens:
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    flagged = {*special, *(token.content for token in added if token.special)}
    unflagged = {t.content for t in added if t.content in template or re.fullmatch(r"[<\[][|｜].+[>\]]", t.content)}
    return _ControlTokens(_any_of(flagged), _any_of(flagged | unflagged))


def _any_of(tokens: set[str]) -> re.Pattern[str] | None:
    longest_first = sorted(filter(None, tokens), key=lambda token: (-len(token), token))
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None


def _plain(
    tokenizer: PreTrainedTokenizerBase, text: str, pattern: re.Pattern[str] | None, *, follows: bool
) -> list[int]:
    """Ids of text in which nothing is a control token: what looks like one is cut after its first character.

    Args:
        pattern: Matches the control tokens.
        follows: Whether something stands before the text. A tokenizer may begin a text with a space of its
            own, which must not come up in the middle.
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
    """Encode (text, is_data) parts; special tokens are parsed in what is not data only."""
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
    """What a tokenizer puts before any text."""
    full, bare = tokenizer("x")["input_ids"], tokenizer("x", add_special_tokens=False)["input_ids"]
    count = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return full[:count]


def _render_parts(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], opening: str
) -> list[tuple[str, bool]]:
    """The chat template's own text and the messages' contents, in order, told apart.

    The template sees a mark in place of each content, with a space on both sides: where it takes a space
    away, it trims contents, and so the content is trimmed there, too.
    """
    marks = {f"\ue000{i}\ue001": message["content"] for i, message in enumerate(messages)}
    marked = [{**m, "content": f" {mark} "} for m, mark in zip(messages, marks, strict=True)]
    rendered = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
    parts: list[tuple[str, bool]] = []
    end = 0
    for found in re.finditer("( ?)(\ue000\\d+\ue001)( ?)", rendered):
        content = marks[found[2]]
        content = content if found[1] else content.lstrip()
        content = content if found[3] else content.rstrip()
        parts += [(rendered[end : found.start()], False), (content, True)]
        end = found.end()
    return [*parts, (rendered[end:], False), (opening, True)]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: PromptLike, *, opening: str = "") -> list[int]:
    """Token ids of a prompt up to where the response begins.

    Args:
        tokenizer: With a chat template, if the prompt is a list of messages.
        prompt: Text (encoded as it is, with the tokenizer's own first token), or messages (through the
            chat template, up to the assistant's turn).
        opening: Text that opens the response, such as a judge's ending.

    Returns:
        Ids. Text that looks like a special token stays text.

    Raises:
        UserError: Messages, and a tokenizer without chat template.
    """
    pattern = _control_tokens(tokenizer).all
    if isinstance(prompt, str):
        if pattern is None or not pattern.search(prompt + opening):
            return tokenizer(prompt + opening)["input_ids"]
        return _first_ids(tokenizer) + _plain(tokenizer, prompt + opening, pattern, follows=False)
    if not tokenizer.chat_template:
        raise UserError(
            "The prompts are conversations, and the tokenizer has no chat template.",
            fix="Use a chat model, set tokenizer.chat_template, or give the prompts as text.",
        )
    messages = list(prompt)
    hostile = pattern is not None and any(pattern.search(text) for text in (*(m["content"] for m in messages), opening))
    if hostile:
        return _encode_parts(tokenizer, _render_parts(tokenizer, messages, opening))
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(rendered + opening, add_special_tokens=False)["input_ids"]


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str) -> list[int]:
    """Token ids of a response as a model would have sampled it, with the end of its turn.

    Only tokens that are flagged special are kept out: a policy writes others, such as <think>, as one token each.
    """
    flagged = _control_tokens(tokenizer).flagged
    return [*_plain(tokenizer, response, flagged, follows=True), end_of_turn(tokenizer)]


def usable_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with a padding token that ends no response, where its vocabulary has one.

    With both the same, whoever finds the end of a response by looking for padding never sees the end
    token, and a policy does not learn to stop.

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
    """A token that no text and no template contains: meant for padding, or else reserved, unknown or special."""
    template = str(tokenizer.chat_template or "")
    used = {tokenizer.eos_token_id, tokenizer.bos_token_id, end_of_turn(tokenizer)}
    spare = {id: t.content for id, t in sorted(tokenizer.added_tokens_decoder.items()) if t.content not in template}
    meant = [t for t in spare.values() if re.fullmatch(r"[<\[]\W*pad\W*[>\]]|.*_pad_id.*", t, re.IGNORECASE)]
    reserved = [t for t in spare.values() if re.search("reserved|unused", t, re.IGNORECASE)]
    special = [str(t) for t in (tokenizer.unk_token, *tokenizer.all_special_tokens) if t and str(t) not in template]
    candidates = (*meant, *reserved, *special)
    return next((t for t in candidates if tokenizer.convert_tokens_to_ids(t) not in used), None)
