"""Responses of reasoning models: the answer, the reasoning, and the tokens that a reward model reads."""

from __future__ import annotations

import pytest
import torch
from helpers.ppo import prompts, small_trainer
from helpers.templates import CHANNELS, OPENED, QWEN
from helpers.tiny import CHAT_TEMPLATE, make_llama, make_tokenizer

from trl_rlaif.encoding import encode_prompt, encode_response
from trl_rlaif.errors import UserError
from trl_rlaif.models.forward import as_responses
from trl_rlaif.responses import ResponseReader
from trl_rlaif.types import RehearsalPair


def make(template, tags=True):
    tokenizer = make_tokenizer()
    if tags:
        tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.add_tokens(["<|channel|>", "<|message|>", "<|close|>"], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def read(tokenizer, text, **options):
    """The reader's results for this text, and the text of the answer's tokens."""
    reader = ResponseReader(tokenizer, (tokenizer.eos_token_id,), **options)
    response = reader.read(tokenizer(text, add_special_tokens=False)["input_ids"])
    return response.answer, response.reasoning, response.ended, tokenizer.decode(response.answer_ids)


CASES = [
    (QWEN, "<think>\nhm\n</think>\n\nthe dog<|end|>", ("the dog", "hm", True, "the dog")),
    (QWEN, "<think>\n\n</think>\n\nthe dog<|end|>", ("the dog", None, True, "the dog")),
    (QWEN, "the dog<|end|>", ("the dog", None, True, "the dog")),
    (QWEN, "<think>\nhm\n</think>\n\nthe", ("the", "hm", False, "the")),
    (QWEN, "<think>\nhm", ("", "hm", False, "")),
    (QWEN, "<think>\nhm<|end|>", ("", "hm", False, "")),  # unfinished reasoning: a truncated response
    (QWEN, "<think>hm</think>a </think> b<|end|>", ("a </think> b", "hm", True, "a </think> b")),  # first block only
    (QWEN, "hello </think> b<|end|>", ("hello </think> b", None, True, "hello </think> b")),
    (OPENED, "hm\n</think>\n\nthe dog<|end|>", ("the dog", "hm", True, "the dog")),
    (OPENED, "hm, the dog<|end|>", ("", "hm, the dog", False, "")),
    (
        CHANNELS,
        "<|channel|>analysis<|message|>hm<|close|><|start|>assistant<|channel|>final<|message|>the dog<|end|>",
        ("the dog", "hm", True, "the dog"),
    ),
    (CHANNELS, "<|channel|>final<|message|>the dog<|end|>", ("the dog", None, True, "the dog")),
    (CHANNELS, "<|channel|>analysis<|message|>hm<|close|><|start|>assistant", (
        "", "hm<|close|><|start|>assistant", False, "")),
    (CHAT_TEMPLATE, "<think>hm</think>the dog<|end|>", ("the dog", "hm", True, "the dog")),  # known from the vocabulary
]  # fmt: skip


@pytest.mark.parametrize(("template", "text", "expected"), CASES)
def test_reasoning_is_told_from_the_answer(template, text, expected):
    assert read(make(template), text) == expected


def test_whether_reasoning_has_begun_is_read_off_each_prompt():
    """A text, a continued turn, and a plain prompt, under a template that opens a reasoning block."""
    tokenizer = make(OPENED)
    reader = ResponseReader(tokenizer, (tokenizer.eos_token_id,))
    ids = tokenizer("hm, the dog<|end|>", add_special_tokens=False)["input_ids"]
    user = {"role": "user", "content": "a dog?"}
    for prompt in ("a dog?", [user, {"role": "assistant", "content": "Well,"}]):
        found = reader.read(ids, encode_prompt(tokenizer, prompt))
        assert (found.answer, found.reasoning, found.ended) == ("hm, the dog", None, True)
    assert reader.read(ids, encode_prompt(tokenizer, [user])).answer == "" and reader.prompted


def test_reasoning_may_be_kept_and_is_where_no_tags_are_known():
    text = "<think>\nhm\n</think>\n\nthe dog<|end|>"
    kept = text.removesuffix("<|end|>")
    assert read(make(QWEN), text, reasoning="keep") == (kept, None, True, kept)
    assert read(make(CHAT_TEMPLATE, tags=False), text) == (kept, None, True, kept)


def test_tags_can_be_named():
    tokenizer = make(CHAT_TEMPLATE, tags=False)
    found = read(tokenizer, "[thought]hm[answer] the dog<|end|>", tags=["[thought]", "[answer]"])
    assert found == (" the dog", "hm", True, " the dog")
    with pytest.raises(UserError, match="reasoning_tags"):
        ResponseReader(tokenizer, (), tags=["<think>"])


def test_without_stop_tokens_nothing_has_ended():
    tokenizer = make(QWEN)
    assert not ResponseReader(tokenizer, ()).read([5, tokenizer.eos_token_id]).ended


@pytest.mark.parametrize("answer", ["the dog", "<table>\n\n狐狸 🦊</table>", "`a<b`\n\n  and"])
def test_the_reward_model_reads_an_answer_in_the_tokens_that_it_was_trained_on(answer):
    tokenizer = make(QWEN)
    reader = ResponseReader(tokenizer, (tokenizer.eos_token_id,))
    sampled = tokenizer(f"<think>\nhm\n</think>\n\n{answer}<|end|>", add_special_tokens=False)["input_ids"]
    assert reader.row(sampled) == reader.row(sampled[:-1]) == encode_response(tokenizer, answer)


def test_in_ppo_rewards_see_answers_and_the_reasoning_beside_them(tmp_path):
    seen = []

    def watch(completions, completion_ids, **_):
        seen.extend(zip([message for [message] in completions], completion_ids, strict=True))
        return [0.0] * len(completions)

    tokenizer = make(QWEN)
    trainer = small_trainer(
        tmp_path, dataset=prompts(chat=True), model=make_llama(len(tokenizer)),
        trainer_kwargs={"reward_funcs": [watch]}, missing_eos_penalty=2.0,
    )  # fmt: skip
    trainer.reader = trainer.generator.reader = trainer.rewards.reader = ResponseReader(
        tokenizer, (tokenizer.eos_token_id,)
    )
    texts = ["<think>\nhm\n</think>\n\nthe dog<|end|>", "<think>\nhm<|end|>"]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    def generate(_actors, prompt_ids, _mask):
        width = max(map(len, rows))
        padded = [rows[i % 2] + [tokenizer.pad_token_id] * (width - len(rows[i % 2])) for i in range(len(prompt_ids))]
        return torch.tensor(padded), torch.zeros(len(padded), width)

    trainer.generator._generate, trainer.generator._unverified = generate, set()
    rollout = trainer.sample(next(trainer.batches))
    scores = trainer.transform(trainer.score(rollout), rollout).total
    finished = {"role": "assistant", "content": "the dog", "reasoning_content": "hm"}
    assert seen[:2] == [(finished, rows[0]), ({**finished, "content": ""}, rows[1])]
    assert rollout.ended.tolist() == [True, False] * 2
    assert scores.tolist() == [0.0, -2.0] * 2


def test_a_rehearsal_pair_is_trained_on_as_it_was_sampled():
    """Tokens that are stripped for rewards remain in the policy's training data."""
    ids = [5, 6, 2]
    rollout = as_responses([RehearsalPair("", "", None, None, "", [4], ids)], torch.device("cpu"))
    assert rollout.response_ids.tolist() == [ids] and rollout.ended.all()
