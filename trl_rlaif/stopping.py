"""The tokens that end a response: those that stop sampling, and the one that ends responses in reward rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from trl_rlaif.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\ue000"


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that the chat template puts after an assistant's turn; without a template, the tokenizer's eos.

    For many models it is not the tokenizer's eos: ``<end_of_turn>`` (Gemma), ``<|end|>`` (Phi-3), ``<|user|>`` (GLM-4,
    whose template ends a turn by beginning the next one). It ends every response in the rows of a reward model.
    """
    # The attributes that the result depends on are part of the cache key: users change both.
    return _end_of_turn(tokenizer, str(tokenizer.chat_template), tokenizer.eos_token_id)


@lru_cache(maxsize=16)
def _end_of_turn(tokenizer: PreTrainedTokenizerBase, template: str, eos_id: int) -> int:
    if not tokenizer.chat_template:
        return eos_id
    user, assistant = {"role": "user", "content": "x"}, {"role": "assistant", "content": _MARK}
    known = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    known[tokenizer.eos_token] = eos_id
    for messages in ([user, assistant], [user, assistant, user]):
        try:
            rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception:  # a template may raise anything for messages that it does not expect
            continue
        after = rendered.rpartition(_MARK)[2].lstrip()
        if found := [token for token in known if after.startswith(token)]:
            return known[max(found, key=len)]
        if after:
            break  # the turn ends in plain text
    return eos_id


def stop_ids(tokenizer: PreTrainedTokenizerBase, model: Any = None) -> tuple[int, ...]:
    """The tokens that stop sampling.

    Args:
        tokenizer: Its end of turn and its eos are among them.
        model: Its generation config's ``eos_token_id``, one or a list, is included, too.

    Returns:
        Token ids without repetition; the end of turn is the first.
    """
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    configured = [configured] if isinstance(configured, int) else configured or []
    return tuple(dict.fromkeys([end_of_turn(tokenizer), tokenizer.eos_token_id, *configured]))


def named_stop_ids(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str | int]) -> tuple[int, ...]:
    """Token ids of a user's own stop tokens, given as texts or as ids.

    Raises:
        UserError: There are none, or one of them is not a single token of the vocabulary.
    """
    if isinstance(tokens, str):
        raise UserError(f"stop_tokens is the string {tokens!r}.", fix=f"Give a list: [{tokens!r}].")
    vocabulary = tokenizer.get_vocab()
    unknown = [t for t in tokens if not (0 <= t < len(tokenizer) if isinstance(t, int) else t in vocabulary)]
    if unknown or not tokens:
        what = f"stop_tokens: {unknown[0]!r} is not a token of this tokenizer." if unknown else "stop_tokens is empty."
        raise UserError(what, fix="Give tokens of its vocabulary, such as '<|im_end|>', or their ids.")
    return tuple(dict.fromkeys(t if isinstance(t, int) else vocabulary[t] for t in tokens))


def chosen_stop_ids(
    tokenizer: PreTrainedTokenizerBase,
    model: Any,
    *,
    stop_tokens: Sequence[str | int] | None = None,
    stop_token_id: int | None = None,
    stop_token: str | None = "eos",
) -> tuple[int, ...]:
    """The tokens that end a response, by the settings of the same names in PPOConfig.

    The first that applies: ``stop_tokens``; ``stop_token_id``; with ``stop_token: eos``, ``stop_ids``; otherwise none,
    and responses are sampled to the full length.

    Raises:
        UserError: As in ``named_stop_ids``.
    """
    if stop_tokens is not None:
        return named_stop_ids(tokenizer, stop_tokens)
    if stop_token_id is not None:
        return (stop_token_id,)
    return stop_ids(tokenizer, model) if stop_token == "eos" else ()


def ended_row(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A tokenized conversation that ends with the end of its last turn.

    Whitespace that the template writes after it, such as a line break, is cut off; if the template leaves the end token
    to the next turn, it is appended.
    """
    end, stops = end_of_turn(tokenizer), stop_ids(tokenizer)
    last = next((i for i in reversed(range(len(ids))) if ids[i] in stops), len(ids))
    return [*ids, end] if tokenizer.decode(ids[last + 1 :]).strip() or last == len(ids) else [*ids[:last], end]
