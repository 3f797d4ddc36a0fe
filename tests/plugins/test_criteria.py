"""Labels from several criteria: each asked separately, weighted log-odds or ratings, and vetoes."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil

import numpy as np
import pytest
from helpers.judges import ScriptedJudge, in_double, make_prompt, plain_answer
from helpers.recipes import run_cli, tiny_recipe, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_rlaif_direct import DirectLabeler
from trl_rlaif_direct.rating import RATINGS
from trl_rlaif_distilled import DistilledLabeler

from trl_rlaif import Judge, JudgePrompt, LocalJudge, Pair, UserError, ask_together, weighted_logit, with_veto
from trl_rlaif.files import read_lines
from trl_rlaif.labels import LabelKey
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import prompt_folder
from trl_rlaif.testing import check_labeler

PAIRS = [Pair(f"p{i}", f"what? {i}", "a fox", "the lazy dog") for i in range(3)]
CRITERIA = {"helpful": {"weight": 2, "description": "does what was asked"}, "brief": 0.5}
VETO = {"harmless": {"veto": True, "description": "harms nobody"}}
# Log-odds that the response shown first is better, by criterion and by this response.
SAID = {("does what was asked", "a fox"): 1.5, ("does what was asked", "the lazy dog"): 0.4,
        ("brief", "a fox"): -0.3, ("brief", "the lazy dog"): 2.0}  # fmt: skip
HOLDS = {"a fox": 0.9, "the lazy dog": 0.3}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def logit(p):
    return math.log(p) - math.log1p(-p)


def compare(context, criterion, response=None, response_1=None, response_2=None):
    return logit(HOLDS[response]) if response else SAID[criterion, response_1]


def labeled(labeler, judge, done=()):
    return {label.id: label for label in labeler.label(PAIRS, judge, done)}


# ---- Combining criteria ---------------------------------------------------------------------------------


def test_log_odds_are_averaged_by_weight():
    assert weighted_logit([1.5, -0.3], [2, 0.5]) == pytest.approx((3.0 - 0.15) / 2.5)
    assert weighted_logit([7.0], [0.01]) == pytest.approx(7.0)
    assert weighted_logit([math.inf, 1.0], [1, 1]) == math.inf
    assert weighted_logit([math.inf, -math.inf], [1, 9]) == 0.0


@pytest.mark.parametrize("p", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(("first", "second"), [*itertools.product([0.0, 0.3, 1.0], repeat=2)])
def test_what_must_hold_decides_where_it_tells_the_responses_apart(p, first, second):
    wanted = 0.0
    for holds in itertools.product([True, False], repeat=2):
        chance = (first if holds[0] else 1 - first) * (second if holds[1] else 1 - second)
        wanted += chance * (p if holds[0] == holds[1] else float(holds[0]))
    assert with_veto(p, first, second) == pytest.approx(wanted, abs=1e-15)
    assert with_veto(1 - p, second, first) == pytest.approx(1 - wanted, abs=1e-15)


class Slow(Judge):
    """Answers one group at a time, and records which ones it has answered."""

    def __init__(self):
        super().__init__(make_prompt(), "slow")
        self.answered = []

    def ask(self, groups, candidates, *, thinking=None, done=()):
        for i, group in enumerate(groups):
            if i not in done:
                self.answered.append((candidates, i))
                yield i, [(candidates, question) for question in group]


def test_items_are_answered_as_soon_as_they_can_be():
    items = [{("1", "2"): [[f"{i}a", f"{i}b"], [f"{i}c"]], ("Yes", "No"): [[f"{i}d"]]} for i in range(4)]
    judge = Slow()
    asked = ask_together(judge, items, done={1})
    index, found = next(asked)
    one, two = ("1", "2"), ("Yes", "No")
    assert (index, found) == (0, {one: [[(one, "0a"), (one, "0b")], [(one, "0c")]], two: [[(two, "0d")]]})
    assert len(judge.answered) <= 4  # the others wait
    assert [index for index, _ in asked] == [2, 3]
    assert {i for kind, i in judge.answered if kind == one} == {0, 1, 4, 5, 6, 7}
    assert [*ask_together(judge, [])] == []


# ---- Comparisons ----------------------------------------------------------------------------------------


def test_comparisons_by_plain_arithmetic():
    labels = labeled(DistilledLabeler(criteria=CRITERIA), ScriptedJudge(compare, mass=0.8))
    logits = {
        "12": (2 * 1.5 + 0.5 * -0.3) / 2.5,
        "21": -(2 * 0.4 + 0.5 * 2.0) / 2.5,
    }
    for label in labels.values():
        assert label.p == pytest.approx(sigmoid(sum(logits.values()) / 2), abs=1e-12)
        assert (label.p_12, label.p_21) == pytest.approx([sigmoid(x) for x in logits.values()], abs=1e-12)
        assert (label.mass_12, label.mass_21) == pytest.approx((0.8, 0.8))
        helpful, brief = label.criteria
        assert (helpful.criterion, helpful.weight, brief.criterion, brief.weight) == ("helpful", 2, "brief", 0.5)
        assert helpful.p == pytest.approx(sigmoid((1.5 - 0.4) / 2), abs=1e-12)
        assert (helpful.p_12, helpful.p_21) == pytest.approx((sigmoid(1.5), sigmoid(-0.4)), abs=1e-12)
        assert brief.p == pytest.approx(sigmoid((-0.3 - 2.0) / 2), abs=1e-12) and brief.score_1 is None


def test_a_veto_on_comparisons():
    without = labeled(DistilledLabeler(criteria=CRITERIA), ScriptedJudge(compare))["p0"]
    label = labeled(DistilledLabeler(criteria=CRITERIA | VETO), ScriptedJudge(compare))["p0"]
    assert label.p == pytest.approx(with_veto(without.p, 0.9, 0.3), abs=1e-12)
    assert label.p_21 == pytest.approx(with_veto(without.p_21, 0.9, 0.3), abs=1e-12)
    last = label.criteria[-1]
    assert (last.criterion, last.weight, last.veto, last.p) == ("harmless", 0.0, True, None)
    assert (last.score_1, last.score_2) == pytest.approx((0.9, 0.3), abs=1e-12)


def test_a_single_criterion_is_a_plain_comparison():
    rule = lambda context, response_1, response_2, criterion=None: SAID["brief", response_1]  # noqa: E731
    for options in ({}, {"debias": "mean_prob"}, {"orders": "21"}):
        plain = labeled(DistilledLabeler(**options), ScriptedJudge(rule))["p0"]
        label = labeled(DistilledLabeler(criteria={"brief": 3}, **options), ScriptedJudge(rule))["p0"]
        for name in ("p", "p_12", "p_21"):
            assert getattr(label, name) == pytest.approx(getattr(plain, name), abs=1e-12)


def test_criteria_of_an_order_are_one_group_that_differs_at_its_end():
    judge = ScriptedJudge()
    labeled(DistilledLabeler(criteria=CRITERIA | VETO), judge, done=["p1"])
    compared, checked = judge.asked
    assert (compared["candidates"], checked["candidates"]) == (("1", "2"), ("Yes", "No"))
    assert [len(group) for group in compared["groups"]] == [2] * 6
    assert [len(group) for group in checked["groups"]] == [1] * 6
    assert set(compared["done"]) == set(checked["done"]) == {2, 3}
    for group in compared["groups"]:
        texts = [question.messages[-1]["content"] for question in group]
        shared = texts[0][: len(os.path.commonprefix(texts))]
        assert "Response 1:\n" in shared and "Response 2:\n" in shared
        assert "does what was asked" in texts[0] and "brief" in texts[1]


@pytest.mark.parametrize("kind", [DistilledLabeler, DirectLabeler])
@pytest.mark.parametrize("fails", ["brief", "harms nobody"])
def test_what_cannot_be_judged(kind, fails):
    def rule(context, criterion, response=None, response_1=None, response_2=None):
        if context == "what? 1" and criterion == fails:
            return "the server is down"
        return 0.5 if response_1 or criterion == "harms nobody" else [0.0] * 10

    labels = labeled(kind(criteria=CRITERIA | VETO), ScriptedJudge(rule))
    assert labels["p1"].skipped == "the server is down" and labels["p1"].p is labels["p1"].criteria is None
    assert labels["p0"].skipped is labels["p2"].skipped is None


# ---- Ratings --------------------------------------------------------------------------------------------


def distributions(seed):
    return np.random.default_rng(seed).dirichlet([0.7] * 10, 4)


def test_ratings_by_listing_everything():
    said = dict(
        zip(
            itertools.product(["does what was asked", "brief"], ["a fox", "the lazy dog"]),
            distributions(0),
            strict=True,
        )
    )

    def rule(context, response, criterion):
        return logit(HOLDS[response]) if criterion == "harms nobody" else np.log(said[criterion, response]).tolist()

    def outcomes(response, veto):
        for (i, p), (j, q) in itertools.product(
            *(enumerate(said[c, response], 1) for c in ("does what was asked", "brief"))
        ):
            mean = (2 * (2 * (i - 1) / 9 - 1) + 0.5 * (2 * (j - 1) / 9 - 1)) / 2.5
            for holds in (True, False) if veto else (True,):
                chance = (HOLDS[response] if holds else 1 - HOLDS[response]) if veto else 1.0
                yield round(mean if holds else -1.0, 12), p * q * chance

    for veto in (False, True):
        label = labeled(DirectLabeler(criteria=CRITERIA | (VETO if veto else {})), ScriptedJudge(rule, mass=0.6))["p0"]
        first, second = ([*outcomes(response, veto)] for response in PAIRS[0].responses)
        for found, spread, listed in ((label.score_1, label.spread_1, first), (label.score_2, label.spread_2, second)):
            mean = math.fsum(score * p for score, p in listed)
            assert found == pytest.approx(mean, abs=1e-12)
            variance = math.fsum((score - mean) ** 2 * p for score, p in listed)
            assert spread == pytest.approx(math.sqrt(variance), abs=1e-9)
        wanted = math.fsum(
            p * q * (1.0 if a > b else 0.5 if a == b else 0.0) for (a, p), (b, q) in itertools.product(first, second)
        )
        assert label.p == pytest.approx(wanted, abs=1e-12)
        assert (label.mass_12, label.mass_21) == pytest.approx((0.6, 0.6))
        rating = math.fsum((2 * i / 9 - 1) * p for i, p in enumerate(said["brief", "the lazy dog"]))
        assert label.criteria[1].score_2 == pytest.approx(rating, abs=1e-12)
        assert [one.veto for one in label.criteria] == [None, None, True][: 2 + veto]


def test_ratings_are_rewards():
    def rule(context, response, criterion):
        if criterion == "harms nobody":
            return logit(HOLDS[response])
        return [0.0 if i == {"does what was asked": 9, "brief": 0}[criterion] else -700.0 for i in range(10)]

    labeler = DirectLabeler(ScriptedJudge(rule), criteria=CRITERIA | VETO)
    wanted = [h * (2 - 0.5) / 2.5 - (1 - h) for h in (0.9, 0.3)]
    assert labeler(["x"] * 2, ["a fox", "the lazy dog"], category=["a", "b"]) == pytest.approx(wanted, abs=1e-12)
    best = DirectLabeler(
        ScriptedJudge(lambda context, response, criterion: [-700.0] * 9 + [0.0]), criteria={"a": 0.1, "b": 0.2}
    )
    assert best(["x"], ["a fox"]) == [1.0]
    assert len(labeler.judge.asked[0]["groups"][0]) == 2 and labeler.judge.asked[0]["candidates"] == RATINGS


@pytest.mark.parametrize("kind", [DistilledLabeler, DirectLabeler])
def test_the_contract(kind):
    check_labeler(kind(criteria=CRITERIA | VETO))
    check_labeler(kind(criteria=CRITERIA, thinking=True, rationales=2))


# ---- A real judge ---------------------------------------------------------------------------------------


def test_probabilities_are_those_of_plain_forward_passes_in_float64(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "roomy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    judge = LocalJudge(model, AutoTokenizer.from_pretrained(folder), JudgePrompt.load(prompt_folder("general")), "tiny")
    label = labeled(DistilledLabeler(criteria=CRITERIA | VETO), judge, done=["p1", "p2"])["p0"]
    for found, description in zip(label.criteria, ["does what was asked", "brief"], strict=False):
        question = judge.prompt.compare(PAIRS[0].prompt, *PAIRS[0].responses, criterion=description)
        one, two = plain_answer(in_double(judge), question, ("1", "2"))
        assert found.p_12 == pytest.approx(sigmoid(one - two), abs=1e-5)
    question = judge.prompt.check(PAIRS[0].prompt, "a fox", "harms nobody")
    yes, no = plain_answer(in_double(judge), question, ("Yes", "No"))
    assert label.criteria[2].score_1 == pytest.approx(sigmoid(yes - no), abs=1e-5)


# ---- A recipe -------------------------------------------------------------------------------------------


def test_labels_without_criteria_keep_their_key():
    options = {"debias": "mean_logit", "shots": 0}
    keys = [
        LabelKey("distilled", options | more, "judge", "r", "f").key
        for more in ({}, {"criteria": {}}, {"criteria": {"a": 1}})
    ]
    assert keys[0] == keys[1] != keys[2]


@pytest.fixture
def check(tiny_model, tmp_path, monkeypatch, capsys):
    def check(**label):
        return run_cli(monkeypatch, capsys, "check", write_recipe(tmp_path, tiny_model, label=label))

    return check


@pytest.mark.parametrize(
    ("label", "what"),
    [
        ({"criteria": {"a": 0}}, "'criteria.a' in section 'label' is 0."),
        ({"criteria": {"a": 0.001}}, "'criteria.a' in section 'label' is 0.001. The weight of a criterion is 0.001."),
        ({"criteria": {"a": {"wait": 1}}}, "unknown key 'criteria.a.wait' in section 'label'."),
        ({"criteria": {"a": {"veto": True}}}, "Every one of the criteria is a veto."),
        ({"criteria": {"a": 1}, "labeler": {"rubric": {"column": None, "shared": ["x"]}}},
         "the labeler 'rubric' asks by no criteria. Use one of direct, distilled, "),
    ],
)  # fmt: skip
def test_criteria_that_make_no_sense(check, label, what):
    code, message = check(**label)
    assert code == 2 and what in message and "recipe.yaml:" in message, message


def test_a_prompt_must_show_the_criterion(check, tmp_path):
    folder = shutil.copytree(prompt_folder("general"), tmp_path / "mine")
    assert check(prompt="mine", criteria={"brief": 1, "safe": {"veto": True}})[0] == 0
    (folder / "check.jinja").unlink()
    code, message = check(prompt="mine", criteria={"brief": 1, "safe": {"veto": True}})
    assert code == 2 and "has no file check.jinja" in message
    (folder / "sample.jinja").write_text("{{ context }} {{ response_1 }} {{ response_2 }}")
    code, message = check(prompt="mine", criteria={"brief": 1})
    assert code == 2 and "The template sample.jinja of the prompt 'mine' names no criterion" in message
    with pytest.raises(UserError, match="names no criterion"):
        JudgePrompt.load(folder).compare("x", "a", "b", criterion="brief")


def test_a_run_keeps_and_shows_every_criterion(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "roomy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    label = {"criteria": {"helpful": 2, "brief": {"weight": 0.5, "description": "says it in few words"},
                          "harmless": {"veto": True}}}  # fmt: skip
    recipe = tiny_recipe(tmp_path, str(folder), label=label, evaluate=None, rl=None)
    out = run_recipe(recipe, installed_plugins(), tmp_path / "out")
    rows = read_lines(out / "labels.jsonl")
    assert len(rows) == len(read_lines(out / "pairs.jsonl"))
    for row in rows:
        helpful, brief, harmless = row["criteria"]
        assert set(helpful) == set(brief) == {"criterion", "weight", "p", "p_12", "p_21"}
        assert harmless.keys() == {"criterion", "weight", "score_1", "score_2", "veto"}
    page = (out / "report.html").read_text()
    assert f'<tr><th scope="row">harmless</th><td class="n">veto</td><td class="n">{len(rows)}</td>' in page
    # The same criteria ask nothing; another weight asks everything again.
    for more, lines in (({}, len(rows)), ({"helpful": 3}, 2 * len(rows))):
        sections = {"label": {"criteria": label["criteria"] | more}, "evaluate": None, "rl": None}
        recipe = tiny_recipe(tmp_path, str(folder), **sections)
        run_recipe(recipe, installed_plugins(), tmp_path / "out", resume=True, confirm=lambda _: True)
        assert len(read_lines(out / "labels.jsonl")) == lines
