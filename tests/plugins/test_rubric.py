"""The labeler `rubric`: scores from probabilities, its questions, and its rewards in every trainer."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from typing import ClassVar

import numpy as np
import pytest
from datasets import Dataset
from helpers.judges import ScriptedJudge, in_double, make_prompt, plain_answer
from helpers.recipes import run_cli, tiny_recipe, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_rlaif_rubric import Criterion, RubricLabeler, grade, read_rubric

from trl_rlaif import JudgePrompt, LocalJudge, Pair, Thinking, UserError
from trl_rlaif.files import read_lines
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import prompt_folder
from trl_rlaif.testing import check_labeler, make_pairs

WEIGHTS = [(1.0,), (2.0, 1.0), (5, -3, 1), (0.25, -0.5, 1.75, -0.01), (10, -10, -10, 7), (3, 3, -9, 1, 1)]


def criteria(weights):
    return [Criterion(f"criterion {i}", weight) for i, weight in enumerate(weights)]


def probabilities(count, seed=0):
    return np.random.default_rng(seed).uniform(size=count).tolist()


def outcomes(weights, met):
    """Every score with its probability, by enumerating all combinations of met criteria."""
    best = math.fsum(w for w in weights if w > 0)
    for chosen in itertools.product([True, False], repeat=len(weights)):
        p = math.prod(m if yes else 1 - m for yes, m in zip(chosen, met, strict=True))
        total = math.fsum(w for w, yes in zip(weights, chosen, strict=True) if yes)
        yield min(1.0, max(0.0, round(total / best, 12))), p


# ---- From probabilities to a score ----------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS)
def test_mean_and_spread_by_listing_everything(weights):
    for seed in range(5):
        met = probabilities(len(weights), seed)
        found, listed = grade(criteria(weights), met), list(outcomes(weights, met))
        mean = math.fsum(score * p for score, p in listed)
        assert found.mean == pytest.approx(mean, abs=1e-12)
        variance = math.fsum((score - mean) ** 2 * p for score, p in listed)
        assert found.spread == pytest.approx(math.sqrt(variance), abs=1e-9)
        assert found.probabilities.sum() == pytest.approx(1, abs=1e-12) and min(found.probabilities) >= 0


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_preference_by_listing_everything(weights):
    one, two = probabilities(len(weights), 1), probabilities(len(weights), 2)
    wanted = math.fsum(
        p * q * (1.0 if a > b else 0.5 if a == b else 0.0)
        for (a, p), (b, q) in itertools.product(outcomes(weights, one), outcomes(weights, two))
    )
    first, second = grade(criteria(weights), one), grade(criteria(weights), two)
    assert first.above(second) == pytest.approx(wanted, abs=1e-12)
    assert second.above(first) == pytest.approx(1 - wanted, abs=1e-12)


def test_positive_weights_give_the_weighted_share():
    weights, met = [3, 1.5, 0.01, 20], [0.9, 0.2, 1.0, 0.123456789]
    wanted = math.fsum(w * p for w, p in zip(weights, met, strict=True)) / math.fsum(weights)
    assert grade(criteria(weights), met).mean == pytest.approx(wanted, abs=1e-14)


def test_sure_answers_give_healthbenchs_score():
    """As in simple-evals: points earned over points possible, here clipped for each response."""
    rubric = read_rubric([{"criterion": "a", "points": 5, "tags": ["x"]}, {"criterion": "b", "points": -3}, "c"])
    assert [(one.text, one.weight) for one in rubric] == [("a", 5), ("b", -3), ("c", 1)]
    for met, score in (((1, 0, 1), 1.0), ((1, 1, 1), 3 / 6), ((1, 0, 0), 5 / 6), ((0, 1, 1), 0.0), ((0, 0, 0), 0.0)):
        found = grade(rubric, met)
        assert (found.mean, found.spread) == (pytest.approx(score, abs=1e-15), pytest.approx(0, abs=1e-8))


def test_a_response_below_zero_still_gains_by_getting_better():
    """The mean of the clipped score, not the clipped mean, which would be 0 for both."""
    rubric = criteria([1, -4])
    worse, better = grade(rubric, [0.5, 0.9]).mean, grade(rubric, [0.5, 0.8]).mean
    assert 0 < worse < better


def test_many_criteria_with_odd_weights():
    weights = [(-1) ** i * (i + 0.07) for i in range(1, 61)]
    met = probabilities(60, 3)
    found, draws = grade(criteria(weights), met), np.random.default_rng(0)
    drawn = (draws.uniform(size=(200_000, 60)) < met) @ np.array(weights) / sum(w for w in weights if w > 0)
    assert found.mean == pytest.approx(drawn.clip(0, 1).mean(), abs=5 * drawn.std() / math.sqrt(len(drawn)))


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("a text", "A rubric is 'a text'. Write a list"),
        ({"criterion": "a"}, "A rubric is {'criterion': 'a'}"),
        ([{"weight": 1}], "A criterion of a rubric is {'weight': 1}"),
        ([{"criterion": "a", "description": "b"}], "A criterion of a rubric is"),
        ([3], "A criterion of a rubric is 3"),
        ([" "], "A criterion is ' '"),
        ([{"criterion": "a", "weight": 0}], "The weight of the criterion 'a' is 0"),
        ([{"criterion": "a", "weight": 0.005}], "is 0.005. Write a number from -1000 to 1000 with up to two decimals"),
        ([{"criterion": "a", "weight": True}], "is True"),
        ([{"criterion": "a", "weight": "2"}], "is '2'"),
        ([{"criterion": "a", "weight": math.nan}], "is nan"),
    ],
)
def test_what_is_no_rubric(value, what):
    with pytest.raises(UserError) as caught:
        read_rubric(value)
    assert what in str(caught.value)


def test_what_arrow_makes_of_a_rubric_is_read():
    """Rows of a dataset all have the same keys: missing values are None."""
    rubric = [[{"criterion": "a", "weight": 2.5}, {"criterion": "b"}], [{"description": "c", "points": 3}]]
    rows = Dataset.from_list([{"rubric": of} for of in rubric])["rubric"]
    assert [[(one.text, one.weight) for one in read_rubric(row)] for row in rows] == [
        [("a", 2.5), ("b", 1)],
        [("c", 3)],
    ]


def test_a_rubric_with_nothing_to_gain():
    with pytest.raises(UserError, match="no criterion of positive weight"):
        grade(criteria([-1, -2]), [0.5, 0.5])


# ---- Labels of a scripted judge -------------------------------------------------------------------------

RUBRIC = [{"criterion": "names a city", "weight": 2}, "is short", {"criterion": "swears", "weight": -1}]
PAIRS = [Pair(f"p{i}", f"where? {i}", "Oslo", "damn, some large city", extra={"rubric": RUBRIC}) for i in range(3)]
MET = {
    ("Oslo", "names a city"): 0.9, ("Oslo", "is short"): 0.8, ("Oslo", "swears"): 0.1,
    ("damn, some large city", "names a city"): 0.3, ("damn, some large city", "is short"): 0.4,
    ("damn, some large city", "swears"): 0.95,
}  # fmt: skip


def say(context, response, criterion):
    p = MET[response, criterion]
    return math.log(p) - math.log1p(-p)


def labels(judge, done=(), pairs=PAIRS, **options):
    return {label.id: label for label in RubricLabeler(**options).label(pairs, judge, done)}


def test_labels_are_from_both_grades():
    found = labels(ScriptedJudge(say, mass=0.7))
    assert found.keys() == {"p0", "p1", "p2"}
    met = [[MET[response, one] for one in ("names a city", "is short", "swears")] for response in PAIRS[0].responses]
    first, second = (grade(read_rubric(RUBRIC), of) for of in met)
    for label in found.values():
        assert label.p == pytest.approx(first.above(second), abs=1e-12)
        assert (label.score_1, label.score_2) == pytest.approx((first.mean, second.mean), abs=1e-12)
        assert (label.spread_1, label.spread_2) == pytest.approx((first.spread, second.spread), abs=1e-12)
        assert (label.mass_12, label.mass_21) == pytest.approx((0.7, 0.7))
        assert (label.p_12, label.p_21, label.skipped) == (None, None, None)
        kept = [(one.criterion, one.weight, one.score_1, one.score_2) for one in label.criteria]
        rubric = [("names a city", 2), ("is short", 1), ("swears", -1)]
        assert kept == [(*one, pytest.approx(a), pytest.approx(b)) for one, a, b in zip(rubric, *met, strict=True)]


def test_a_responses_criteria_are_one_group_that_differs_at_its_end():
    judge = ScriptedJudge(say, prompt=make_prompt())
    labels(judge)
    [asked] = judge.asked
    assert asked["candidates"] == ("Yes", "No") and [len(group) for group in asked["groups"]] == [3] * 6
    for group in asked["groups"]:
        texts = [question.messages[-1]["content"] for question in group]
        shared = len(os.path.commonprefix(texts))
        assert all("Requirement:\n" in text[:shared] and "Response:\n" in text[:shared] for text in texts)


def test_what_is_done_is_named_to_the_judge_and_not_yielded():
    judge = ScriptedJudge(say)
    assert labels(judge, done=["p1", "of another run"]).keys() == {"p0", "p2"}
    assert set(judge.asked[0]["done"]) == {2, 3} and len(judge.asked[0]["groups"]) == 6


def test_a_criterion_that_cannot_be_judged_skips_its_pair():
    def rule(context, response, criterion):
        return (
            "too long"
            if (context, response) == ("where? 1", "Oslo") and criterion == "swears"
            else say("", response, criterion)
        )

    found = labels(ScriptedJudge(rule))
    assert found["p1"].skipped == "too long" and found["p1"].p is found["p1"].criteria is None
    assert found["p0"].skipped is found["p2"].skipped is None


def test_shared_criteria_come_behind_a_prompts_own():
    judge = ScriptedJudge(prompt=make_prompt())
    shared = ["is polite", {"criterion": "is long", "weight": -0.5}]
    found = labels(judge, shared=shared)
    assert [(one.criterion, one.weight) for one in found["p0"].criteria][3:] == [("is polite", 1), ("is long", -0.5)]
    alone = labels(ScriptedJudge(prompt=make_prompt()), column=None, shared=shared, pairs=make_pairs(4))
    assert {len(label.criteria) for label in alone.values()} == {2}


def test_rationales():
    judge = ScriptedJudge(say, prompt=make_prompt(), rationale=lambda texts, number: f"{texts['criterion']} {number}")
    label = labels(judge, thinking=True, rationales=2)["p0"]
    assert judge.asked[0]["thinking"] == Thinking(2, 128, 0.7, 0)
    assert label.rationale_12 == [f"{one} {i}" for one in ("names a city", "is short", "swears") for i in range(2)]
    assert {q.thinking for group in judge.asked[0]["groups"] for q in group} == {"Let us check it."}


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"column": None}, "Name a column, or give shared criteria"),
        ({"column": None, "shared": [{"criterion": "x", "weight": -1}]}, "Name a column, or give shared criteria"),
        ({"shared": [{"criterion": "x", "weight": 0.001}]}, "up to two decimals"),
        ({"shared": [{"criterion": "x", "wait": 1}]}, "wait"),
    ],
)
def test_options_that_make_no_sense(options, what):
    with pytest.raises(ValueError, match=what):
        RubricLabeler(**options)


def test_the_contract():
    check_labeler(RubricLabeler(column=None, shared=["is short", {"criterion": "swears", "weight": -2}]))
    pairs = [Pair(f"p{i}", "where?", f"a {i}", f"b {i}", extra={"rubric": RUBRIC}) for i in range(4)]
    judge = ScriptedJudge()
    assert len(labels(judge, pairs=pairs)) == 4


# ---- A real judge ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def roomy_model(tiny_model, tmp_path_factory):
    """The tiny model with a context that fits the packaged prompt, which its tokenizer splits into letters."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("roomy") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    return str(folder)


def local_judge(roomy_model):
    prompt = JudgePrompt.load(prompt_folder("general"))
    model = AutoModelForCausalLM.from_pretrained(roomy_model).eval()
    return LocalJudge(model, AutoTokenizer.from_pretrained(roomy_model), prompt, "tiny")


def test_probabilities_are_those_of_plain_forward_passes_in_float64(roomy_model):
    judge = local_judge(roomy_model)
    [label] = labels(judge, pairs=PAIRS[:1]).values()
    for response, side in (("Oslo", "score_1"), ("damn, some large city", "score_2")):
        for one in label.criteria:
            question = judge.prompt.check(PAIRS[0].prompt, response, one.criterion)
            yes, no = plain_answer(in_double(judge), question, ("Yes", "No"))
            assert getattr(one, side) == pytest.approx(1 / (1 + math.exp(no - yes)), abs=1e-5)


# ---- As a reward function -------------------------------------------------------------------------------


def test_rewards_have_trls_signature():
    labeler = RubricLabeler(ScriptedJudge(say))
    texts = [*PAIRS[0].responses]
    rubrics = [RUBRIC, RUBRIC]
    wanted = [
        grade(read_rubric(RUBRIC), [MET[t, c] for c in ("names a city", "is short", "swears")]).mean for t in texts
    ]
    assert labeler(["x"] * 2, texts, rubric=rubrics, completion_ids=[[1]] * 2) == pytest.approx(wanted, abs=1e-12)
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    prompts = [[{"role": "user", "content": "x"}]] * 2
    assert labeler(prompts, messages, rubric=rubrics, trainer_state=None) == pytest.approx(wanted, abs=1e-12)
    with pytest.raises(UserError, match="There is no column 'rubric'"):
        labeler(prompts, messages)
    with pytest.raises(TypeError, match="RubricLabeler\\(judge\\)"):
        RubricLabeler()(prompts, messages, rubric=rubrics)


def test_each_row_has_its_own_rubric_and_a_failure_is_no_zero():
    rule = lambda context, response, criterion: "down" if criterion == "hard" else 0.0  # noqa: E731
    labeler = RubricLabeler(ScriptedJudge(rule))
    assert labeler(["x"] * 3, ["a"] * 3, rubric=[["easy"], ["easy", "hard"], ["easy", "other"]]) == [0.5, None, 0.5]
    assert labeler.failed == ["down"]


class Recording(RubricLabeler):
    """Records its inputs and rewards."""

    calls: ClassVar[list] = []

    def __call__(self, prompts, completions, **columns):
        rewards = super().__call__(prompts, completions, **columns)
        self.calls.append((prompts, completions, columns["rubric"], rewards))
        return rewards


@pytest.fixture
def recording(monkeypatch):
    monkeypatch.setattr(Recording, "calls", [])
    return Recording


def rubrics_of(path, lacking=None):
    """Give every prompt of a file its own criteria, except for one."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i, row in enumerate(rows):
        own = [{"criterion": f"names the {i}", "weight": i + 1}, {"criterion": "is rude", "weight": -0.5}]
        row |= {} if i == lacking else {"rubric": own}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {row["prompt"]: row.get("rubric") for row in rows}


def test_ppo_is_rewarded_by_the_base_without_its_adapter(roomy_model, tmp_path, monkeypatch, recording):
    registered = installed_plugins().registry.find("labeler", "rubric")
    monkeypatch.setitem(vars(registered), "component", recording)
    rest = dict.fromkeys(("sample", "label", "reward", "evaluate", "report"))
    rl = {"rewards": ["rubric"], "labelers": [{"rubric": {"shared": ["is short"]}}], "total_episodes": 8}
    recipe = tiny_recipe(tmp_path, roomy_model, **rest, rl={**rl, "learning_rate": 0.1})
    known = rubrics_of(tmp_path / "train.jsonl", lacking=3)
    folder = run_recipe(recipe, installed_plugins(), tmp_path / "out")
    steps = [row for row in read_lines(folder / "metrics.jsonl") if row["stage"] == "rl"]
    assert len(steps) == len(recording.calls) == 2
    assert abs(steps[1]["objective/kl"]) > 1e-3  # the policy has changed
    own, judge = RubricLabeler(shared=["is short"]), local_judge(roomy_model)
    for step, (prompts, completions, rubrics, rewards) in zip(steps, recording.calls, strict=True):
        assert step["score/rubric"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-6)
        texts = [completion[0]["content"] for completion in completions]
        for prompt, rubric in zip(prompts, rubrics, strict=True):
            wanted = known[prompt[-1]["content"]]  # one prompt has none of its own
            assert (rubric and [one["criterion"] for one in rubric]) == (
                wanted and [one["criterion"] for one in wanted]
            )
        found = own.grade(prompts, texts, judge, rubric=rubrics)
        assert rewards == pytest.approx([one.mean for one in found], abs=1e-4)


def test_held_out_prompts_say_how_the_share_of_checks_met_changed(roomy_model, tmp_path):
    rest = dict.fromkeys(("sample", "label", "reward", "report"))
    rl = {"rewards": ["rubric"], "labelers": [{"rubric": {"column": "rubric"}}], "total_episodes": 8}
    recipe = tiny_recipe(tmp_path, roomy_model, **rest, rl={**rl, "learning_rate": 0.1})
    rubrics_of(tmp_path / "train.jsonl")
    known = rubrics_of(tmp_path / "test.jsonl", lacking=2)
    folder = run_recipe(recipe, installed_plugins(), tmp_path / "out")
    samples, sides = read_lines(folder / "samples.jsonl"), ("start", "trained")
    assert [row["rewards_start"]["rubric"] is None for row in samples] == [False, False, True, False]
    graded = [row for row in samples if known[row["prompt"]]]
    found = {}
    for side in sides:
        columns = {"rubric": [known[row["prompt"]] for row in graded]}
        texts = ([row[key] for row in graded] for key in ("prompt", side))
        wanted = [one.mean for one in RubricLabeler().grade(*texts, local_judge(roomy_model), **columns)]
        found[side] = [row[f"rewards_{side}"]["rubric"] for row in graded]
        assert found[side] == pytest.approx(wanted, abs=1e-4)
    assert found["start"] != found["trained"]
    numbers = folder.results()["evaluate"]["sets"]["test"]["labeler_rewards"]["rubric"]
    assert (numbers["prompts"], numbers["unscored"]) == (3, 1)
    for side in sides:
        assert numbers[side]["mean"] == pytest.approx(np.mean(found[side]), abs=1e-12)
    gains = np.subtract(found["trained"], found["start"])
    low, high = numbers["gain"]["interval"]
    assert numbers["gain"]["mean"] == pytest.approx(gains.mean(), abs=1e-12) and low <= gains.mean() <= high


@pytest.mark.parametrize("conversational", [True, False], ids=["conversations", "texts"])
@pytest.mark.parametrize("algorithm", ["GRPO", "RLOO"])
def test_trls_own_trainers_are_rewarded(roomy_model, tmp_path, recording, algorithm, conversational):
    import trl

    prompts = [f"what is {i}?" for i in range(4)]
    rows = [
        {"prompt": [{"role": "user", "content": p}] if conversational else p, "rubric": [{"criterion": f"names {i}"}]}
        for i, p in enumerate(prompts)
    ]
    config = getattr(trl, f"{algorithm}Config")(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_generations=2, max_completion_length=6,
        learning_rate=1e-2, bf16=False, use_cpu=True, report_to="none", logging_steps=1, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    trainer = getattr(trl, f"{algorithm}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(roomy_model),
        reward_funcs=[recording(local_judge(roomy_model))],
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(roomy_model),
    )
    trainer.train()
    logged = [row["rewards/rubric/mean"] for row in trainer.state.log_history if "rewards/rubric/mean" in row]
    assert len(logged) == len(recording.calls) == 2
    for mean, (asked, _, rubrics, rewards) in zip(logged, recording.calls, strict=True):
        assert mean == pytest.approx(sum(rewards) / len(rewards), abs=1e-6)
        names = [(one if isinstance(one, str) else one[-1]["content"]).split()[-1][:-1] for one in asked]
        assert [of[0]["criterion"] for of in rubrics] == [f"names {name}" for name in names]
        assert all(0 <= reward <= 1 for reward in rewards)


# ---- A recipe -------------------------------------------------------------------------------------------


def test_check_finds_what_is_wrong_with_a_rubric_and_its_line(tiny_model, tmp_path, monkeypatch, capsys):
    def check(**rl):
        path = write_recipe(
            tmp_path, tiny_model, sample=None, label=None, reward=None, evaluate=None, rl={"rewards": ["rubric"], **rl}
        )
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return run_cli(monkeypatch, capsys, "check", path)

    rows = [{"prompt": f"what is {i}?", "rubric": ["is short"]} for i in range(6)]
    assert check()[0] == 0
    rows[3]["rubric"] = [{"criterion": "is short", "weight": "2"}]
    code, message = check()
    assert code == 2 and "train.jsonl:4: The weight of the criterion 'is short' is '2'." in message
    rows[3] = {"prompt": "what?"}
    code, message = check()
    assert code == 2 and "train.jsonl:4: There is no column 'rubric', which the labeler 'rubric' reads." in message
    assert check(labelers=[{"rubric": {"shared": ["is short"]}}])[0] == 0
    code, message = check(labelers=[{"rubric": {"column": None}}])
    assert code == 2 and "recipe.yaml:" in message and "Name a column, or give shared criteria" in message


def test_a_run_labels_by_rubric_and_its_report_shows_every_criterion(roomy_model, tmp_path):
    sections = {"label": {"labeler": {"rubric": {"shared": ["is short"]}}}, "evaluate": None, "rl": None}
    recipe = tiny_recipe(tmp_path, roomy_model, **sections)
    rubrics_of(tmp_path / "train.jsonl")
    folder = run_recipe(recipe, installed_plugins(), tmp_path / "out")
    rows = read_lines(folder / "labels.jsonl")
    assert len(rows) == len(read_lines(folder / "pairs.jsonl")) > 5
    for row in rows:
        assert [set(one) for one in row["criteria"]] == [{"criterion", "weight", "score_1", "score_2"}] * 3
        assert row["criteria"][2]["criterion"] == "is short"
    page = (folder / "report.html").read_text()
    assert f'<tr><th scope="row">is short</th><td class="n">1.00</td><td class="n">{len(rows)}</td>' in page
