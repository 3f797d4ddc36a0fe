"""Formats of other projects: Alpaca, ShareGPT, preference files as prompts, whole conversations."""

import pytest
from helpers.data import USER, fails, says, sides

from trl_rlaif.data import load_pairs, load_prompts

HH = {"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "\n\nHuman: Q\n\nAssistant: b"}


# Alpaca, ShareGPT, content parts, tools


ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(
    ("row", "prompt", "extra"),
    [
        (ALPACA, "Add.\n\n1 2", {"output": "3"}),
        ({**ALPACA, "input": ""}, "Add.", {"output": "3"}),
        ({"instruction": "Add."}, "Add.", {}),
        ({"instruction": "Sky?", "system": "Be kind."}, [SYSTEM, USER], {}),
        ({"instruction": "Sky?", "system": ""}, [USER], {}),
        ({"conversations": [{"from": "human", "value": "Sky?"}, {"from": "gpt", "value": "Blue."}]}, [USER], {}),
        (
            {"system": "Be kind.", "conversations": [{"from": "human", "value": "Sky?"}]},
            [SYSTEM, USER],
            {},
        ),
        ({"conversations": [USER, says("Blue.")]}, [USER], {}),
        (
            {"messages": [{"from": "system", "value": "Be kind."}, {"from": "user", "value": "Sky?"}]},
            [SYSTEM, USER],
            {},
        ),
        ({"prompt": [{"role": "developer", "content": "Be kind."}, USER]}, [SYSTEM, USER], {}),
        (
            {"prompt": [SYSTEM, {"role": "developer", "content": "Be brief."}, USER]},
            [{"role": "system", "content": "Be kind.\n\nBe brief."}, USER],
            {},
        ),
        (
            {"messages": [USER, says("look up"), {"role": "tool", "content": "blue", "name": "see"}, says("Blue.")]},
            [USER, says("look up"), {"role": "tool", "content": "blue", "name": "see"}],
            {},
        ),
        (
            {"conversations": [{"from": "human", "value": "Sky?"}, {"from": "function_call", "value": "look up"},
                               {"from": "observation", "value": "blue"}, {"from": "gpt", "value": "Blue."}]},
            [USER, says("look up"), {"role": "tool", "content": "blue"}],
            {},
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Sk"}, {"type": "text", "text": "y?"}]}]},
            [USER],
            {},
        ),
        # The response continues an assistant turn; an empty one is dropped.
        ({"prompt": [USER, says("It is")]}, [USER, says("It is")], {}),
        ({"prompt": [USER, says(" ")]}, [USER], {}),
    ],
)  # fmt: skip
def test_prompts_in_the_shapes_of_others(write, row, prompt, extra):
    item = load_prompts(write(row)).items[0]
    assert (item.prompt, item.extra) == (prompt, extra)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ([{"type": "image_url", "image_url": {"url": "u"}}], 'Part 1 of the content of message 1 of \'prompt\' is of'),
        ([{"type": "text", "text": "a"}, {"type": "image"}], 'Part 2 of the content of message 1 of \'prompt\' is of'),
        ([{"type": "text", "text": None}], "without a text"),
        (["Sky?"], "a text without a type"),
        ([{"text": "Sky?"}], "an object without a type"),
        ({"type": "text", "text": "a"}, "is an object"),
    ],
)  # fmt: skip
def test_parts_that_are_no_text_name_their_row(write, content, part):
    path = write({"prompt": [USER]}, {"prompt": [{"role": "user", "content": content}]})
    message = fails(path, load_prompts)
    assert message.startswith(f"{path}:2: ") and part in message


def test_tool_calls_are_refused_and_not_lost(write):
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "see"}}]}
    path = write({"messages": [USER, call, {"role": "tool", "content": "blue"}]})
    assert fails(path, load_prompts).startswith(f"{path}:1: Message 2 of 'messages' calls tools")


# Prompts of preference files


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (HH, [{"role": "user", "content": "Q"}]),
        ({**HH, "rejected": HH["chosen"]}, [{"role": "user", "content": "Q"}]),
        ({**HH, "rejected": None}, [{"role": "user", "content": "Q"}]),
        (
            {
                "chosen": "\n\nHuman: Q\n\nAssistant: a\n\nHuman: R\n\nAssistant: b",
                "rejected": "\n\nHuman: Q\n\nAssistant: a\n\nHuman: R\n\nAssistant: c",
            },
            [{"role": "user", "content": "Q"}, says("a"), {"role": "user", "content": "R"}],
        ),
        # If they diverge earlier, the prompt is the shared part.
        (
            {
                "chosen": "\n\nHuman: Q\n\nAssistant: a\n\nHuman: R\n\nAssistant: b",
                "rejected": "\n\nHuman: Q\n\nAssistant: d\n\nHuman: R\n\nAssistant: c",
            },
            [{"role": "user", "content": "Q"}],
        ),
        ({"chosen": [USER, says("a")], "rejected": [USER, says("b")]}, [USER]),
        ({"chosen": [SYSTEM, USER, says("a")], "rejected": []}, [SYSTEM, USER]),
        ({"chosen": "It is a", "rejected": "It is b", "score_chosen": 1, "score_rejected": 1}, "It is"),
        ({"prompt": "Q", "chosen": [USER, says("a")], "rejected": [USER, says("b")], "margin": 1}, "Q"),
        ({"prompt": "Q", "response_1": "a", "response_2": "b"}, "Q"),
    ],
)
def test_prompts_of_preference_files(write, row, prompt):
    item = load_prompts(write({"id": "x", "category": "c", "source": "s", **row})).items[0]
    assert (item.id, item.prompt, item.category, item.extra) == ("x", prompt, "c", {"source": "s"})


def test_a_repeated_prompt_of_a_preference_file_is_read_once(write):
    loaded = load_prompts(write({**HH, "id": 1}, {**HH, "id": 2, "chosen": "\n\nHuman: Q\n\nAssistant: z"}))
    assert [item.id for item in loaded.items] == ["1"]
    assert loaded.skip_counts() == {"repeated prompt of a preference file": 1}
    # A prompt file is left as it is: a repeated prompt may be intentional.
    assert len(load_prompts(write({"prompt": "Q"}, {"prompt": "Q"})).items) == 2


# A prompt with whole conversations


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "expected"),
    [
        ("Sky?", [{"role": "user", "content": " Sky?\n"}, says("B")], [USER, says("R")], [USER]),
        ([USER], [{"role": "user", "content": "Sky?  "}, says("B")], [says("R")], [USER]),
        # A system turn in one of the two places only.
        ([SYSTEM, USER], [USER, says("B")], [USER, says("R")], [SYSTEM, USER]),
        ([USER], [SYSTEM, USER, says("B")], [SYSTEM, USER, says("R")], [SYSTEM, USER]),
        ("Sky?", [SYSTEM, USER, says("B")], [SYSTEM, USER, says("R")], [SYSTEM, USER]),
        ([SYSTEM, USER], [{**SYSTEM, "content": "x"}, USER, says("B")], [USER, says("R")], [SYSTEM, USER]),
        # The prompt is the first question, and both continue alike.
        ("Sky?", [USER, says("a"), USER, says("B")], [USER, says("a"), USER, says("R")], [USER, says("a"), USER]),
        # The prompt starts the answer.
        ([USER, says("It is")], [says("B")], [says("R")], [USER, says("It is")]),
        ([USER, says("It is")], [USER, says("It isB")], [USER, says("It isR")], [USER, says("It is")]),
    ],
)
def test_a_prompt_beside_whole_conversations(write, prompt, chosen, rejected, expected):
    pair = load_pairs(write({"prompt": prompt, "chosen": chosen, "rejected": rejected})).items[0]
    assert (pair.prompt, *sides(pair)) == (expected, "B", "R")


def test_a_prompt_beside_whole_transcripts(write):
    row = {"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": HH["chosen"], "rejected": HH["rejected"]}
    pair = load_pairs(write(row)).items[0]
    assert (pair.prompt, *sides(pair)) == ([{"role": "user", "content": "Q"}], "a", "b")


def test_a_conversation_about_something_else_is_counted(write):
    other = {"prompt": "Sea?", "chosen": [USER, says("B")], "rejected": [USER, says("R")]}
    loaded = load_pairs(write(other, {**other, "prompt": "Sky?"}))
    assert loaded.skip_counts() == {"conversation does not begin with the prompt": 1}


@pytest.mark.parametrize("responses", [{"chosen": "B", "rejected": "R"}, {"response_1": "B", "response_2": "R"}])
@pytest.mark.parametrize("prompt", [{"instruction": "Add.", "input": "1"}, {"conversations": [USER]}])
def test_pairs_take_their_prompt_from_every_shape(write, prompt, responses):
    pair = load_pairs(write({**prompt, **responses})).items[0]
    assert pair.prompt == ([USER] if "conversations" in prompt else "Add.\n\n1")
    assert {pair.response_1, pair.response_2} == {"B", "R"} and pair.extra == {}


def test_sharegpt_preferences(write):
    row = {"conversations": [{"from": "human", "value": "Sky?"}]}
    row |= {"chosen": {"from": "gpt", "value": "B"}, "rejected": {"from": "gpt", "value": "R"}}
    pair = load_pairs(write(row)).items[0]
    assert (pair.prompt, *sides(pair)) == ([USER], "B", "R")
