"""Continuation log-probabilities against a plain float64 computation, and batches within a token budget."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.tiny import make_gpt2, make_llama
from transformers import MistralConfig, MistralForCausalLM

from trl_rlaif.judging.scoring import ContinuationScorer, token_batches

VOCAB = 60
PAD = 0


def wide_gpt2():
    """A GPT-2 whose answers depend on the context: its own weights begin too small for that."""
    model = make_gpt2(VOCAB)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(10 if weight.dim() > 1 else 1)
    return model


@pytest.fixture(scope="module")
def models():
    return {"llama": make_llama(VOCAB), "gpt2": wide_gpt2()}


@pytest.fixture(params=["llama", "gpt2"])
def model(request, models):
    return models[request.param]


def logprobs(model, contexts, continuations, pad=PAD):
    """From a scorer that has seen nothing before."""
    return ContinuationScorer(model, pad)(contexts, continuations)


def drawn(length, seed):
    """A token list, the padding's id and all others among them."""
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def plain_logprobs(model, contexts, continuations):
    """One unpadded sequence at a time in float64, the whole distribution at each position, summed."""
    double = copy.deepcopy(model).double()
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
    "alone": [[13]],
    "the same twice": [[13, 4], [13, 4]],
}
# Shared beginnings of this many tokens are read from a cache, shorter ones are not.
LONG = ContinuationScorer.MIN_PREFIX + 9
CONTEXTS = {
    "nothing shared": [drawn(length, length) for length in (1, 17, 2, 40, 17)],
    "a long beginning shared": [drawn(LONG, 1) + drawn(length, length) for length in (1, 17, 2, 40, 17)],
    "a short beginning shared": [drawn(5, 1) + drawn(length, length) for length in (1, 17, 40)],
    "one goes on where another ends": [drawn(LONG, 1), drawn(LONG, 1) + drawn(8, 2), drawn(LONG, 1)],
    "all the same": [drawn(LONG, 1)] * 3,
    "one context": [drawn(LONG, 1)],
}


def assert_exact(result, expected):
    """As near as float32 comes; the spread shows that the tolerance means something."""
    assert result.shape == expected.shape and result.dtype == torch.float32 and result.device.type == "cpu"
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=1e-6)
    assert expected.numel() == 1 or expected.std() > 0.1


@pytest.mark.parametrize("continuations", CONTINUATIONS.values(), ids=CONTINUATIONS)
def test_continuations_equal_a_plain_float64_computation(model, continuations):
    contexts = CONTEXTS["nothing shared"]
    assert_exact(logprobs(model, contexts, continuations), plain_logprobs(model, contexts, continuations))


@pytest.mark.parametrize("contexts", CONTEXTS.values(), ids=CONTEXTS)
def test_contexts_equal_a_plain_float64_computation(model, contexts):
    continuations = CONTINUATIONS["prefix of another"]
    assert_exact(logprobs(model, contexts, continuations), plain_logprobs(model, contexts, continuations))


def test_one_scorer_for_many_batches(model):
    """What it keeps of a batch serves the next where that begins alike, and never changes a number."""
    scorer, continuations = ContinuationScorer(model, PAD), CONTINUATIONS["prefix of another"]
    names = ["a long beginning shared", "one goes on where another ends", "nothing shared", "all the same"]
    for name in [*names, *reversed(names)]:
        result = scorer(CONTEXTS[name], continuations)
        assert torch.equal(result, logprobs(model, CONTEXTS[name], continuations)), name


def test_a_shared_beginning_is_computed_once(model):
    seen = []
    hook = model.register_forward_pre_hook(lambda *call: seen.append(call[2]["input_ids"].shape), with_kwargs=True)
    try:
        scorer = ContinuationScorer(model, PAD)
        for _ in range(2):
            scorer(CONTEXTS["a long beginning shared"][:2], [[11], [12]])
    finally:
        hook.remove()
    assert seen == [(1, LONG), (2, 17), (2, 17)]


def test_a_sliding_window_counts_no_padding():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=VOCAB, num_hidden_layers=2, sliding_window=32, initializer_range=0.3, **shape)
    model = MistralForCausalLM(config).eval()
    contexts, continuations = CONTEXTS["a long beginning shared"], CONTINUATIONS["single"]
    assert_exact(logprobs(model, contexts, continuations), plain_logprobs(model, contexts, continuations))


def test_a_context_does_not_depend_on_its_neighbours(model):
    continuations = CONTINUATIONS["prefix of another"]
    contexts = [drawn(5, 1), drawn(30, 2), drawn(1, 3)]
    together = logprobs(model, contexts, continuations)
    alone = torch.cat([logprobs(model, [c], continuations) for c in contexts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-6)


def test_the_padding_id_does_not_matter(model):
    contexts = [drawn(5, 1), drawn(30, 2)]
    first, second = (logprobs(model, contexts, [[11], [11, 10]], pad) for pad in (0, 37))
    torch.testing.assert_close(first, second, atol=0, rtol=0)


def test_a_longer_continuation_is_never_likelier_than_its_beginning(model):
    result = logprobs(model, [drawn(9, 1)], [[11], [11, 10], [11, 10, 12]])[0]
    assert result[0] > result[1] > result[2]
    everything = logprobs(model, [drawn(9, 1)], [[11, token] for token in range(VOCAB)])[0]
    assert everything.exp().sum().item() == pytest.approx(result[0].exp().item(), rel=1e-5)


def test_no_gradient_is_kept(model):
    assert not logprobs(model, [[1, 2]], [[3]]).requires_grad


# ---- Batches --------------------------------------------------------------------------------------------

LENGTHS = [torch.randint(1, 90, (70,), generator=torch.Generator().manual_seed(s)).tolist() for s in range(3)]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("budget", [90, 200, 1000, 10**6])
def test_every_index_once_within_the_budget(lengths, budget):
    batches = token_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) * max(lengths[i] for i in batch) <= budget


@pytest.mark.parametrize("lengths", LENGTHS)
def test_batches_are_as_full_as_they_can_be(lengths):
    batches = token_batches(lengths, 400)
    for batch, following in zip(batches, batches[1:], strict=False):
        width = max(lengths[i] for i in batch)
        assert (len(batch) + 1) * width > 400
        assert min(lengths[i] for i in batch) >= max(lengths[i] for i in following)


def test_the_longest_come_first_and_ties_keep_their_order():
    assert token_batches([3, 5, 3, 5, 1], 10) == [[1, 3], [0, 2, 4]]


def test_the_batches_follow_from_the_lengths_alone():
    lengths = LENGTHS[0]
    assert token_batches(lengths, 300) == token_batches(tuple(lengths), 300)
    order = list(reversed(range(len(lengths))))
    turned = token_batches([lengths[i] for i in order], 300)
    widths = [sorted(lengths[i] for i in batch) for batch in token_batches(lengths, 300)]
    assert [sorted(lengths[order[i]] for i in batch) for batch in turned] == widths


def test_what_is_longer_than_the_budget_is_alone():
    assert token_batches([50, 4, 120, 4], 100) == [[2], [0, 1], [3]]
    assert token_batches([101, 100, 99], 100) == [[0], [1], [2]]
    assert token_batches([100, 1], 50) == [[0], [1]]


def test_nothing_makes_no_batch():
    assert token_batches([], 100) == []
