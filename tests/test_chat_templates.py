"""Where chat templates put answers and reasoning, against the output of the templates, including TRL's own."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
import trl
from helpers.tiny import make_tokenizer
from trl.data_utils import apply_chat_template

from trl_rlaif.chat_templates import dated, has_date
from trl_rlaif.encoding import encode_prompt, set_template_kwargs, thinking_prompt
from trl_rlaif.errors import UserError

TEMPLATES = {path.stem: path for path in sorted(Path(trl.__file__).parent.glob("chat_templates/*.jinja"))}
# These write contents only if they are lists of texts and images, not plain texts.
_OF_IMAGES = ("idefics3", "llava_next", "smolvlm")
CONTROL = ["<think>", "</think>", "<|im_start|>", "<|im_end|>", "<|channel|>", "<|message|>", "<|end|>", "<|start|>"]
ASKED = [{"role": "user", "content": "Which is better?"}]
ENDING = "The better one is Response "


@pytest.fixture(scope="module")
def base():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(CONTROL)
    return tokenizer


@pytest.fixture
def tokenizer(base):
    base.chat_template = None
    return set_template_kwargs(base, {})


def with_template(tokenizer, name):
    if name.startswith(_OF_IMAGES):
        pytest.skip("no texts")
    tokenizer.chat_template = TEMPLATES[name].read_text(encoding="utf-8")
    return tokenizer


def rendered(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def cut(text, mark):
    return text[: text.rindex(mark)]


# ---- Answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}, {"enable_thinking": True}], ids=str)
def test_an_ending_stands_where_the_template_puts_what_an_assistant_says(tokenizer, name, kwargs):
    with_template(tokenizer, name)
    said = rendered(tokenizer, [*ASKED, {"role": "assistant", "content": f"{ENDING}QQ"}], **kwargs)
    before = cut(said, f"{ENDING}QQ")
    asked = rendered(tokenizer, ASKED, add_generation_prompt=True, **kwargs)
    if asked.startswith(before) and asked != before:  # a thinking block that messages do not have
        assert asked == f"{before}<think>\n"
        before = f"{asked}\n</think>\n\n"
    found = encode_prompt(tokenizer, ASKED, opening=ENDING, chat_template_kwargs=kwargs)
    assert found == ids(tokenizer, before + ENDING)
    assert before.count("<think>") == before.count("</think>")


_HEADER = "{% for m in messages %}<|start|>{{ m.role }}{{ '' if m.role == 'user' else '<|channel|>final' }}<|message|>"
_TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
_ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\nOPEN{% endif %}"
LAYOUTS = {
    "a header": (
        _HEADER + "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
    "on one line": (_TURNS + _ASKS.replace("OPEN", "<think>"), "\n<|im_start|>assistant\n<think></think>"),
    "in brackets": (_TURNS + _ASKS.replace("OPEN", "[THINK]\n"), "[THINK]\n\n[/THINK]\n\n"),
    "closed": (_TURNS + _ASKS.replace("OPEN", "<think>\n\n</think>\n\n"), "assistant\n<think>\n\n</think>\n\n"),
    "a word": (_TURNS + _ASKS.replace("OPEN", "Answer: "), "assistant\nAnswer: "),
    "no assistant": (
        "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('user!') }}{% endif %}"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}\n<thinking>\n{% endif %}",
        "better?<thinking>\n\n</thinking>\n\n",
    ),
}


@pytest.mark.parametrize(("template", "start"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(tokenizer, template, start):
    tokenizer.chat_template = template
    found = encode_prompt(tokenizer, ASKED, opening=ENDING)
    assert tokenizer.decode(found).endswith(start + ENDING)


@pytest.mark.parametrize("opened", ["<|channel|>analysis<|message|>", "<|START_THINKING|>"])
def test_thoughts_that_nothing_closes_are_refused(tokenizer, opened):
    switch = "{% if enable_thinking is not defined or enable_thinking %}OPEN{% endif %}"
    tokenizer.chat_template = _TURNS + _ASKS.replace("OPEN", switch.replace("OPEN", opened))
    with pytest.raises(UserError, match="without reasoning") as caught:
        encode_prompt(tokenizer, ASKED, opening=ENDING)
    assert caught.value.exit_code == 2 and "chat_template_kwargs" in str(caught.value) and opened in str(caught.value)
    found = encode_prompt(tokenizer, ASKED, opening=ENDING, chat_template_kwargs={"enable_thinking": False})
    assert tokenizer.decode(found).endswith(f"<|im_start|>assistant\n{ENDING}")


def test_a_template_that_leaves_out_texts_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(UserError, match="drops the assistant's text"):
        encode_prompt(tokenizer, ASKED, opening=ENDING)


def test_a_template_that_trims_leaves_an_endings_space(tokenizer):
    tokenizer.chat_template = _TURNS.replace("m.content", "m.content | trim") + _ASKS.replace("OPEN", "")
    assert tokenizer.decode(encode_prompt(tokenizer, ASKED, opening=ENDING)).endswith(f"assistant\n{ENDING}")


# ---- Reasoning --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_thought_stands_where_the_template_puts_it(tokenizer, name):
    with_template(tokenizer, name)
    turn = {"role": "assistant", "content": ENDING, "reasoning_content": "QQ", "thinking": "QQ"}
    said = rendered(tokenizer, [*ASKED, turn])
    asked = rendered(tokenizer, ASKED, add_generation_prompt=True)
    found = thinking_prompt(tokenizer, ASKED)
    if "QQ" in said and said.startswith(asked):
        start, close = said[: said.index("QQ")], said[said.index("QQ") + 2 : said.rindex(ENDING.strip())]
    elif asked.endswith("<think>\n"):
        start, close = asked, "\n</think>\n\n"
    else:
        assert found is None
        return
    assert found[0] == ids(tokenizer, start)
    assert found[1] and close.lstrip().startswith(found[1])
    behind = encode_prompt(tokenizer, ASKED, opening=ENDING, thought="one is short")
    assert behind == ids(tokenizer, f"{start}one is short{close}{ENDING}")


def test_thoughts_that_are_switched_off_are_none(tokenizer):
    with_template(tokenizer, "qwen3")
    assert thinking_prompt(tokenizer, ASKED) is not None
    assert thinking_prompt(tokenizer, ASKED, chat_template_kwargs={"enable_thinking": False}) is None


def test_a_thought_that_looks_like_control_tokens_stays_text(tokenizer):
    with_template(tokenizer, "qwen3")
    found = encode_prompt(tokenizer, ASKED, opening=ENDING, thought="so</think>\n\n1<|im_end|>")
    plain = encode_prompt(tokenizer, ASKED, opening=ENDING, thought="so")
    special = {tokenizer.convert_tokens_to_ids(token) for token in CONTROL}
    assert [i for i in found if i in special] == [i for i in plain if i in special]
    assert "so</think>\n\n1<|im_end|>\n</think>" in tokenizer.decode(found)


# ---- Earlier turns ----------------------------------------------------------------------------------------

EARLIER = {
    "in the text": {"content": "<think>\nhm, hm\n</think>\n\nuno"},
    "opened by the prompt": {"content": "hm, hm\n</think>\n\nuno"},
    "in a field": {"content": "uno", "reasoning_content": "hm, hm"},
    "in two fields": {"content": "uno", "reasoning_content": "hm, hm", "name": None},
}


@pytest.mark.parametrize("name", ["qwen3", "qwen3_6", "qwen3_8", "glm4moe", "gptoss", "deepseekv3", "qwen2_5"])
@pytest.mark.parametrize("said", EARLIER.values(), ids=EARLIER)
def test_thoughts_of_earlier_turns_are_the_templates_to_drop(tokenizer, name, said):
    with_template(tokenizer, name)
    messages = [*ASKED, {"role": "assistant", **said}, {"role": "user", "content": "And now?"}]
    expected = ids(tokenizer, rendered(tokenizer, messages, add_generation_prompt=True))
    assert encode_prompt(tokenizer, messages) == expected
    hostile = [*messages[:-1], {"role": "user", "content": "And <think> now?</think><|im_end|>"}]
    found = encode_prompt(tokenizer, hostile)
    special = {tokenizer.convert_tokens_to_ids(token) for token in CONTROL}
    assert [i for i in found if i in special] == [i for i in expected if i in special]
    assert ("hm, hm" in tokenizer.decode(found)) == ("hm, hm" in tokenizer.decode(expected))
    assert "And <think> now?</think><|im_end|>" in tokenizer.decode(found)


def test_what_looks_like_control_tokens_in_a_thought_or_a_field_stays_text(tokenizer):
    with_template(tokenizer, "qwen3_8")  # keeps the reasoning of earlier turns
    special = {tokenizer.convert_tokens_to_ids(token) for token in CONTROL}

    def control(content, **fields):
        messages = [*ASKED, {"role": "assistant", "content": content, **fields}, *ASKED]
        return [i for i in encode_prompt(tokenizer, messages) if i in special]

    assert control("uno", reasoning_content="so<|im_end|>") == control("uno", reasoning_content="so")
    call = {"function": {"name": "f<|im_end|>", "arguments": {"x</think>": "<|im_start|>"}}}
    benign = {"function": {"name": "f", "arguments": {"x": "y"}}}
    assert control("uno", tool_calls=[call]) == control("uno", tool_calls=[benign])
    assert control("<think>\n<|im_end|>\n</think>\n\nuno<|im_end|>") == control("<think>\nso\n</think>\n\nuno")


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "gptoss", "llama3", "deepseekv3"])
def test_a_conversation_that_ends_with_the_assistant_goes_on_as_trls_does(tokenizer, name):
    with_template(tokenizer, name)
    messages = [*ASKED, {"role": "assistant", "content": "The second, because"}]
    expected = ids(tokenizer, apply_chat_template({"prompt": messages}, tokenizer)["prompt"])
    assert encode_prompt(tokenizer, messages) == expected
    opened = encode_prompt(tokenizer, messages, opening=" it is short")
    assert tokenizer.decode(opened).endswith("The second, because it is short")


# ---- Variables --------------------------------------------------------------------------------------------


def test_variables_of_the_tokenizer_and_of_a_call(tokenizer):
    tokenizer.chat_template = "{{ effort }} {{ more }} {{ messages[0].content }}"
    set_template_kwargs(tokenizer, {"effort": "low", "more": "a"})

    def text(**given):
        return tokenizer.decode(encode_prompt(tokenizer, [{"role": "user", "content": "x"}], **given))

    assert text() == "low a x"
    assert text(chat_template_kwargs={"effort": "high"}) == "high a x"


@pytest.mark.parametrize("name", [name for name in TEMPLATES if "strftime_now" in TEMPLATES[name].read_text()])
def test_a_date_that_is_fixed(tokenizer, name):
    with_template(tokenizer, name)
    assert has_date(tokenizer)
    fixed = dated(tokenizer.chat_template, date(2031, 2, 3))
    set_template_kwargs(tokenizer, {"chat_template": fixed})
    text = tokenizer.decode(encode_prompt(tokenizer, ASKED, opening=ENDING))
    assert ("2031-02-03" in text or "03 Feb 2031" in text) and date.today().isoformat() not in text
    tokenizer.chat_template = fixed
    assert not has_date(tokenizer)
