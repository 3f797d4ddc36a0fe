"""The end of a turn is the token that the chat template writes, and every token that ends a turn stops a response."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import CHAT_TEMPLATE, make_llama, make_tokenizer
from transformers import GenerationConfig

from trl_rlaif.encoding import encode_prompt, encode_response
from trl_rlaif.errors import UserError
from trl_rlaif.generation import sample_responses
from trl_rlaif.stopping import chosen_stop_ids, end_of_turn, named_stop_ids, stop_ids

# The ways in which templates end an assistant's turn.
TEMPLATES = {
    "eos": (CHAT_TEMPLATE, "<|end|>"),
    "another token, as Gemma": (CHAT_TEMPLATE.replace("<|end|>", "<end_of_turn>"), "<end_of_turn>"),
    "another token and then eos, as Phi-3": (
        CHAT_TEMPLATE.replace("<|end|>", "<end_of_turn>") + "{% if not add_generation_prompt %}<|end|>{% endif %}",
        "<end_of_turn>",
    ),
    "a space before it, as Llama 2": (CHAT_TEMPLATE.replace("'<|end|>", "' <end_of_turn>"), "<end_of_turn>"),
    "the beginning of the next turn, as GLM-4": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|user|>",
    ),
    "plain text": ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n\n' }}{% endfor %}", "<|end|>"),
    "nothing that can be rendered": ("{{ raise_exception('only users') }}", "<|end|>"),
    "no template": (None, "<|end|>"),
}


def make(template):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<end_of_turn>", "<eos>"], special_tokens=True)
    tokenizer.add_tokens(["<|user|>", "<|assistant|>", "<think>", "</think>", "<table>"])
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_of_a_turn_is_the_templates(name):
    template, expected = TEMPLATES[name]
    tokenizer = make(template)
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == expected
    assert encode_response(tokenizer, "the fox")[-1] == end_of_turn(tokenizer)


def test_it_follows_a_template_and_an_eos_that_are_changed():
    tokenizer = make(CHAT_TEMPLATE)
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id
    tokenizer.chat_template = TEMPLATES["another token, as Gemma"][0]
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<end_of_turn>")
    tokenizer.chat_template = None
    tokenizer.eos_token = "<eos>"
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<eos>")


@pytest.mark.parametrize(("configured", "more"), [(None, []), (9, [9]), ([2, 9, 10], [9, 10])])
def test_a_response_stops_at_the_turns_end_at_eos_and_where_the_model_says(configured, more):
    tokenizer, model = make(TEMPLATES["another token, as Gemma"][0]), make_llama()
    model.generation_config = GenerationConfig(eos_token_id=configured)
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert stop_ids(tokenizer, model) == (end, tokenizer.eos_token_id, *more)
    assert stop_ids(tokenizer) == (end, tokenizer.eos_token_id)


def test_stop_tokens_by_name_or_by_id():
    tokenizer = make(CHAT_TEMPLATE)
    assert named_stop_ids(tokenizer, ["<eos>", 7, "<eos>"]) == (tokenizer.convert_tokens_to_ids("<eos>"), 7)
    for wrong, found in ((["<stop>"], "'<stop>'"), ([10**6], "1000000"), ([], "empty")):
        with pytest.raises(UserError, match=found):
            named_stop_ids(tokenizer, wrong)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "own"),
        ({"stop_token": None}, ()),
        ({"stop_token": None, "stop_token_id": 5}, (5,)),
        ({"stop_token_id": 5}, (5,)),
        ({"stop_token": None, "stop_tokens": [7, 8]}, (7, 8)),
    ],
)
def test_settings_say_what_ends_a_response(settings, expected):
    tokenizer, model = make(CHAT_TEMPLATE), make_llama()
    expected = stop_ids(tokenizer, model) if expected == "own" else expected
    assert chosen_stop_ids(tokenizer, model, **settings) == expected


def writing(tokenizer, tokens):
    """A model that writes these tokens in order, whatever the prompt."""
    model = make_llama(len(tokenizer))
    wanted = iter(tokenizer.convert_tokens_to_ids(tokens))

    def force(_module, _inputs, logits):
        forced = torch.zeros_like(logits)
        forced[..., next(wanted)] = 100.0
        return forced

    model.lm_head.register_forward_hook(force)
    return model


@pytest.mark.parametrize("end", ["<end_of_turn>", "<|end|>", "<eos>"])
def test_sampling_stops_where_transformers_does(end):
    tokenizer = make(TEMPLATES["another token, as Gemma"][0])
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "the dog"}])
    tokens, ids = ["the", end, *["!"] * 6], tokenizer.convert_tokens_to_ids(["the", end])
    configured = tokenizer.convert_tokens_to_ids(["<end_of_turn>", "<|end|>", "<eos>"])
    model = writing(tokenizer, tokens)
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=configured)
    for keep_end in (False, True):
        model = writing(tokenizer, tokens)
        model.generation_config.eos_token_id = configured
        sampling = {"max_new_tokens": 8, "temperature": 0, "keep_end": keep_end}
        assert sample_responses(model, tokenizer, [prompt], **sampling) == [[ids[: 1 + keep_end]]]
    assert theirs[0, len(prompt) :].tolist() == ids


def test_a_response_that_is_cut_has_no_end_to_keep():
    tokenizer = make(CHAT_TEMPLATE)
    model, ids = writing(tokenizer, ["the"] * 4), tokenizer.convert_tokens_to_ids(["the"] * 4)
    assert sample_responses(model, tokenizer, [[5]], max_new_tokens=4, temperature=0, keep_end=True) == [[ids]]
