"""Fine-tuning data in the forms that TRL's SFTTrainer reads."""

import pytest
from helpers.data import USER, says

from trl_rlaif.data import load_finetuning
from trl_rlaif.errors import UserError

ANSWER = says("Blue.")


def fails(source, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        load_finetuning(source, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "read"),
    [
        ({"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER]}),
        ({"prompt": "Sky?", "completion": "Blue."}, {"prompt": "Sky?", "completion": "Blue."}),
        ({"prompt": [USER], "completion": [ANSWER]}, {"prompt": [USER], "completion": [ANSWER]}),
        ({"text": "Blue."}, {"text": "Blue."}),
        (
            {"conversations": [{"from": "human", "value": "Sky?"}, {"from": "gpt", "value": "Blue."}], "id": 1},
            {"messages": [USER, ANSWER]},
        ),
        (
            {"system": "S", "conversations": [USER, ANSWER]},
            {"messages": [{"role": "system", "content": "S"}, USER, ANSWER]},
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Sky?"}]}, ANSWER]},
            {"messages": [USER, ANSWER]},
        ),
        (
            {"instruction": "Sky?", "input": "Now.", "output": "Blue."},
            {"prompt": [{"role": "user", "content": "Sky?\n\nNow."}], "completion": [ANSWER]},
        ),
    ],
)
def test_forms(write, row, read):
    assert load_finetuning(write(row)) == [read]


def test_alpaca_for_a_model_without_chat_template(write):
    path = write({"instruction": "Sky?", "input": "", "output": "Blue."})
    assert load_finetuning(path, chat=False) == [{"prompt": "Sky?\n\n", "completion": "Blue."}]


def test_what_trl_reads_beside_texts_is_kept(write):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "see", "arguments": "{}"}}]}
    turns = [USER, call, {"role": "tool", "name": "see", "content": "blue"}, {**ANSWER, "thinking": "hm"}]
    assert load_finetuning(write({"messages": turns})) == [{"messages": turns}]


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"question": "a"}, "the columns are 'question'"),
        ({"messages": []}, "no 'messages'"),
        ({"messages": "hi"}, "'messages' is a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 'of the type "image"'),
        ({"prompt": "a", "completion": " "}, "no 'completion'"),
        ({"instruction": "a", "output": ["b"]}, "'output' is a list"),
        ({"instruction": "", "output": "b"}, "no 'instruction'"),
    ],
)
def test_wrong_rows(write, row, part):
    path = write(row)
    message = fails(path)
    assert message.startswith(f"{path}:1: ") and part in message


def test_every_wrong_row_is_named(write):
    path = write({"text": "a"}, {"text": ""}, {"other": 1})
    first, others = fails(path).splitlines()
    assert first.startswith(f"{path}:2: ") and others == f"    The same at {path}:3."
    assert "no rows" in fails(write())
