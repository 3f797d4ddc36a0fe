"""A judge in vLLM's engine: the same probabilities as from transformers, with requests that vLLM accepts."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import fake_vllm
from helpers.judges import TOKENIZERS, llama, make_prompt, plain_answer
from helpers.tiny import make_tokenizer
from peft import LoraConfig, get_peft_model

from trl_rlaif.errors import UserError
from trl_rlaif.judging.local import LocalJudge
from trl_rlaif.judging.question import Answer, Thinking
from trl_rlaif.judging.vllm import Engine, VLLMJudge
from trl_rlaif.models.loading import ModelSpec

RATINGS = tuple(map(str, range(1, 11)))
TOLERANCE = 1e-9  # nats, both in float64
PAIRS = [
    ("what is the capital?", "a city", "the lazy dog"),
    ("a", "b", "c"),
    ("over the lazy dog?", "the quick brown fox jumps over it " * 4, "no"),
]


@pytest.fixture
def vllm(monkeypatch):
    return fake_vllm.install(monkeypatch)


@pytest.fixture
def judges(tmp_path, vllm):
    """Makes a judge in the engine, with these engine options, and the same in transformers in float64."""

    def judges(tokenizer=None, adapter=None, model=None, prompt=None, **options):
        model, tokenizer, prompt = model or llama(), tokenizer or make_tokenizer(), prompt or make_prompt()
        model.save_pretrained(tmp_path / "model")
        engine = Engine.start(ModelSpec(str(tmp_path / "model"), "float32"), adapter, **options)
        local = LocalJudge(copy.deepcopy(model).double(), tokenizer, prompt, "tiny")
        return VLLMJudge(engine, tokenizer, prompt, "tiny"), local

    return judges


def both_orders(prompt, pairs=PAIRS):
    return [[prompt.compare(q, a, b), prompt.compare(q, b, a)] for q, a, b in pairs]


def assert_exact(answers, local, groups, candidates):
    assert sorted(answers) == list(range(len(groups)))
    for index, group in enumerate(groups):
        for question, answer in zip(group, answers[index], strict=True):
            assert answer.failed is None
            assert answer.logprobs[0] == pytest.approx(plain_answer(local, question, candidates), abs=TOLERANCE)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_answers_are_exact_with_candidates_of_several_tokens_too(judges, name):
    judge, local = judges(TOKENIZERS[name]())
    groups = both_orders(judge.prompt)
    assert_exact(dict(judge.ask(groups, ("1", "2"))), local, groups, ("1", "2"))
    ratings = [[judge.prompt.rate(q, response)] for q, *responses in PAIRS for response in responses]
    assert_exact(dict(judge.ask(ratings, RATINGS)), local, ratings, RATINGS)


def test_a_request_is_one_token_behind_each_beginning_of_a_candidate(judges, vllm):
    judge, _ = judges(max_model_len=700, gpu_memory_utilization=0.4)
    known = judge.candidates(RATINGS, judge.prompt.rate("a", "b").ending)
    assert max(map(len, known.continuations)) == 2  # "10"
    groups = [[judge.prompt.rate("a", "b")], [judge.prompt.rate("c", "d")]]
    found = dict(judge.ask(groups, RATINGS, done={0, 1}))
    assert not found and not vllm.started[0].calls
    dict(judge.ask(groups, RATINGS))
    (call,) = vllm.started[0].calls
    assert len(call) == 4 and [len(params.logprob_token_ids) for _, params in call] == [9, 1, 9, 1]
    assert call[1][0][:-1] == call[0][0] and all(params.max_tokens == 1 for _, params in call)
    options = vllm.started[0].options
    assert options["enable_prefix_caching"] and options["logprobs_mode"] == "raw_logprobs"
    assert (options["gpu_memory_utilization"], options["dtype"], options["enable_lora"]) == (0.4, "float32", False)


def test_questions_are_handed_over_in_order_within_a_budget(judges, vllm):
    judge, local = judges()
    groups = both_orders(judge.prompt)
    judge.batch_tokens = 1
    assert list(dict(judge.ask(groups, ("1", "2")))) == [0, 1, 2] and len(vllm.started[0].calls) == 3
    judge.batch_tokens = 10**6
    assert_exact(dict(judge.ask(groups, ("1", "2"))), local, groups, ("1", "2"))
    assert len(vllm.started[0].calls) == 4


def test_a_question_that_leaves_no_room_is_not_asked(judges):
    judge, _ = judges()
    groups = both_orders(judge.prompt)
    lengths = [max(len(judge.encode(question, question.ending)) for question in group) for group in groups]
    judge.model.llm.model_config.max_model_len = max(lengths)  # no room for the answer
    found = dict(judge.ask(groups, ("1", "2")))
    assert found[lengths.index(max(lengths))] == [Answer(failed="longer than the judge's context")] * 2
    assert sum(answers[0].failed is None for answers in found.values()) == 2


def test_an_adapter_answers_as_it_does_in_transformers(judges, tmp_path, vllm):
    torch.manual_seed(3)
    config = LoraConfig(r=12, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(llama(), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    judge, plain = judges(adapter=tmp_path / "adapter")
    local = LocalJudge(adapted.double(), judge.tokenizer, judge.prompt, "tiny")
    groups = both_orders(judge.prompt)
    answers = dict(judge.ask(groups, ("1", "2")))
    assert_exact(answers, local, groups, ("1", "2"))
    assert answers[0][0].logprobs[0] != pytest.approx(plain_answer(plain, groups[0][0], ("1", "2")), abs=1e-2)
    assert (vllm.started[0].options["enable_lora"], vllm.started[0].options["max_lora_rank"]) == (True, 16)


@pytest.mark.parametrize(("rank", "largest"), [(1, 8), (8, 8), (9, 16), (64, 64), (200, 256), (512, 512)])
def test_the_engine_is_told_a_rank_that_it_takes(judges, tmp_path, vllm, rank, largest):
    LoraConfig(r=1, rank_pattern={"q_proj": rank}, target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    judges(adapter=tmp_path / "adapter")
    assert vllm.started[0].options["max_lora_rank"] == largest


# ---- Texts ----------------------------------------------------------------------------------------------


def test_the_likeliest_rationales_and_texts_are_those_of_transformers(judges):
    judge, local = judges()
    groups = [[judge.prompt.compare(*pair, think=True)] for pair in PAIRS]
    thinking = Thinking(max_tokens=6)
    mine, theirs = (dict(one.ask(groups, ("1", "2"), thinking=thinking)) for one in (judge, local))
    for index in range(3):
        assert mine[index][0].rationales == theirs[index][0].rationales != ("",)
        assert mine[index][0].logprobs[0] == pytest.approx(theirs[index][0].logprobs[0], abs=1e-5)
    questions = [group[0] for group in groups]
    assert judge.write(questions, max_tokens=6) == local.write(questions, max_tokens=6)


def test_what_is_drawn_follows_from_the_seed_and_the_question_alone(judges, vllm):
    judge, _ = judges()
    groups = [[judge.prompt.compare(*pair, think=True)] for pair in PAIRS]
    how = {"thinking": Thinking(3, 5, 1.5, seed=4)}
    together = dict(judge.ask(groups, ("1", "2"), **how))
    assert all(len(set(answers[0].rationales)) > 1 for answers in together.values())
    for index, group in enumerate(groups):
        ((_, alone),) = judge.ask([group], ("1", "2"), **how)
        assert alone == together[index]
    other = dict(judge.ask(groups, ("1", "2"), thinking=Thinking(3, 5, 1.5, seed=5)))
    assert all(other[i][0].rationales != together[i][0].rationales for i in range(3))
    first = vllm.started[0].calls[0][0][1]
    assert (first.n, first.max_tokens, first.temperature, first.ignore_eos) == (3, 5, 1.5, True)


def test_a_text_ends_at_its_stop_token(judges):
    judge, _ = judges()
    prompt, stop = [5, 6, 7], []
    (((first, *_),),) = judge._sample([prompt], seed=(), max_new_tokens=3, temperature=0, stop_ids=stop)
    how = {"seed": (), "max_new_tokens": 3, "temperature": 0, "stop_ids": [first]}
    assert judge._sample([prompt], **how) == [[[]]]
    assert judge._sample([prompt], keep_end=True, **how) == [[[first]]]


# ---- Installation ---------------------------------------------------------------------------------------


def test_without_vllm_or_with_an_old_one_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"needs the package vllm.*pip install 'trl-rlaif\[vllm\]'"):
        Engine.start(ModelSpec("any"))
    old = SimpleNamespace(LLM=None, SamplingParams=lambda n=1, prompt_logprobs=None: None)
    monkeypatch.setitem(sys.modules, "vllm", old)
    with pytest.raises(UserError, match="given tokens.*--upgrade"):
        Engine.start(ModelSpec("any"))
