"""Prompts and responses to token ids, so that no text in the data can pass for a special token.

The same functions serve sampling, judging, the reward model and PPO: a reward model sees at RL time the
very layout of tokens that it was trained on (prompt, response, end token).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from trl_rlaif.errors import UserError

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


@lru_cache(maxsize=8)
def _special_pattern(tokens: tuple[str, ...]) -> re.Pattern[str] | None:
    if not tokens:
        return None
    return re.compile("(" + "|".join(re.escape(t) for t in sorted(tokens, key=len, reverse=True)) + ")")


def _specials(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Matches what a tokenizer would take for a control token; None if there is nothing of the kind."""
    added = tokenizer.added_tokens_decoder.values()
    tokens = {str(t) for t in tokenizer.all_special_tokens}
    # Some control tokens, such as <think>, are added without the flag; added white space is no control.
    tokens |= {t.content for t in added if t.special or re.fullmatch(r"[<\[].+[>\]]", t.content)}
    return _special_pattern(tuple(sorted(t for t in tokens if t)))


def _plain(tokenizer: PreTrainedTokenizerBase, text: str, *, follows: bool) -> list[int]:
    """Ids of text in which nothing is a control token: what looks like one is cut after its first character.

    Args:
        follows: Whether something stands before the text. A tokenizer may begin a text with a space of its
            own, which must not come up in the middle.
    """
    pattern = _specials(tokenizer)
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
    pattern = _specials(tokenizer)
    ids: list[int] = []
    pending = ""
    for text, is_data in parts:
        pieces = [text] if is_data or pattern is None else pattern.split(text)
        for position, piece in enumerate(pieces):
            if position % 2:
                ids += _plain(tokenizer, pending, follows=bool(ids))
                ids.append(tokenizer.convert_tokens_to_ids(piece))
                pending = ""
            else:
                pending += piece
    return ids + _plain(tokenizer, pending, follows=bool(ids))


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
    pattern = _specials(tokenizer)
    if isinstance(prompt, str):
        if pattern is None or not pattern.search(prompt + opening):
            return tokenizer(prompt + opening)["input_ids"]
        return _first_ids(tokenizer) + _plain(tokenizer, prompt + opening, follows=False)
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
    """Token ids of a response as a model would have sampled it, with the end token."""
    return [*_plain(tokenizer, response, follows=True), tokenizer.eos_token_id]


def usable_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with a padding token that is not the end token, where its vocabulary has one.

    With both the same, whoever finds the end of a response by looking for padding never sees the end
    token, and a policy does not learn to stop.

    Raises:
        UserError: There is no end token at all.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("The tokenizer has no end-of-sequence token.", fix="Set tokenizer.eos_token.")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        spare = [tokenizer.unk_token, *tokenizer.all_special_tokens]
        usable = [t for t in spare if t and t not in (tokenizer.eos_token, tokenizer.bos_token)]
        tokenizer.pad_token = usable[0] if usable else tokenizer.eos_token
    return tokenizer
