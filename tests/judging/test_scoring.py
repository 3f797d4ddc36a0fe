"""Continuation log-probabilities against a plain float64 computation, and batches within a token budget."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers.judges import MODELS, chunked
from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

from trl_rlaif.judging.scoring import ContinuationScorer, add, subtract

TOLERANCE = 5e-5  # nats against float64 weights; the error against the model itself is smaller
# Packed, packed with absolute positions, and padded.
KINDS = ["llama", "gpt2", "narrow window", "padded"]


@pytest.fixture(scope="module")
def models():
    return {name: MODELS[name]() for name in KINDS}


@pytest.fixture(params=KINDS)
def model(request, models):
    return models[request.param]


def drawn(length, seed):
    """A random token list from the whole vocabulary, including the padding id."""
    return torch.randint(0, 400, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def score(model, groups, continuations, *, begin=True, pad=0):
    """Scores from a fresh scorer."""
    contexts = [context for group in groups for context in group]
    scorer = ContinuationScorer(model, continuations, longest=max(map(len, contexts)), pad_id=pad)
    if begin:
        scorer.begin(contexts)
    return scorer(groups)


@torch.no_grad()
def plain_logprobs(model, groups, continuations):
    """One unpadded sequence at a time in float64: the sum of log-probabilities from full distributions."""
    double = copy.deepcopy(model).double()
    contexts = [context for group in groups for context in group]
    result = torch.zeros(len(contexts), len(continuations), dtype=torch.float64)
    for i, context in enumerate(contexts):
        for k, continuation in enumerate(continuations):
            logits = double(torch.tensor([[*context, *continuation]])).logits[0]
            assert logits.dtype == torch.float64
            logprobs = logits.log_softmax(-1)
            for j, token in enumerate(continuation):
                result[i, k] += logprobs[len(context) + j - 1, token]
    return result


CONTINUATIONS = {
    "single": [[11], [12]],
    "several tokens": [[11, 12, 13], [14, 15]],
    "prefix of another": [[11], [11, 10], [12], [11, 10, 10]],
    "shared beginning": [[20, 11], [20, 12], [21]],
    "one to ten": [*([i] for i in range(11, 20)), [11, 10]],
    "different lengths": [[20, 21, 22, 23], [30], [31, 32]],
    "alone": [[13]],
    "the same twice": [[13, 4], [13, 4]],
}
LONG = drawn(ContinuationScorer.MIN_PREFIX + 9, 1)  # long enough to be shared as a prefix
SHORT = LONG[:5]


def pair(start, seed):
    shared = [*start, *drawn(7, seed)]
    return [[*shared, *drawn(4, seed + 1)], [*shared, *drawn(9, seed + 2)]]


GROUPS = {
    "nothing shared": [[drawn(length, length)] for length in (1, 17, 2, 40, 17)],
    "pairs": [pair(LONG, 20), pair(LONG, 30), [LONG + drawn(3, 40)]],
    "pairs with little shared": [pair(SHORT, 20), pair(SHORT, 30)],
    "one goes on where another ends": [[LONG, LONG + drawn(8, 2)], [LONG]],
    "all the same": [[LONG, LONG], [LONG]],
    "one context": [[LONG]],
}


def assert_exact(result, expected):
    """Up to float32 accuracy; the spread shows that the tolerance is meaningful."""
    assert result.shape == expected.shape and result.dtype == torch.float32 and result.device.type == "cpu"
    torch.testing.assert_close(result.double(), expected, atol=TOLERANCE, rtol=1e-6)
    assert expected.unique().numel() == 1 or expected.std() > 0.1


@pytest.mark.parametrize("continuations", CONTINUATIONS.values(), ids=CONTINUATIONS)
@pytest.mark.parametrize("case", ["nothing shared", "pairs", "one context"])
def test_continuations_equal_a_plain_float64_computation(model, case, continuations):
    assert_exact(score(model, GROUPS[case], continuations), plain_logprobs(model, GROUPS[case], continuations))


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_groups_equal_a_plain_float64_computation(model, groups):
    continuations = CONTINUATIONS["prefix of another"]
    expected = plain_logprobs(model, groups, continuations)
    for begin in (True, False):
        assert_exact(score(model, groups, continuations, begin=begin), expected)


def test_what_begins_otherwise_than_said_is_still_exact(model):
    """With a rationale appended, the question's last tokens may differ from those computed before."""
    continuations = CONTINUATIONS["single"]
    scorer = ContinuationScorer(model, continuations, longest=100)
    scorer.begin([LONG])
    groups = [[[*LONG[:-5], *drawn(20, 3)]], [[*LONG, *drawn(3, 4)]]]
    assert_exact(scorer(groups), plain_logprobs(model, groups, continuations))


def test_a_recurrent_state_has_read_no_padding():
    """Each state depends on all earlier tokens, so padding before a text would be part of it."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_window_size": 8, "lru_width": 32}
    shape = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    model = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**heads, **shape)).eval()
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.3)  # wide, so that answers differ visibly
    groups = [[drawn(length, length)] for length in (3, 30, 17)]
    continuations = [[11], [12, 13]]
    assert not ContinuationScorer(model, continuations, longest=30).packs
    assert_exact(score(model, groups, continuations), plain_logprobs(model, groups, continuations))


def test_one_scorer_for_many_batches(model):
    scorer = ContinuationScorer(model, CONTINUATIONS["prefix of another"], longest=100)
    scorer.begin([context for group in GROUPS["pairs"] for context in group])
    first = scorer(GROUPS["pairs"])
    for group in GROUPS["pairs"]:
        assert_exact(scorer([group]), plain_logprobs(model, [group], CONTINUATIONS["prefix of another"]))
    assert torch.equal(scorer(GROUPS["pairs"]), first)


def test_which_models_pack(models):
    packs = {name: ContinuationScorer(model, [[1]], longest=60).packs for name, model in models.items()}
    assert packs == {"llama": True, "gpt2": True, "narrow window": True, "padded": False}


def test_a_chunk_counts_the_continuation():
    """Four tokens are read after the longest context; the last one is only predicted."""
    model, continuations = chunked(chunk=30), [[1, 2, 3, 4, 5]]
    packs = [ContinuationScorer(model, continuations, longest=longest).packs for longest in (25, 27)]
    assert packs == [True, False]
    for length in (24, 25, 26, 27):
        groups = [[drawn(length, 1)], [drawn(length - 10, 2)]]
        assert_exact(score(model, groups, continuations), plain_logprobs(model, groups, continuations))


def test_the_padding_id_does_not_matter(model):
    first, second = (score(model, GROUPS["nothing shared"], [[11], [11, 10]], pad=pad) for pad in (0, 37))
    torch.testing.assert_close(first, second, atol=0, rtol=0)


def test_a_longer_continuation_is_never_likelier_than_its_beginning(model):
    result = score(model, [[drawn(9, 1)]], [[11], [11, 10], [11, 10, 12]])[0]
    assert result[0] > result[1] > result[2]
    everything = score(model, [[drawn(9, 1)]], [[11, token] for token in range(400)])[0]
    assert everything.exp().sum().item() == pytest.approx(result[0].exp().item(), rel=1e-5)


def test_no_gradient_is_kept(model):
    assert not score(model, [[[1, 2]]], [[3]]).requires_grad


def test_batches_by_what_a_group_costs(models):
    """Packed, shared tokens cost once; padded, each context costs as much as the group's longest."""
    groups = [[drawn(20, 1), drawn(20, 1)[:18] + drawn(2, 2)], [drawn(22, 3)]]
    packed = ContinuationScorer(models["llama"], [[1]], longest=25)
    padded = ContinuationScorer(models["padded"], [[1]], longest=25 + 32)
    assert packed.packs and not padded.packs
    assert packed.batches(groups, 44) == [[0, 1]] and len(packed.batches(groups, 43)) == 2
    assert padded.batches(groups, 80) == [[0, 1]] and len(padded.batches(groups, 61)) == 2


# ---- Sums of probabilities ------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), [(0.3, 0.2), (0.5, 1e-9), (1e-300, 1e-301), (0.7, 0.0)])
def test_add_and_subtract(a, b):
    log_a, log_b = math.log(a), math.log(b) if b else -math.inf
    assert add(log_a, log_b) == add(log_b, log_a) == pytest.approx(math.log(a + b), abs=1e-14)
    assert subtract(log_a, log_b) == pytest.approx(math.log(a - b), abs=1e-14)


def test_nothing_and_nothing():
    assert add(-math.inf, -math.inf) == -math.inf
    assert subtract(-1.0, -1.0) == subtract(-1.0, -0.999) == subtract(-math.inf, -math.inf) == -math.inf
