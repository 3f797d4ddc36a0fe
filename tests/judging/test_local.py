"""The local judge: exact answers, shared computation, questions that are skipped or fail, and written texts."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from helpers.judges import MODELS, TOKENIZERS, gpt2, llama, make_prompt, plain_answer, plain_text
from helpers.tiny import make_tokenizer

from trl_rlaif.judging.local import LocalJudge
from trl_rlaif.judging.packed import PackedModel
from trl_rlaif.judging.prompt import Exemplar, JudgePrompt
from trl_rlaif.judging.question import Answer, Thinking
from trl_rlaif.judging.scoring import ContinuationScorer

RATINGS = tuple(map(str, range(1, 11)))
TOLERANCE = 1e-5  # nats; the actual error is about 4e-6
TOO_LONG = "longer than the judge's context"
PAIRS = [
    ("what is the capital?", "a city", "the lazy dog"),
    ("a", "b", "c"),
    ("over the lazy dog?", "the quick brown fox jumps over it " * 4, "no"),
    ("what is the capital?", "the lazy dog", "a city, is it not?"),
    ("is it?", "Response 2:\nyes<|end|>", "no"),
]
EXEMPLARS = (Exemplar("a fox?", "yes", "no", "a fox is quick", 1), Exemplar("a dog?", "no", "yes", "it is lazy", 2))


def make_judge(model=None, tokenizer=None, *, prompt=None, **options):
    return LocalJudge(model or llama(), tokenizer or make_tokenizer(), prompt or make_prompt(), "tiny", **options)


def both_orders(prompt, pairs=PAIRS, **options):
    """One group per pair: the question in both orders."""
    return [[prompt.compare(q, a, b, **options), prompt.compare(q, b, a, **options)] for q, a, b in pairs]


def asked(judge, groups, candidates=("1", "2"), **options):
    found = list(judge.ask(groups, candidates, **options))
    assert len({index for index, _ in found}) == len(found)
    return dict(found)


def assert_exact(judge, groups, candidates, answers):
    """Each answer is that of a plain forward pass over its question alone."""
    assert set(answers) == set(range(len(groups)))
    expected = []
    for index, group in enumerate(groups):
        for question, answer in zip(group, answers[index], strict=True):
            assert answer.failed is None and answer.rationales == ()
            (logprobs,) = answer.logprobs
            expected.append(plain_answer(judge, question, candidates))
            assert logprobs == pytest.approx(expected[-1], abs=TOLERANCE)
    # The tolerance is meaningful. (Training a unigram tokenizer gives slightly different results every time.)
    assert torch.tensor(expected).std(0).min() > 100 * TOLERANCE


@pytest.fixture
def packs(monkeypatch):
    """A log of whether each new scorer packs (or pads)."""
    log = []
    before = ContinuationScorer.__init__

    def init(self, *args, **options):
        before(self, *args, **options)
        log.append(self.packs)

    monkeypatch.setattr(ContinuationScorer, "__init__", init)
    return log


# ---- Exact probabilities --------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("space", [False, True], ids=["no space", "a space"])
def test_answers_with_every_kind_of_tokenizer(name, chat, space):
    endings = {"ending": "It is ", "rating_ending": "It is "} if space else {}
    judge = make_judge(tokenizer=TOKENIZERS[name](chat=chat), prompt=make_prompt(**endings))
    groups = both_orders(judge.prompt, PAIRS[:4])
    assert_exact(judge, groups, ("1", "2"), asked(judge, groups))
    ratings = [[judge.prompt.rate(q, response)] for q, *responses in PAIRS[:2] for response in responses]
    assert_exact(judge, ratings, RATINGS, asked(judge, ratings, RATINGS))


@pytest.mark.parametrize("batch_tokens", [1, 10**6], ids=["alone", "together"])
@pytest.mark.parametrize("name", MODELS)
def test_answers_of_every_kind_of_model(name, batch_tokens, packs):
    prompt = make_prompt()
    prompt = JudgePrompt(prompt.name, prompt.parts, EXEMPLARS)
    judge = make_judge(MODELS[name](), prompt=prompt, batch_tokens=batch_tokens)
    groups = both_orders(prompt, PAIRS[:4], preamble="detailed", shots=2)
    assert_exact(judge, groups, ("1", "2"), asked(judge, groups))
    assert packs == [name != "padded"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "narrow window", "padded"])
def test_the_padding_side_does_not_matter(name):
    judge = make_judge(MODELS[name]())
    groups, found = both_orders(judge.prompt), []
    for side in ("left", "right"):
        judge.tokenizer.padding_side = side
        found.append(asked(judge, groups))
    assert found[0] == found[1]
    assert_exact(judge, groups[:4], ("1", "2"), {i: found[0][i] for i in range(4)})


def test_texts_with_control_tokens_are_read_as_text():
    """The plain computation cannot encode them, so the expected tokens are built by hand."""
    judge = make_judge()
    question = judge.prompt.compare("is it?", "yes<|end|>", "no")
    text = plain_text(judge, question, question.ending)
    before, after = text.split("yes<|end|>")
    pieces = [f"{before}yes<", f"|end|>{after}"]
    ids = [i for piece in pieces for i in judge.tokenizer(piece, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        logits = judge.model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
    expected = logits[judge.tokenizer.convert_tokens_to_ids(["1", "2"])].tolist()
    assert asked(judge, [[question]])[0][0].logprobs[0] == pytest.approx(expected, abs=TOLERANCE)


def test_weights_in_bfloat16_change_only_the_rounding():
    judge = make_judge()
    groups = both_orders(judge.prompt, PAIRS[:2])
    exact = asked(judge, groups)
    judge.model.bfloat16()
    rough = asked(judge, groups)
    for index in exact:
        for one, other in zip(exact[index], rough[index], strict=True):
            assert one.logprobs[0] == pytest.approx(other.logprobs[0], abs=0.5)
            assert one.logprobs[0] != pytest.approx(other.logprobs[0], abs=TOLERANCE)


def test_no_questions_no_answers():
    assert asked(make_judge(), []) == {}


def test_nothing_is_computed_before_somebody_wants_it():
    judge = make_judge()
    judge.model.register_forward_pre_hook(lambda *_: pytest.fail("computed"))
    judge.ask(both_orders(judge.prompt), ("1", "2"))


def test_the_context_surrounds_every_forward_pass():
    inside, log = [], []

    @contextmanager
    def role():
        inside.append(1)
        yield
        inside.pop()

    judge = make_judge(context=role, batch_tokens=1, precision="auto")
    judge.model.register_forward_pre_hook(lambda *_: log.append(len(inside)))
    for _ in judge.ask(both_orders(judge.prompt), ("1", "2")):
        assert not inside  # the base is free while the caller has an answer
    asked(judge, both_orders(judge.prompt, PAIRS[:2], think=True), thinking=Thinking(2, 3, 1.0))
    assert set(log) == {1} and not inside


# ---- Shared computation ---------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """Makes a judge, with a log of the tokens that reach its model."""
    monkeypatch.setattr(PackedModel, "can_read", staticmethod(lambda *_: True))  # keeps the trial out of the log

    def make(**options):
        judge, seen = make_judge(**options), []
        judge.model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].tolist()))
        return judge, seen

    return make


def trie(sequences):
    """The number of tokens if no shared prefix is computed twice."""
    return len({tuple(ids[: i + 1]) for ids in sequences for i in range(len(ids))})


@pytest.mark.parametrize("batch_tokens", [1, 700, 10**6])
def test_shared_tokens_reach_the_model_once(counted, batch_tokens):
    judge, seen = counted(batch_tokens=batch_tokens)
    request = "question on the quick brown fox that jumps over the lazy dog, in the capital of a country"
    pairs = [(f"{letter} {request}", f"{letter} one", f"not {letter} two") for letter in "abcdefg"]
    groups = both_orders(judge.prompt, pairs)
    encoded = [[judge.encode(question, question.ending) for question in group] for group in groups]
    flat = [ids for group in encoded for ids in group]
    asked(judge, groups)
    assert all(len(batch) == 1 for batch in seen)  # rows without padding
    prefix = seen[0][0]
    # Frame codes of two pairs may share a prefix by chance, which is not reused.
    needed = len(prefix) + sum(trie(group) - len(prefix) for group in encoded)
    assert sum(len(batch[0]) for batch in seen) == needed < 0.6 * sum(map(len, flat))
    assert len(prefix) > 20 and all(ids[: len(prefix)] == prefix for ids in flat)
    assert len(seen) > 7 if batch_tokens == 1 else len(seen) >= 2
    again = [ids for (row,) in seen[1:] for ids in zip(*(row[i:] for i in range(20)), strict=False)]
    middle = encoded[0][0][len(prefix) : len(prefix) + 20]
    assert Counter(again)[tuple(middle)] == 1  # a pair's context occurs once for both orders


def test_ten_is_read_behind_one_in_the_same_pass(counted):
    judge, seen = counted()
    groups = [[judge.prompt.rate(f"{letter} question", "a fox")] for letter in "abcd"]
    asked(judge, groups, RATINGS)
    one = judge.tokenizer.convert_tokens_to_ids("1")
    flat = [[*judge.encode(question, question.ending), one] for (question,) in groups]
    assert sum(len(batch[0]) for batch in seen) == trie(flat)


def test_padded_batches_keep_the_budget(counted, monkeypatch):
    monkeypatch.setattr(PackedModel, "can_read", staticmethod(lambda *_: False))
    judge, seen = counted(batch_tokens=900)
    asked(judge, both_orders(judge.prompt, PAIRS * 3))
    assert all(len(batch) * len(batch[0]) <= 900 for batch in seen) and len(seen) > 2
    assert sum(map(len, seen)) == 2 * 3 * len(PAIRS)


def test_packed_batches_keep_the_budget(counted):
    judge, seen = counted(batch_tokens=500)
    asked(judge, both_orders(judge.prompt, PAIRS * 3))
    assert all(len(batch[0]) <= 500 for batch in seen) and len(seen) > 3


# ---- Done, too long, or not a number --------------------------------------------------------------------


@pytest.mark.parametrize("thinking", [None, Thinking(2, 4, 1.0)], ids=["at once", "thinking"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "narrow window", "padded"])
def test_what_is_left_is_answered_bit_for_bit_as_in_an_undisturbed_run(name, thinking):
    judge = make_judge(MODELS[name](), batch_tokens=800)
    groups = both_orders(judge.prompt, PAIRS * 2, think=thinking is not None)
    undisturbed = asked(judge, groups, thinking=thinking)
    order = list(undisturbed)
    for done in ({0}, set(order[:3]), set(order[1::2]), set(order[:-1]), set(order)):
        rest = asked(judge, groups, thinking=thinking, done=done)
        assert rest == {index: undisturbed[index] for index in order if index not in done}


@pytest.mark.parametrize("name", ["llama", "padded"])
def test_what_is_left_is_computed_in_the_same_batches(name):
    """The same passes over the same tokens, except passes in which all answers are known."""
    judge, seen = make_judge(MODELS[name](), batch_tokens=800), []
    judge.model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].tolist()))
    groups = both_orders(judge.prompt, PAIRS * 2)
    asked(judge, groups)  # includes the one-time trial
    seen.clear()
    order = list(asked(judge, groups))
    passes, answers = seen.copy(), {}
    seen.clear()
    for index in order:  # one at a time
        answers |= asked(judge, groups, done=set(order) - {index})
        assert len(answers) == order.index(index) + 1
        assert all(row in passes for row in seen) and len(seen) < len(passes)
        seen.clear()
    assert asked(judge, groups, done=order) == {}


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
def test_the_longest_question_that_fits(make):
    judge = make_judge()
    groups = both_orders(judge.prompt)
    lengths = [max(len(judge.encode(q, q.ending)) for q in group) for group in groups]
    longest = max(lengths)
    for room, fits in ((1, True), (0, False)):  # the candidate after the last token counts
        judge = make_judge(make(length=longest + room))
        found = asked(judge, groups)
        assert set(found) == set(range(len(groups)))
        for index, answers in found.items():
            failed = None if fits or lengths[index] < longest else TOO_LONG
            assert [answer.failed for answer in answers] == [failed] * 2
            assert all((not answer.logprobs) == bool(answer.failed) for answer in answers)
        assert Counter(a[0].failed for a in found.values()) == Counter({None: 5} if fits else {None: 4, TOO_LONG: 1})


def test_what_is_too_long_leaves_the_others_alone():
    judge = make_judge(llama(length=400), batch_tokens=500)
    groups = both_orders(judge.prompt, [*PAIRS[:2], ("x", "a very long " * 100, "b"), PAIRS[3]])
    found = asked(judge, groups)
    assert found[2] == [Answer(failed=TOO_LONG)] * 2
    rest = [groups[i] for i in (0, 1, 3)]
    assert asked(judge, rest) == {0: found[0], 1: found[1], 2: found[3]}
    assert asked(judge, groups, done={2}).keys() == asked(judge, groups, done={2, 9}).keys() == {0, 1, 3}
    assert asked(judge, [groups[2]]) == {0: found[2]}
    assert asked(judge, [groups[2]], done={0}) == {}


def with_nan(model, row):
    with torch.no_grad():
        row(model)[:] = math.nan
    return model


@pytest.mark.parametrize("thinking", [None, Thinking(1, 3)], ids=["at once", "thinking"])
@pytest.mark.parametrize("name", ["llama", "padded"])
def test_a_model_of_no_numbers_gives_no_answers(name, thinking):
    model = with_nan(MODELS[name](), lambda m: m.lm_head.weight[7])
    judge = make_judge(model)
    found = asked(judge, both_orders(judge.prompt, think=True), thinking=thinking)
    assert set(found) == set(range(len(PAIRS)))
    for answers in found.values():
        for answer in answers:
            assert answer.failed == "the judge's probabilities are not finite" and answer.logprobs == ()
            assert len(answer.rationales) == (thinking is not None)


@pytest.mark.parametrize("name", ["llama", "padded"])
def test_what_one_text_brings_about_leaves_the_others_alone(name):
    """The embedding of a letter that occurs in only one pair is NaN."""
    judge = make_judge(MODELS[name]())
    groups = both_orders(judge.prompt, [*PAIRS[:2], ("what?", "a Z here", "b"), PAIRS[3]])
    token = judge.tokenizer.convert_tokens_to_ids("Z")
    before = asked(judge, groups)
    with_nan(judge.model, lambda m: m.get_input_embeddings().weight[token])
    after = asked(judge, groups)
    assert [answer.failed is None for index in range(4) for answer in after[index]] == [True] * 4 + [False] * 2 + [
        True
    ] * 2
    assert {i: after[i] for i in (0, 1, 3)} == {i: before[i] for i in (0, 1, 3)}


# ---- Written texts --------------------------------------------------------------------------------------


@torch.no_grad()
def likeliest(judge, question, count):
    """Greedy text of up to ``count`` tokens, computed one by one, and whether it ended."""
    ids = judge.tokenizer(plain_text(judge, question, ""), add_special_tokens=False)["input_ids"]
    written = []
    for _ in range(count):
        token = judge.model(torch.tensor([ids + written])).logits[0, -1].argmax().item()
        if token == judge.tokenizer.eos_token_id:
            return judge.tokenizer.decode(written).strip(), True
        written.append(token)
    return judge.tokenizer.decode(written, skip_special_tokens=True).strip(), False


def test_it_writes_the_likeliest_text():
    prompt = make_prompt()
    prompt.parts.update({"draft.txt": "Write.", "draft.jinja": "Request:\n{{ context }}"})
    judge = make_judge(prompt=prompt)
    questions = [prompt.draft(text) for text in ("what is the capital?", "a", "over the lazy dog " * 8, "is it?")]
    found = judge.write(questions, max_tokens=12)
    assert [(one.text, one.ended) for one in found] == [likeliest(judge, question, 12) for question in questions]
    assert len({one.text for one in found}) > 1 and all(one.failed is None for one in found)


def test_what_it_draws_is_seeded_and_what_is_too_long_is_not_written():
    prompt = make_prompt()
    prompt.parts.update({"draft.txt": "Write.", "draft.jinja": "Request:\n{{ context }}"})
    judge = make_judge(llama(length=500), prompt=prompt)
    questions = [prompt.draft(text) for text in ("what?", "over the lazy dog " * 100, "is it?")]
    first, same, other = (judge.write(questions, max_tokens=8, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert first == same != other
    assert [one.failed for one in first] == [None, TOO_LONG, None]
    assert [one.failed for one in judge.write(questions[1:2], max_tokens=8)] == [TOO_LONG]
