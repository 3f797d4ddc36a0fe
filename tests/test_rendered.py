"""Text already rendered by a chat template, and assistant turns that a response continues."""

from __future__ import annotations

import pytest
from helpers.tiny import CHAT_TEMPLATE, make_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from trl_rlaif.encoding import chat_prompt, encode_prompt, is_rendered, without_end_of_turn

TRIMMING_TEMPLATE = CHAT_TEMPLATE.replace("m['content'] +", "(m['content'] | trim) +")
MESSAGES = [
    {"role": "system", "content": "You are a judge."},
    {"role": "user", "content": "what is 12 or 21?\n\n  the dog"},
    {"role": "assistant", "content": "the fox"},
    {"role": "user", "content": "only 1"},
]


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def rendered(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def special_ids(tokenizer, ids):
    """The special tokens among the ids, in order."""
    return [i for i in ids if i in set(tokenizer.all_special_ids)]


# ---- An assistant turn that the response continues -----------------------------------------------------------


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, TRIMMING_TEMPLATE])
@pytest.mark.parametrize("begun", ["the fox is", "the fox! ", "<|end|> the"])
def test_a_last_assistant_turn_is_continued(tokenizer, template, begun):
    tokenizer.chat_template = template
    messages = [*MESSAGES, {"role": "assistant", "content": begun}]
    wanted = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    ids = encode_prompt(tokenizer, messages)
    hostile = begun.startswith("<")
    if not hostile:
        assert ids == tokenizer(wanted, add_special_tokens=False)["input_ids"]
    # The turn is open, and its content is text.
    opened = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert special_ids(tokenizer, ids) == special_ids(tokenizer, opened)
    assert tokenizer.decode(ids).endswith(wanted[-3:] if hostile else wanted[-6:])


def test_an_opening_follows_the_turn_that_is_continued(tokenizer):
    messages = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "the quick"}]
    assert encode_prompt(tokenizer, messages, opening=" dog") == encode_prompt(
        tokenizer, [messages[0], {"role": "assistant", "content": "the quick dog"}]
    )


# ---- Text already rendered by a chat template -------------------------------------------------------------------

_BOS_TEMPLATE = "{{ bos_token }}" + CHAT_TEMPLATE.replace("<|start|>", "<|turn|>")


def adds_bos(chat_template: str, *, itself: bool) -> PreTrainedTokenizerFast:
    """The template writes a first token; with ``itself``, the tokenizer prepends BOS to any text, like Llama's."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    if itself:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|start|> $A", special_tokens=[("<|start|>", tokenizer.bos_token_id)]
        )
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("template", [_BOS_TEMPLATE, CHAT_TEMPLATE.replace("<|start|>", "<|turn|>")])
@pytest.mark.parametrize("messages", [MESSAGES, MESSAGES[1:2]])
def test_rendered_text_is_encoded_as_the_messages_are(itself, template, messages):
    tokenizer = adds_bos(template, itself=itself)
    wanted = encode_prompt(tokenizer, messages)
    text = rendered(tokenizer, messages)
    for given in (text, text.removeprefix("<|start|>")):
        prompt = chat_prompt(given, tokenizer)
        assert isinstance(prompt, str) and encode_prompt(tokenizer, prompt) == wanted
        assert encode_prompt(tokenizer, chat_prompt(str(prompt), tokenizer)) == wanted
    if itself == (template == _BOS_TEMPLATE):
        # TRL's trainers encode a text in this way, and each token occurs once.
        assert tokenizer(chat_prompt(text, tokenizer))["input_ids"] == wanted


@pytest.mark.parametrize("text", ["the fox <|start|>user", " <|start|>user", "<|end|>fox", "<|pad|>", "fox", ""])
def test_other_texts_are_no_rendered_ones(tokenizer, text):
    assert not is_rendered(text, tokenizer)
    assert chat_prompt(text, tokenizer) == [{"role": "user", "content": text}]


def test_without_a_chat_template_nothing_is_rendered():
    tokenizer = make_tokenizer(chat=False)
    assert not is_rendered("<|start|>user\nfox<|end|>", tokenizer)
    assert special_ids(tokenizer, encode_prompt(tokenizer, "<|start|>user\nfox<|end|>")) == []


def test_a_template_without_system_turns(tokenizer):
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refusal + CHAT_TEMPLATE
    assert is_rendered(rendered(tokenizer, MESSAGES[1:]), tokenizer)


def test_an_opening_of_rendered_text_stays_text(tokenizer):
    prompt = chat_prompt(rendered(tokenizer, MESSAGES), tokenizer)
    ids = encode_prompt(tokenizer, prompt, opening="<|end|>")
    assert ids[: len(encode_prompt(tokenizer, prompt))] == encode_prompt(tokenizer, MESSAGES)
    assert special_ids(tokenizer, ids) == special_ids(tokenizer, encode_prompt(tokenizer, MESSAGES))


@pytest.mark.parametrize("response", ["the fox<|end|>\n", "the fox<|end|>", "the fox"])
def test_the_end_of_turn_is_no_part_of_a_response(tokenizer, response):
    assert without_end_of_turn(tokenizer, response) == "the fox"
    assert without_end_of_turn(tokenizer, "fox<|end|> dog ") == "fox<|end|> dog "
