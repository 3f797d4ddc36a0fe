"""The labeler `distilled` with a scripted judge."""

from __future__ import annotations

import math
from statistics import fmean

import pytest
from helpers.judges import ScriptedJudge, make_prompt, shown
from trl_rlaif_distilled import DistilledLabeler

from trl_rlaif import Answer, Judge, JudgePrompt, Label, Pair, Thinking, UserError
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import prompt_folder


def plain_sigmoid(x):
    return 1 / (1 + math.exp(-x))


def draw(one, two):
    """Log-probabilities of both candidates."""
    return tuple(math.log(p) if p else -math.inf for p in (one, two))


# ---- Rules and pairs ------------------------------------------------------------------------------------


def longer(context, response_1, response_2):
    return 0.3 * (len(response_1) - len(response_2))


def always_first(context, response_1, response_2):
    return 3.0


def biased(context, response_1, response_2):
    return longer(context, response_1, response_2) + 0.8


def make_pairs(count=12):
    return [Pair(f"p{i}", f"prompt {i}", "a" * (i + 1), "b" * (7 + 3 * (i % 5))) for i in range(count)]


def labels(pairs, judge, done=(), **options):
    found = list(DistilledLabeler(**options).label(pairs, judge, done))
    assert len({label.id for label in found}) == len(found)
    return {label.id: label for label in found}


class FixedJudge(Judge):
    """Gives the same answers to every pair."""

    def __init__(self, *answers):
        super().__init__(make_prompt(), "fixed")
        self.answers = list(answers)

    def ask(self, groups, candidates, *, thinking=None, done=()):
        for index in range(len(groups)):
            yield index, self.answers


def label_of(*answers, **options):
    [label] = labels([Pair("x", "p", "a", "b")], FixedJudge(*answers), **options).values()
    return label


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
        assert label.judge == "scripted" and label.skipped is label.rationale_12 is label.score_1 is None


@pytest.mark.parametrize("debias", ["mean_prob", "mean_logit"])
def test_a_judge_that_always_says_1_prefers_neither(debias):
    [label] = labels([Pair("x", "p", "a", "bb")], ScriptedJudge(always_first), debias=debias).values()
    assert label.p == pytest.approx(0.5, abs=1e-12)
    assert label.p_12 == pytest.approx(plain_sigmoid(3.0)) and label.p_21 == pytest.approx(plain_sigmoid(-3.0))


def test_mean_logit_is_the_default_and_undoes_a_bias():
    pair = Pair("x", "p", "a" * 9, "b" * 4)
    judge = ScriptedJudge(lambda **texts: longer(**texts) + 3.0)
    assert labels([pair], judge)["x"].p == pytest.approx(plain_sigmoid(1.5))
    paper = labels([pair], judge, debias="mean_prob")["x"]
    assert paper.p == pytest.approx((plain_sigmoid(4.5) + plain_sigmoid(-1.5)) / 2)
    assert paper.p == pytest.approx((paper.p_12 + paper.p_21) / 2)


@pytest.mark.parametrize("debias", ["mean_prob", "mean_logit"])
def test_one_order_alone(debias):
    pairs = make_pairs()
    both = labels(pairs, ScriptedJudge(biased), debias=debias)
    for order, other in (("12", "21"), ("21", "12")):
        judge = ScriptedJudge(biased)
        for id, label in labels(pairs, judge, orders=order, debias=debias).items():
            assert label.p == getattr(label, f"p_{order}") == getattr(both[id], f"p_{order}")
            assert getattr(label, f"mass_{order}") == pytest.approx(0.9)
            assert getattr(label, f"p_{other}") is getattr(label, f"mass_{other}") is None
        assert all(len(group) == 1 for group in judge.asked[0]["groups"])


def test_each_order_has_its_own_mass():
    label = label_of(Answer((draw(0.6, 0.3),)), Answer((draw(0.1, 0.1),)))
    assert (label.mass_12, label.mass_21) == pytest.approx((0.9, 0.2))
    assert (label.p_12, label.p_21) == pytest.approx((2 / 3, 0.5))


@pytest.mark.parametrize("debias", ["mean_prob", "mean_logit"])
def test_swapping_the_responses_mirrors_the_label(debias):
    pairs = make_pairs()
    swapped = [Pair(pair.id, pair.prompt, pair.response_2, pair.response_1) for pair in pairs]
    one, other = (labels(found, ScriptedJudge(biased), debias=debias) for found in (pairs, swapped))
    for id in one:
        assert one[id].p == pytest.approx(1 - other[id].p, abs=1e-12)
        assert one[id].p_12 == pytest.approx(1 - other[id].p_21, abs=1e-12)


def test_a_conversation_is_judged_with_its_speakers():
    messages = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a fox"}]
    judge = ScriptedJudge(lambda context, **_: 2.0 if context == "User: what?\n\nAssistant: a fox" else "wrong")
    assert labels([Pair("x", messages, "a", "b")], judge)["x"].skipped is None


# ---- Questions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["general", "summarization"])
def test_a_group_is_a_pair_in_both_orders(task):
    judge = ScriptedJudge(longer, prompt=JudgePrompt.load(prompt_folder(task)))
    pairs = make_pairs(3)
    labels(pairs, judge)
    [asked] = judge.asked
    assert asked["candidates"] == ("1", "2") and asked["thinking"] is None and not asked["done"]
    for pair, group in zip(pairs, asked["groups"], strict=True):
        texts = [shown(judge.prompt, question) for question in group]
        assert [(t["context"], t["response_1"], t["response_2"]) for t in texts] == [
            (pair.prompt, pair.response_1, pair.response_2),
            (pair.prompt, pair.response_2, pair.response_1),
        ]
        assert all(q.thinking == "" and q.ending == judge.prompt.parts["ending.txt"] for q in group)


def test_options_reach_the_question():
    judge = ScriptedJudge(longer)
    labels(make_pairs(1), judge, preamble="detailed", shots=3, thinking=True)
    [[question, _]] = judge.asked[0]["groups"]
    assert question == judge.prompt.compare("prompt 0", "a", "b" * 7, preamble="detailed", shots=3, think=True)
    assert len(question.messages) == 7 and question.thinking


def test_what_is_done_is_told_by_its_place():
    pairs = make_pairs(5)
    judge = ScriptedJudge(longer)
    undisturbed = labels(pairs, judge)
    rest = labels(pairs, judge, ["p3", "p0", "unknown"])
    assert rest == {id: undisturbed[id] for id in ("p1", "p2", "p4")}
    assert judge.asked[1]["done"] == {0, 3} and len(judge.asked[1]["groups"]) == 5
    assert labels(pairs, judge, [pair.id for pair in pairs]) == {}


def test_labels_come_as_soon_as_the_judge_knows():
    judge = ScriptedJudge(longer)
    stream = DistilledLabeler().label(make_pairs(), judge)
    assert judge.asked == []
    assert next(stream).id == "p11"  # the scripted judge starts with the last


def test_no_pairs_no_labels():
    assert labels([], ScriptedJudge(longer)) == {}


# ---- Rationales -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"rationales": 5}, None),
        ({"thinking": True}, Thinking(1, 128, 0.0, 0)),
        ({"thinking": True, "rationales": 4}, Thinking(4, 128, 0.7, 0)),
        ({"thinking": True, "rationale_temperature": 0.3, "seed": 8}, Thinking(1, 128, 0.3, 8)),
        ({"thinking": True, "rationales": 2, "rationale_temperature": 0, "rationale_tokens": 9}, Thinking(2, 9, 0, 0)),
    ],
)
def test_how_the_judge_thinks(options, expected):
    judge = ScriptedJudge(longer)
    labels(make_pairs(1), judge, **options)
    assert judge.asked[0]["thinking"] == expected
    assert bool(judge.asked[0]["groups"][0][0].thinking) == (expected is not None)


def test_one_rationale_is_a_text_and_several_are_a_list():
    judge = ScriptedJudge(longer, rationale=lambda texts, i: f"{texts['response_1']} {i}")
    pairs = [Pair("x", "p", "a", "b")]
    one, several = labels(pairs, judge, thinking=True)["x"], labels(pairs, judge, thinking=True, rationales=2)["x"]
    assert (one.rationale_12, one.rationale_21) == ("a 0", "b 0")
    assert (several.rationale_12, several.rationale_21) == (["a 0", "a 1"], ["b 0", "b 1"])
    alone = labels(pairs, judge, thinking=True, orders="21")["x"]
    assert (alone.rationale_12, alone.rationale_21) == (None, "b 0")


@pytest.mark.parametrize("debias", ["mean_prob", "mean_logit"])
def test_rationales_are_averaged_as_distributions(debias):
    first, second = [(0.6, 0.2), (0.1, 0.4), (0.3, 0.3)], [(0.5, 0.25), (0.2, 0.6), (0.1, 0.1)]
    answers = [Answer(tuple(draw(*pair) for pair in draws), ("x", "y", "z")) for draws in (first, second)]
    label = label_of(*answers, debias=debias)
    p_12 = fmean(one / (one + two) for one, two in first)
    p_21 = fmean(two / (one + two) for one, two in second)
    assert (label.p_12, label.p_21) == pytest.approx((p_12, p_21), rel=1e-12)
    masses = [fmean(map(sum, draws)) for draws in (first, second)]
    assert (label.mass_12, label.mass_21) == pytest.approx(masses, rel=1e-12)
    odds = [math.log(p / (1 - p)) for p in (p_12, p_21)]
    expected = (p_12 + p_21) / 2 if debias == "mean_prob" else plain_sigmoid(sum(odds) / 2)
    assert label.p == pytest.approx(expected, rel=1e-12)


# ---- Missing labels, and votes --------------------------------------------------------------------------


def test_a_failed_answer_is_a_skipped_pair():
    def rule(context, response_1, response_2):
        return "too long" if context == "prompt 1" and response_1.startswith("b") else 1.0

    found = labels(make_pairs(3), ScriptedJudge(rule))
    assert found["p1"] == Label("p1", judge="scripted", skipped="too long")
    assert all(found[id].p is not None and found[id].skipped is None for id in ("p0", "p2"))


def test_a_skipped_pair_keeps_its_rationales():
    written = Answer((draw(0.5, 0.4),), ("because",))
    failed = Answer(rationales=("so", "thus"), failed="no answer")
    expected = {"judge": "fixed", "skipped": "no answer"}
    assert label_of(written, failed) == Label("x", rationale_12="because", rationale_21=["so", "thus"], **expected)
    assert label_of(failed, Answer(failed="other")) == Label("x", rationale_12=["so", "thus"], **expected)


@pytest.mark.parametrize("debias", ["mean_prob", "mean_logit"])
def test_votes_that_all_fell_on_one_candidate(debias):
    sure, other, half = Answer((draw(0.8, 0),)), Answer((draw(0, 0.6),)), Answer((draw(0.3, 0.3),))
    agreed = label_of(sure, other, debias=debias)
    assert (agreed.p, agreed.p_12, agreed.p_21, agreed.mass_12, agreed.mass_21) == pytest.approx((1, 1, 1, 0.8, 0.6))
    assert label_of(other, sure, debias=debias).p == 0.0
    assert label_of(sure, sure, debias=debias).p == 0.5  # the first position both times
    assert label_of(half, sure, debias=debias).p == (0.25 if debias == "mean_prob" else 0.0)
    several = label_of(Answer((draw(1, 0), draw(0, 1)), ("x", "y")), half, debias=debias)
    assert several.p == several.p_12 == 0.5


def test_a_judge_that_gives_neither_candidate_is_skipped():
    nothing, half = (-math.inf, -math.inf), draw(0.3, 0.3)
    for answers in ([Answer((half,)), Answer((nothing,))], [Answer((half, nothing), ("x", "y")), Answer((half,))]):
        label = label_of(*answers)
        assert label.p is None and label.skipped == "the judge gives neither candidate any probability"


# ---- Options --------------------------------------------------------------------------------------------


def test_it_is_registered_under_its_name():
    found = installed_plugins().registry.find("labeler", "distilled")
    assert found.component is DistilledLabeler and found.distribution == "trl-rlaif"
    assert installed_plugins().registry.create("labeler", "distilled").options.debias == "mean_logit"


@pytest.mark.parametrize(
    "options",
    [
        {"debais": "mean_prob"},
        {"debias": "median"},
        {"preamble": "long"},
        {"shots": -1},
        {"shots": 9},
        {"rationales": 0},
        {"rationale_tokens": 0},
        {"rationale_temperature": -0.1},
        {"orders": "1"},
        {"seed": -1},
    ],
    ids=str,
)
def test_a_wrong_option_is_a_user_error(options):
    with pytest.raises(UserError) as caught:
        installed_plugins().registry.create("labeler", "distilled", options)
    assert caught.value.exit_code == 2
    for part in ("trl-rlaif", "labeler 'distilled'", f"'{next(iter(options))}'"):
        assert part in str(caught.value)


def test_a_prompt_that_lacks_what_an_option_needs_is_a_user_error():
    judge = ScriptedJudge(longer, prompt=make_prompt(thinking=None))
    with pytest.raises(UserError, match="thinking.txt"):
        labels(make_pairs(1), judge, thinking=True)
    with pytest.raises(UserError, match="0 exemplars"):
        labels(make_pairs(1), judge, shots=1)
