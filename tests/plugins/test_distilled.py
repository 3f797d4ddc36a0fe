"""The labeler `distilled` with a scripted judge, and its formulas against plain mathematics."""

from __future__ import annotations

import math

import pytest
import torch
from trl_rlaif_distilled import DistilledLabeler
from trl_rlaif_distilled.debias import combine, preference, sigmoid

from trl_rlaif import Label, Pair, UserError
from trl_rlaif.judging.scoring import token_batches
from trl_rlaif.plugins import installed_plugins

LOGITS = [-30.0, -3.0, -0.5, 0.0, 1e-9, 0.7, 4.0, 25.0]


def plain_sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ---- Formulas -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", LOGITS)
def test_sigmoid(x):
    assert sigmoid(x) == pytest.approx(plain_sigmoid(x), rel=1e-14)
    assert sigmoid(x) + sigmoid(-x) == pytest.approx(1, abs=1e-15)


def test_sigmoid_far_out():
    assert (sigmoid(1000.0), sigmoid(-1000.0)) == (1.0, 0.0)
    assert (sigmoid(math.inf), sigmoid(-math.inf)) == (1.0, 0.0)


@pytest.mark.parametrize(("one", "two"), [(0.6, 0.3), (0.01, 0.02), (0.5, 0.5), (1 - 1e-12, 1e-12)])
def test_preference_is_the_softmax_over_the_two_and_their_mass(one, two):
    p, mass = preference(math.log(one), math.log(two))
    assert p == pytest.approx(one / (one + two), rel=1e-12)
    assert mass == pytest.approx(one + two, rel=1e-12)


def test_rounding_gives_no_mass_above_one():
    assert preference(math.log(0.5) + 1e-9, math.log(0.5) + 1e-9)[1] == 1.0


def test_preference_of_candidates_that_are_both_unlikely():
    p, mass = preference(-2000.0, -2001.0)
    assert p == pytest.approx(plain_sigmoid(1.0)) and mass == 0.0
    assert preference(-math.inf, -1.0)[0] == 0.0


@pytest.mark.parametrize("a", LOGITS)
@pytest.mark.parametrize("b", LOGITS)
def test_combine(a, b):
    assert combine(a, b, "mean_prob") == pytest.approx((plain_sigmoid(a) + plain_sigmoid(b)) / 2, rel=1e-12)
    assert combine(a, b, "mean_logit") == pytest.approx(plain_sigmoid((a + b) / 2), rel=1e-12)


@pytest.mark.parametrize("mode", ["mean_prob", "mean_logit"])
def test_combine_has_the_symmetries_of_a_preference(mode):
    for a in LOGITS:
        assert combine(a, -a, mode) == pytest.approx(0.5, abs=1e-15)  # the orders contradict each other
        assert combine(a, a, mode) == pytest.approx(plain_sigmoid(a), rel=1e-12)  # and here they agree
        for b in LOGITS:
            assert combine(a, b, mode) == combine(b, a, mode)
            assert combine(a, b, mode) + combine(-a, -b, mode) == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("bias", [0.5, 4.0, -8.0])
def test_mean_logit_cancels_an_additive_bias_and_mean_prob_does_not(bias):
    """The judge's log-odds of what stands first are the truth plus a bias: it falls on either response."""
    truth = 2.0
    biased = (truth + bias, truth - bias)
    assert combine(*biased, "mean_logit") == pytest.approx(sigmoid(truth), rel=1e-15)
    squeezed = combine(*biased, "mean_prob")
    assert 0.5 < squeezed < sigmoid(truth) - 0.005


def test_far_out_logits_stay_probabilities():
    for a in (1000.0, -1000.0):
        for b in (1000.0, -1000.0):
            assert combine(a, b, "mean_prob") == ((a > 0) + (b > 0)) / 2
            assert combine(a, b, "mean_logit") == ((a > 0) + (b > 0)) / 2


# ---- A scripted judge -----------------------------------------------------------------------------------


class ScriptedJudge:
    """Encodes a question as its characters, and answers by a rule.

    Args:
        rule: (prompt, first, second) -> log-odds of the one that is shown first.
        limit: Longest question that fits.
        batch_tokens: As Judge's.
        mass: Probability of the two candidates together.
        wobble: Adds to each log-probability what depends on all that is in the batch, as a real model's
            rounding does, only more.
    """

    name = "scripted"

    def __init__(self, rule, *, limit=10**9, batch_tokens=10**9, mass=0.9, wobble=0.0):
        self.rule, self.limit, self.batch_tokens, self.mass, self.wobble = rule, limit, batch_tokens, mass, wobble
        self.passes = []

    def encode(self, prompt, response_1, response_2):
        return [ord(c) for c in f"{prompt}\0{response_1}\0{response_2}"]

    def fits(self, ids):
        return len(ids) <= self.limit

    def batches(self, lengths):
        return token_batches(lengths, self.batch_tokens)

    def logprobs(self, questions):
        self.passes.append(len(questions))
        context = sum(map(sum, questions)) % 97 / 97 * self.wobble
        rows = []
        for place, question in enumerate(questions):
            odds = self.rule(*"".join(map(chr, question)).split("\0")) + context * (1 + place)
            rows.append([math.log(self.mass * sigmoid(odds)), math.log(self.mass * sigmoid(-odds))])
        return torch.tensor(rows, dtype=torch.float64)


def longer(prompt, first, second):
    return 0.3 * (len(first) - len(second))


def always_first(prompt, first, second):
    return 3.0


def make_pairs(count=12):
    return [Pair(f"p{i}", f"prompt {i}", "a" * (i + 1), "b" * (7 + 3 * (i % 5))) for i in range(count)]


def labels(pairs, judge, done=(), **options):
    found = list(DistilledLabeler(**options).label(pairs, judge, done))
    assert len({label.id for label in found}) == len(found)
    return {label.id: label for label in found}


# ---- Labels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("debias", ["mean_prob", "mean_logit"])
def test_a_judge_of_length_prefers_the_longer_in_either_place(debias):
    pairs = [Pair("first", "x", "a" * 9, "b" * 4), Pair("second", "x", "b" * 4, "a" * 9), Pair("tie", "x", "a", "b")]
    found = labels(pairs, ScriptedJudge(longer), debias=debias)
    p = plain_sigmoid(0.3 * 5)
    for name, expected in (("first", p), ("second", 1 - p), ("tie", 0.5)):
        label = found[name]
        assert (label.p, label.p_12, label.p_21) == pytest.approx((expected,) * 3, rel=1e-9)
        assert (label.mass_12, label.mass_21) == pytest.approx((0.9, 0.9))
        assert label.judge == "scripted" and label.skipped is None


@pytest.mark.parametrize("debias", ["mean_prob", "mean_logit"])
def test_a_judge_that_always_says_1_prefers_neither(debias):
    [label] = labels([Pair("x", "p", "a", "bb")], ScriptedJudge(always_first), debias=debias).values()
    assert label.p == pytest.approx(0.5, abs=1e-12)
    assert label.p_12 == pytest.approx(plain_sigmoid(3.0)) and label.p_21 == pytest.approx(plain_sigmoid(-3.0))
    assert label.p_12 > 0.5 > label.p_21


def test_mean_logit_is_the_default_and_undoes_a_bias():
    pair = Pair("x", "p", "a" * 9, "b" * 4)
    judge = ScriptedJudge(lambda *shown: longer(*shown) + 3.0)
    assert labels([pair], judge)["x"].p == pytest.approx(plain_sigmoid(1.5))
    paper = labels([pair], judge, debias="mean_prob")["x"]
    assert paper.p == pytest.approx((plain_sigmoid(4.5) + plain_sigmoid(-1.5)) / 2)
    assert paper.p == pytest.approx((paper.p_12 + paper.p_21) / 2)


def test_each_order_has_its_own_mass():
    def rule(prompt, first, second):
        judge.mass = 0.9 if first == "a" else 0.2
        return 0.0

    judge = ScriptedJudge(rule)
    label = labels([Pair("x", "p", "a", "b")], judge)["x"]
    assert (label.mass_12, label.mass_21) == pytest.approx((0.9, 0.2))


def test_swapping_the_responses_mirrors_the_label():
    pairs = make_pairs()
    swapped = [Pair(pair.id, pair.prompt, pair.response_2, pair.response_1) for pair in pairs]
    judge = ScriptedJudge(lambda *shown: longer(*shown) + 0.8)
    one, other = labels(pairs, judge), labels(swapped, judge)
    for id in one:
        assert one[id].p == pytest.approx(1 - other[id].p, abs=1e-12)
        assert one[id].p_12 == pytest.approx(1 - other[id].p_21, abs=1e-12)


def test_both_orders_of_a_pair_are_in_one_pass_within_the_budget():
    judge = ScriptedJudge(longer, batch_tokens=150)
    pairs = make_pairs()
    assert len(labels(pairs, judge)) == 12
    assert sum(judge.passes) == 24 and all(count % 2 == 0 for count in judge.passes) and len(judge.passes) > 3
    assert max(judge.passes) * min(len(judge.encode(p.prompt, p.response_1, p.response_2)) for p in pairs) <= 150


# ---- Resuming -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [1, 5, 11])
def test_a_resumed_run_gives_the_same_numbers_bit_for_bit(kept):
    """The wobble makes every number depend on its whole batch."""
    pairs = make_pairs()
    judge = ScriptedJudge(longer, batch_tokens=200, wobble=1e-3)
    undisturbed = labels(pairs, judge)
    assert undisturbed != labels(pairs, ScriptedJudge(longer, batch_tokens=400, wobble=1e-3))  # it does
    for done in (list(undisturbed)[:kept], sorted(undisturbed)[:kept], [pairs[0].id, pairs[-1].id]):
        rest = labels(pairs, judge, done)
        assert rest == {id: label for id, label in undisturbed.items() if id not in done}


def test_nothing_is_computed_for_batches_that_are_done():
    pairs = make_pairs()
    judge = ScriptedJudge(longer, batch_tokens=200)
    order = list(labels(pairs, judge))
    passes, judge.passes = judge.passes, []
    labels(pairs, judge, order[: passes[0] // 2])
    assert judge.passes == passes[1:]
    judge.passes = []
    assert labels(pairs, judge, order) == {} and judge.passes == []


def test_labels_come_as_soon_as_their_batch_is_known():
    judge = ScriptedJudge(longer, batch_tokens=200)
    stream = DistilledLabeler().label(make_pairs(), judge)
    assert judge.passes == []
    next(stream)
    assert len(judge.passes) == 1


def test_a_pair_that_is_too_long_in_either_order_is_skipped_with_a_reason():
    class Uneven(ScriptedJudge):
        def encode(self, prompt, response_1, response_2):
            extra = [120] * 60 if response_1 == "short" else []  # this order alone is too long
            return super().encode(prompt, response_1, response_2) + extra

    judge = Uneven(longer, limit=60)
    pairs = [*make_pairs(3), Pair("long", "x", "y" * 99, "z"), Pair("uneven", "x", "y", "short")]
    found = labels(pairs, judge)
    assert set(found) == {"p0", "p1", "p2", "long", "uneven"}
    reason = "longer than the judge's context"
    assert found["long"] == Label("long", judge="scripted", skipped=reason)
    assert found["uneven"] == Label("uneven", judge="scripted", skipped=reason)
    assert all(found[id].p is not None and found[id].skipped is None for id in ("p0", "p1", "p2"))
    assert sum(judge.passes) == 6
    assert set(labels(pairs, judge, ["long", "p1"])) == {"p0", "p2", "uneven"}


def test_no_pairs_no_labels():
    assert labels([], ScriptedJudge(longer)) == {}


# ---- Options --------------------------------------------------------------------------------------------


def test_it_is_registered_under_its_name():
    found = installed_plugins().registry.find("labeler", "distilled")
    assert found.component is DistilledLabeler and found.distribution == "trl-rlaif"
    assert installed_plugins().registry.create("labeler", "distilled").options.debias == "mean_logit"


@pytest.mark.parametrize("options", [{"debais": "mean_prob"}, {"debias": "median"}])
def test_a_wrong_option_is_a_user_error(options):
    with pytest.raises(UserError) as caught:
        installed_plugins().registry.create("labeler", "distilled", options)
    assert caught.value.exit_code == 2
    for part in ("trl-rlaif", "labeler 'distilled'", f"'{next(iter(options))}'"):
        assert part in str(caught.value)


def test_an_answer_that_is_no_number_is_a_skipped_pair():
    class Broken(ScriptedJudge):
        def logprobs(self, questions):
            return torch.full((len(questions), 2), math.nan)

    [label] = labels([Pair("x", "p", "a", "b")], Broken(longer)).values()
    assert label.p is None and label.skipped
