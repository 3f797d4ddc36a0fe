"""Probabilities of strings, however a tokenizer splits them."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.judges import TOKENIZERS, llama, make_prompt, path_probability, plain_answer, plain_text
from helpers.tiny import CHAT_TEMPLATE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_rlaif.judging.candidates import Candidates
from trl_rlaif.judging.local import LocalJudge

RATINGS = tuple(map(str, range(1, 11)))
TEXTS = ("what is the capital?", "a city", "the lazy dog")
TOLERANCE = 1e-5  # nats; the actual error is about 3e-6


def make_judge(tokenizer, **parts):
    return LocalJudge(llama(), tokenizer, make_prompt(**parts), "tiny")


def answer(judge, question, candidates):
    [(_, [found])] = judge.ask([[question]], candidates)
    return list(found.logprobs[0])


def spelled(judge, known, ending):
    """The strings that a judge's continuations spell."""
    tokenizer = judge.tokenizer
    bare = tokenizer(f"judge\n{ending}", add_special_tokens=False)["input_ids"]
    stem = bare[: len(bare) - known.dropped]
    begin = len(tokenizer.decode(bare))
    return [tokenizer.decode([*stem, *tokens])[begin:] for tokens in known.continuations]


# ---- One and ten ----------------------------------------------------------------------------------------

ENDINGS = {"no space": "Rating=", "a space": "It is "}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_continuations_spell_the_candidates(name, ending):
    judge = make_judge(TOKENIZERS[name](), rating_ending=ending)
    known = judge.candidates(RATINGS, ending)
    texts = spelled(judge, known, ending)
    for candidate, whole in zip(RATINGS, known.whole, strict=True):
        assert whole and {texts[i] for i in whole} == {candidate}
        assert len({tuple(known.continuations[i]) for i in whole}) == len(whole)
    assert {texts[i] for i in known.longer[0]} == {"10"}
    assert known.longer[1:] == [[]] * 9
    # If "10" is a token, it can also be spelled with two.
    joined = name != "split digits"
    assert len(known.continuations) == 10 + joined and len(known.whole[9]) == 1 + joined
    # If the tokenizer merges the space with the digit, both are scored together.
    assert known.dropped == (joined and ending == "It is ") or name == "metaspace BPE"


def test_ten_is_one_and_zero():
    """Tokenizers that split digits: P("10") = P("1") P("0" | "1"), and P("1") excludes it."""
    judge = make_judge(TOKENIZERS["split digits"]())
    question = judge.prompt.rate(*TEXTS[:2])
    context = judge.encode(question, question.ending)
    one, zero = judge.tokenizer.convert_tokens_to_ids(["1", "0"])
    with torch.no_grad():
        after = judge.model(torch.tensor([[*context, one]])).logits[0].double().softmax(-1)
    p_one, p_zero = after[-2, one].item(), after[-1, zero].item()
    found = answer(judge, question, RATINGS)
    assert found[9] == pytest.approx(math.log(p_one * p_zero), abs=TOLERANCE)
    assert found[0] == pytest.approx(math.log(p_one * (1 - p_zero)), abs=TOLERANCE)
    assert found[0] != pytest.approx(math.log(p_one), abs=10 * TOLERANCE)


def test_both_spellings_of_ten_count():
    """Tokenizers with a token "10": summed over all possible outputs, each string counted once."""
    judge = make_judge(TOKENIZERS["joined digits"]())
    with torch.no_grad():
        judge.model.lm_head.weight.mul_(0.2)  # flat enough that omitting any token would show
    question = judge.prompt.rate(*TEXTS[:2])
    context = judge.encode(question, question.ending)
    one, zero, ten = judge.tokenizer.convert_tokens_to_ids(["1", "0", "10"])
    vocabulary = range(judge.model.config.vocab_size)
    behind_one = {token: path_probability(judge.model, context, [one, token]) for token in vocabulary}
    alone = math.fsum(p for token, p in behind_one.items() if token != zero)
    p_ten = path_probability(judge.model, context, [ten])
    assert min(p_ten, behind_one[zero]) / (p_ten + behind_one[zero]) > 50 * TOLERANCE
    assert behind_one[zero] / alone > 50 * TOLERANCE
    found = answer(judge, question, RATINGS)
    assert found[0] == pytest.approx(math.log(alone), abs=TOLERANCE)
    assert found[9] == pytest.approx(math.log(p_ten + behind_one[zero]), abs=TOLERANCE)


def test_a_space_that_joins_the_candidate_is_read_with_it():
    judge = make_judge(TOKENIZERS["unigram"](), ending="It is ")
    question = judge.prompt.compare(*TEXTS)
    context = judge.tokenizer(plain_text(judge, question, "It is"), add_special_tokens=False)["input_ids"]
    spaced = judge.tokenizer.convert_tokens_to_ids(["▁1", "▁2"])
    expected = [math.log(path_probability(judge.model, context, [token])) for token in spaced]
    assert answer(judge, question, ("1", "2")) == pytest.approx(expected, abs=TOLERANCE)


# ---- Endings that join with the candidates --------------------------------------------------------------


def joining_tokenizer(*merges, chat):
    """Byte-level BPE without pre-splitting: "=" and a candidate can merge into one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|pad|>", "<|start|>", "<|end|>", *alphabet, *("".join(merge) for merge in merges)]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", bos_token="<|start|>", eos_token="<|end|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


# Ending, the tokenizer's merges (byte-level tokenizers write a space as Ġ), number of dropped tokens.
JOINS = {
    "nothing joined": ("Preferred Response=", [], 0),
    "both joined": ("Preferred Response=", [("=", "1"), ("=", "2")], 1),
    "one joined": ("Preferred Response=", [("=", "1")], 1),
    "joined over two characters": ("Preferred Response=", [("=", "1"), ("e", "=1"), ("=", "2"), ("e", "=2")], 2),
    "the ending joins with itself": ("Preferred Response=", [("e", "="), ("=", "2")], 0),
    "the candidate first": ("Preferred Response=", [("=", "2"), ("e", "=")], 1),
    "joined with a space": ("It is Response ", [("Ġ", "1"), ("Ġ", "2")], 1),
    "a space that joins the word or the candidate": ("It is Response ", [("e", "Ġ"), ("Ġ", "1"), ("eĠ", "2")], 1),
}


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
@pytest.mark.parametrize("case", JOINS)
def test_candidates_that_join_with_the_ending(case, chat):
    ending, merges, dropped = JOINS[case]
    judge = make_judge(joining_tokenizer(*merges, chat=chat), ending=ending)
    question = judge.prompt.compare(*TEXTS)
    known = judge.candidates(("1", "2"), ending)
    assert known.dropped == dropped and spelled(judge, known, ending) == ["1", "2"]
    found = answer(judge, question, ("1", "2"))
    assert found == pytest.approx(plain_answer(judge, question, ("1", "2")), abs=TOLERANCE)


def test_candidates_of_several_tokens():
    judge = make_judge(TOKENIZERS["split digits"]())
    question, words = judge.prompt.compare(*TEXTS), ("yes", "no, never", "perhaps")
    known = judge.candidates(words, question.ending)
    assert len({len(tokens) for tokens in known.continuations}) > 1
    assert answer(judge, question, words) == pytest.approx(plain_answer(judge, question, words), abs=TOLERANCE)


# ---- Arithmetic -----------------------------------------------------------------------------------------


def test_combine_adds_spellings_and_takes_longer_ones_away():
    known = Candidates(0, [[1], [2], [3], [1, 4]], [[0], [1], [2, 3]], [[3], [], []])
    p = [0.4, 0.1, 0.2, 0.15]
    expected = [0.4 - 0.15, 0.1, 0.2 + 0.15]
    assert [math.exp(x) for x in known.combine([math.log(x) for x in p])] == pytest.approx(expected, rel=1e-12)


def test_combine_keeps_tiny_probabilities():
    known = Candidates(0, [[1], [2], [1, 3]], [[0], [1, 2]], [[2], []])
    one, ten = known.combine([-800.0, -1000.0, -801.0])
    assert one == pytest.approx(-800 + math.log1p(-math.exp(-1)), abs=1e-12)
    assert ten == pytest.approx(-801.0, abs=1e-12)


def test_combine_where_rounding_leaves_nothing():
    known = Candidates(0, [[1], [1, 2]], [[0], [1]], [[1], []])
    assert known.combine([-1.0, -1.0]) == (-math.inf, -1.0)
    assert known.combine([-1.0, -1.0 + 1e-9]) == (-math.inf, -1.0 + 1e-9)
