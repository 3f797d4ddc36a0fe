"""Formats of prompts and pairs: rows that are read, skipped or refused."""

import hashlib

import pytest
from helpers.data import USER, fails, says, sides

from trl_rlaif.data import Pair, Skip, load_pairs, load_prompts

# Prompts


def test_prompts_keep_category_and_other_columns(write):
    path = write(
        {"prompt": " a\n", "kind": 3, "x": [1]},
        {"prompt": "b", "kind": " ", "category": "c"},
        {"prompt": "d"},
    )
    items = load_prompts(path, category="kind").items
    assert [(item.prompt, item.category, item.extra) for item in items] == [
        (" a\n", "3", {"x": [1]}),
        ("b", None, {"category": "c"}),
        ("d", None, {}),
    ]


def test_messages_keep_what_else_their_template_may_read(write):
    said = {**says("Blue."), "reasoning_content": "sky", "name": None}
    [item] = load_prompts(write({"prompt": [USER, said, USER]})).items
    assert item.prompt == [USER, {key: value for key, value in said.items() if key != "name"}, USER]


def test_messages_lose_the_answer_and_keys_without_a_value(write):
    row = {"messages": [{**USER, "name": None}, says("Blue."), says("Really.")], "prompt": None}
    conversational = {"prompt": [{"role": "system", "content": ""}, USER], "messages": [USER]}
    items = load_prompts(write(row, conversational)).items
    assert items[0].prompt == [USER] and items[0].extra == {}
    assert items[1].prompt == conversational["prompt"] and items[1].extra == {"messages": [USER]}


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({}, "no prompt"),
        ({"prompt": None}, "no prompt"),
        ({"prompt": ""}, "no prompt"),
        ({"prompt": " \n\t"}, "no prompt"),
        ({"prompt": []}, "no prompt"),
        ({"prompt": 3}, "'prompt' is a number"),
        ({"prompt": True}, "'prompt' is a truth value"),
        ({"prompt": {"role": "user"}}, "'prompt' is an object"),
        ({"prompt": ["hi"]}, "Message 1 of 'prompt'"),
        ({"prompt": [{"speaker": "human", "text": "hi"}]}, '"role": "user"'),
        ({"prompt": [{"from": "narrator", "value": "hi"}]}, 'Unknown role "narrator"'),
        ({"prompt": [{"role": "human", "content": "hi"}]}, 'Unknown role "human"'),
        ({"prompt": [{"role": ["user"], "content": "hi"}]}, "Unknown role"),
        ({"prompt": [{"role": "user", "content": None}]}, "content of message 1 of 'prompt' is null"),
        ({"prompt": [{"role": "user", "content": " "}]}, "no prompt"),
        ({"prompt": [USER, {"role": "system", "content": "a"}]}, "ends with the role 'system'"),
        ({"prompt": [says("Blue.")]}, "no user turn"),
        ({"messages": [says("Blue.")]}, "no prompt"),
        ({"messages": "hi"}, "'messages' is a text"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"prompt": "a", "id": "\ud800"}, "surrogate"),
        ({"prompt": "a", "id": [1]}, "'id' is a list"),
        ({"prompt": "a", "id": True}, "'id' is a truth value"),
        ({"prompt": "a", "category": ["x"]}, "'category' is a list"),
        ({"chosen": "a", "rejected": "b"}, "share no beginning"),
        ({"response_1": "a", "response_2": "b"}, "no prompt"),
    ],
)
def test_wrong_prompts(write, row, part):
    path = write(row)
    message = fails(path, load_prompts)
    assert message.startswith(f"{path}:1: ") and part in message


def test_prompts_of_two_kinds(write):
    path = write({"prompt": "a"}, {"prompt": [USER]}, {"prompt": "b"})
    assert fails(path, load_prompts).startswith(f"{path}:2: Mixed formats in one file")


def test_repeated_ids_name_both_rows(write):
    path = write(
        {"id": "a", "prompt": "x"},
        {"id": 1, "prompt": "x"},
        {"id": "1", "prompt": "y"},
        {"id": "f-5", "prompt": "x"},
        {"prompt": "z"},
    )
    lines = fails(path, load_prompts).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"{path}:3: ") and f"{path}:2" in lines[0]
    assert lines[1].startswith(f"{path}:5: ") and f"{path}:4" in lines[1]


# Preference


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "Sky?", "chosen": "Blue.", "rejected": " Red."}, "Sky?", "Blue.", " Red."),
        ({"prompt": [USER], "chosen": [says("Blue.")], "rejected": [says("Red.")]}, [USER], "Blue.", "Red."),
        (
            {"prompt": [USER], "chosen": [says("B"), says("C")], "rejected": [says("R")]},
            [USER],
            "B\n\nC",
            "R",
        ),
        ({"chosen": [USER, says("Blue.")], "rejected": [USER, says("Red.")]}, [USER], "Blue.", "Red."),
        (
            {"chosen": [USER, says("A"), says("B")], "rejected": [USER, says("A"), says("C")]},
            [USER],
            "A\n\nB",
            "A\n\nC",
        ),
        # A text prompt with whole conversations, as in binarized UltraFeedback.
        ({"prompt": "Sky?", "chosen": [USER, says("B")], "rejected": [USER, says("R")]}, [USER], "B", "R"),
        ({"prompt": "Sky?", "chosen": [says("B")], "rejected": [says("R")]}, [USER], "B", "R"),
        ({"prompt": [USER], "chosen": "B", "rejected": "R"}, [USER], "B", "R"),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "The sky is", " blue.", " green."),
        ({"chosen": "It is black", "rejected": "It is blue"}, "It is", " black", " blue"),
        ({"chosen": "Q?\nA: Yes", "rejected": "Q?\nA: Yes, so"}, "Q?\nA:", " Yes", " Yes, so"),
        ({"chosen": "Q?\nYes", "rejected": "Q?\nNo"}, "Q?\n", "Yes", "No"),
        ({"chosen": "Is it?\nYes", "rejected": "Is it?\nNo"}, "Is it?\n", "Yes", "No"),
        ({"chosen": "天空？蓝", "rejected": "天空？绿"}, "天空？", "蓝", "绿"),
    ],
)
def test_preference_rows(write, row, prompt, chosen, rejected):
    pair = load_pairs(write({**row, "score": 1, "category": "c"})).items[0]
    assert (pair.prompt, *sides(pair)) == (prompt, chosen, rejected)
    assert (pair.human in (1, 2), pair.category, pair.extra) == (True, "c", {"score": 1})


def test_implicit_texts_agree_with_trl_where_words_differ_whole(write):
    from trl.data_utils import extract_prompt

    row = {"chosen": "What is it? A tall tree.", "rejected": "What is it? My old house."}
    pair = load_pairs(write(row)).items[0]
    assert {"prompt": pair.prompt, "chosen": sides(pair)[0], "rejected": sides(pair)[1]} == extract_prompt(row)


def test_the_order_is_a_fair_coin_that_everyone_throws_alike(write):
    path = write(*({"id": f"p{i}", "prompt": "Q", "chosen": "good", "rejected": "bad"} for i in range(2000)))
    items = load_pairs(path, seed=1).items
    assert all(sides(pair) == ("good", "bad") for pair in items)
    assert 900 < sum(pair.human == 1 for pair in items) < 1100
    for pair in items[:50]:
        bit = hashlib.sha256(f"1:{pair.id}".encode()).digest()[0] % 2
        assert pair.human == 1 + bit
    assert load_pairs(path, seed=1) == load_pairs(path, seed=1)
    assert [pair.human for pair in load_pairs(path, seed=2).items] != [pair.human for pair in items]


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"prompt": "Q"}, "no responses: its columns are 'prompt'"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "no prompt"),
        ({"chosen": "alpha", "rejected": "beta"}, "share no beginning"),
        ({"chosen": [says("a")], "rejected": [says("b")]}, "no user turn"),
        ({"prompt": "Q", "chosen": 1, "rejected": "b"}, "'chosen' is a number"),
        ({"prompt": "Q", "chosen": "a", "rejected": [says("b")]}, "Write both in the same way"),
        ({"prompt": "Q", "chosen": [{"role": "bot", "content": "a"}], "rejected": [says("b")]}, 'role "bot"'),
        ({"prompt": "Q", "chosen": "a\udfff", "rejected": "b"}, "surrogate"),
        ({"prompt": "Q", "response_1": 1, "response_2": "b"}, "'response_1' is a number"),
        ({"prompt": "Q", "response_1": "a", "response_2": "b", "human": 3}, "'human' is 3"),
        ({"prompt": "Q", "response_1": "a", "response_2": "b", "human": True}, "'human' is true"),
        ({"prompt": "Q", "response_1": "a", "response_2": "b", "human": [1, "B"]}, "'human' is \"B\""),
        ({"response_1": "a", "response_2": "b"}, "no prompt"),
        ({"prompt": "Q", "chosen": "a", "rejected": "b", "response_1": "a", "response_2": "b"}, "both"),
    ],
)
def test_wrong_pairs(write, row, part):
    path = write(row)
    message = fails(path)
    assert message.startswith(f"{path}:1: ") and part in message


PREFERENCE = {"prompt": "Q", "chosen": "a", "rejected": "b"}
HH = {"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "\n\nHuman: Q\n\nAssistant: b"}
RESPONSES = {"prompt": "Q", "response_1": "a", "response_2": "b"}
CONVERSATION = {"prompt": [USER], "chosen": [says("a")], "rejected": [says("b")]}
IMPLICIT = {"chosen": "It is a", "rejected": "It is b"}


@pytest.mark.parametrize("first", [PREFERENCE, HH, RESPONSES, CONVERSATION, IMPLICIT])
@pytest.mark.parametrize("second", [PREFERENCE, HH, RESPONSES, CONVERSATION, IMPLICIT])
def test_auto_takes_one_format_a_file(write, first, second):
    path = write(first, second)
    if first is second:
        assert len(load_pairs(path).items) == 2
        return
    message = fails(path)
    assert message.startswith(f"{path}:2: ")
    # After rows with a prompt column, "no prompt" is the more useful message for a row without one.
    lacks = second is IMPLICIT and first in (PREFERENCE, CONVERSATION)
    assert ("no prompt" if lacks else "Mixed formats in one file: this row has") in message


def test_a_useless_first_row_does_not_decide_the_format(write):
    loaded = load_pairs(write({"chosen": None, "rejected": None}, HH))
    assert [len(pair.prompt) for pair in loaded.items] == [1] and loaded.skip_counts() == {"empty response": 1}


def test_a_named_format_overrules_the_guess(write):
    pair = load_pairs(write(HH), format="preference").items[0]
    assert pair.prompt == "\n\nHuman: Q\n\nAssistant:" and sides(pair) == (" a", " b")
    assert load_pairs(write({**PREFERENCE, **RESPONSES}), format="responses").items[0].response_1 == "a"
    assert "no 'response_1'" in fails(write(PREFERENCE), format="responses")
    assert "not a transcript" in fails(write(PREFERENCE), format="hh")
    assert "no 'chosen'" in fails(write(RESPONSES), format="hh")
    assert "preference, responses, hh, kto, scored" in fails(write(HH), format="dpo")


# Skips


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**PREFERENCE, "chosen": None}, "empty response"),
        ({**PREFERENCE, "rejected": " \n"}, "empty response"),
        ({"prompt": "Q", "chosen": "a"}, "empty response"),
        ({**PREFERENCE, "chosen": "b "}, "responses are identical"),
        ({**CONVERSATION, "chosen": []}, "empty response"),
        ({**CONVERSATION, "chosen": [says(" ")]}, "empty response"),
        ({**CONVERSATION, "chosen": [{"role": "assistant", "content": None}]}, "empty response"),
        ({**CONVERSATION, "chosen": [says("a"), USER, says("b")]}, "transcripts differ before the last turn"),
        ({"chosen": [USER, says("a")], "rejected": [USER, says("a")]}, "responses are identical"),
        ({"chosen": [USER, says("a")], "rejected": [USER]}, "empty response"),
        (
            {"chosen": [USER, says("a"), USER, says("b")], "rejected": [USER, says("c"), USER, says("b")]},
            "transcripts differ before the last turn",
        ),
        (
            {"chosen": [{"role": "user", "content": "x"}, says("a")], "rejected": [USER, says("b")]},
            "transcripts differ before the last turn",
        ),
        ({"chosen": "It is", "rejected": "It is b"}, "empty response"),
        ({"chosen": "It is", "rejected": "It is"}, "responses are identical"),
        ({**RESPONSES, "response_2": ""}, "empty response"),
        ({**RESPONSES, "response_2": None}, "empty response"),
        ({"prompt": "Q", "response_2": "b"}, "empty response"),
        ({**RESPONSES, "response_2": "a"}, "responses are identical"),
        ({**HH, "chosen": "\n\nHuman: Q\n\nAssistant:"}, "empty response"),
        ({**HH, "chosen": HH["rejected"]}, "responses are identical"),
        ({**HH, "chosen": "\n\nHuman: P\n\nAssistant: a"}, "transcripts differ before the last turn"),
        ({**HH, "chosen": HH["chosen"] + "\n\nHuman: bye"}, "transcript does not end with an assistant turn"),
        ({"chosen": "\n\nHuman: \n\nAssistant: a", "rejected": "\n\nHuman:\n\nAssistant: b"}, "empty prompt"),
    ],
)
def test_skips_are_counted_with_their_reason(write, row, reason):
    loaded = load_pairs(write({"id": "s", **row}, {"id": "t", **row}, _usable(row)))
    assert len(loaded.items) == 1
    assert loaded.skipped[0] == Skip(loaded.skipped[0].where, reason) and loaded.skipped[0].where.endswith(":1")
    assert loaded.skip_counts() == {reason: 2}
    assert f"All 2 rows were skipped ({reason}: 2)" in fails(write({"id": "s", **row}, {"id": "t", **row}))


def _usable(row: dict) -> dict:
    """A good row of the same shape."""
    if "response_2" in row:
        return RESPONSES
    if str(row.get("chosen") or row["rejected"]).startswith("\n\nHuman"):
        return HH
    if "prompt" in row:
        return CONVERSATION if isinstance(row["prompt"], list) else PREFERENCE
    lists = {"chosen": [USER, says("a")], "rejected": [USER, says("b")]}
    return lists if isinstance(row["chosen"], list) else IMPLICIT


# Responses and votes


@pytest.mark.parametrize(
    ("human", "expected"),
    [
        *((1, 1), (2, 2), (0, 0), (None, None), ("2", 2), (1.0, 1), ("", None), ([], None)),
        *(([1, 1, 2], 1), ([2, 2, 2], 2), ([1, 2], 0), ([0, 0, 1], 0), ([1, 0, 2], 0), ([1, 1, 0, 0], 0)),
        *(([1, 1, 0, 0, 1], 1), ([1, None], 1)),
    ],
)
def test_human_votes(write, human, expected):
    pair = load_pairs(write({**RESPONSES, "human": human, "id": 5})).items[0]
    assert pair == Pair("5", "Q", "a", "b", None, expected, {})


def test_responses_keep_their_order(write):
    items = load_pairs(write(*({**RESPONSES, "human": 2} for _ in range(50)))).items
    assert {(pair.response_1, pair.response_2, pair.human) for pair in items} == {("a", "b", 2)}


# Transcripts


def test_a_transcript_turns_only_after_a_blank_line(write):
    talk = "\n\nHuman: Who said\nHuman: hi?\nAssistant: me? A Human: word"
    talk += "\n\nAssistant: You.\n\nAs Human: said\n\nHuman: OK"
    pair = load_pairs(write({"chosen": talk + "\n\nAssistant: a\n\nb ", "rejected": talk + "\n\nAssistant: c"})).items[
        0
    ]
    assert pair.prompt == [
        {"role": "user", "content": "Who said\nHuman: hi?\nAssistant: me? A Human: word"},
        says("You.\n\nAs Human: said"),
        {"role": "user", "content": "OK"},
    ]
    assert sides(pair) == ("a\n\nb", "c")


def test_repeated_and_empty_turns(write):
    start = "Human: Q\n\nAssistant:\n\nHuman: R\n\nAssistant: a"
    row = {"chosen": start + "\n\nAssistant: b", "rejected": "\n\n" + start.replace("\n", "\r\n")}
    pair = load_pairs(write(row)).items[0]
    assert pair.prompt == [{"role": "user", "content": "Q\n\nR"}]
    assert sides(pair) == ("a\n\nb", "a")
