"""The labeler `direct`: its formulas, its labels from a scripted judge, and its rewards in every trainer."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from typing import ClassVar

import numpy as np
import pytest
from datasets import Dataset
from helpers.judges import ScriptedJudge, make_prompt
from helpers.recipes import tiny_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_rlaif_direct import DirectLabeler
from trl_rlaif_direct.rating import RATINGS, rating

from trl_rlaif import JudgePrompt, LocalJudge, Pair, Thinking
from trl_rlaif.files import read_lines
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import prompt_folder

NEVER = -math.inf


def logprobs(weights, mass=1.0):
    """Log-probabilities of the ten ratings with these relative weights."""
    total = sum(weights)
    return tuple(math.log(mass * w / total) if w else NEVER for w in weights)


def distributions(count, seed=0):
    return np.random.default_rng(seed).dirichlet([0.5] * 10, count).tolist()


# ---- Formulas -------------------------------------------------------------------------------------------


def test_the_ratings_are_the_papers():
    assert RATINGS == ("1", "2", "3", "4", "5", "6", "7", "8", "9", "10")


@pytest.mark.parametrize("weights", distributions(5))
@pytest.mark.parametrize("mass", [1.0, 0.3, 1e-9])
def test_reward_and_spread_by_plain_arithmetic(weights, mass):
    found = rating([logprobs(weights, mass)])
    s = sum(i * p for i, p in enumerate(weights, 1))
    assert found.reward == pytest.approx(2 * (s - 1) / 9 - 1, abs=1e-12)
    squares = sum(p * (2 * (i - 1) / 9 - 1 - found.reward) ** 2 for i, p in enumerate(weights, 1))
    assert found.spread == pytest.approx(math.sqrt(squares), abs=1e-12)
    assert found.mass == pytest.approx(mass, rel=1e-12)
    assert sum(found.probabilities) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("index", range(10))
def test_a_sure_rating_spans_the_range(index):
    found = rating([logprobs([float(i == index) for i in range(10)], 0.5)])
    assert found.reward == pytest.approx(-1 + 2 * index / 9, abs=1e-15)
    assert (found.spread, found.mass) == (0.0, 0.5)


def test_reward_and_spread_stay_in_their_ranges():
    extremes = rating([logprobs([1, *[0] * 8, 1])])
    assert (extremes.reward, extremes.spread) == (pytest.approx(0, abs=1e-15), pytest.approx(1))
    for weights in distributions(50, seed=1):
        found = rating([logprobs(weights)])
        assert -1 <= found.reward <= 1 and 0 <= found.spread <= 1


def test_far_out_log_probabilities():
    found = rating([(-3000.0, *[-3001.0] * 9)])
    assert found.probabilities[0] == pytest.approx(1 / (1 + 9 / math.e)) and found.mass == 0.0
    assert rating([(math.log(0.5) + 1e-9,) * 2 + (NEVER,) * 8]).mass == 1.0  # rounding never gives a mass above one


def test_several_rationales_are_averaged_as_distributions():
    """Each rationale's distribution over the ten ratings counts equally, whatever its mass on them."""
    one, two = distributions(2, seed=2)
    found = rating([logprobs(one, 0.9), logprobs(two, 0.1)])
    assert found.probabilities == pytest.approx([(a + b) / 2 for a, b in zip(one, two, strict=True)], abs=1e-12)
    assert found.mass == pytest.approx(0.5)
    alone = [rating([logprobs(weights)]) for weights in (one, two)]
    assert found.reward == pytest.approx((alone[0].reward + alone[1].reward) / 2)
    assert found.spread > min(a.spread for a in alone)


def test_preference_by_all_hundred_combinations():
    for one, two in zip(distributions(20, seed=3), distributions(20, seed=4), strict=True):
        wanted = sum(
            a * b * (1.0 if i > j else 0.5 if i == j else 0.0)
            for (i, a), (j, b) in itertools.product(enumerate(one), enumerate(two))
        )
        first, second = rating([logprobs(one)]), rating([logprobs(two)])
        assert first.above(second) == pytest.approx(wanted, abs=1e-12)
        assert first.above(second) + second.above(first) == pytest.approx(1, abs=1e-12)


def test_preference_of_sure_ratings():
    nine, ten = (rating([logprobs([float(i == index) for i in range(10)])]) for index in (8, 9))
    assert (ten.above(nine), nine.above(ten), ten.above(ten)) == (1.0, 0.0, 0.5)


# ---- Labels of a scripted judge -------------------------------------------------------------------------

PAIRS = [Pair("a", "say it", "good", "bad"), Pair("b", "say it again", "bad", "odd"), Pair("c", "say", "bad", "bad!")]
WEIGHTS = {"good": [0] * 8 + [1, 3], "bad": [3, 1] + [0] * 8, "bad!": [3, 1] + [0] * 8, "odd": [1] * 10}


def say(context, response):
    weights = WEIGHTS[response]
    return [math.log(w) if w else -700.0 for w in weights]


def labeled(judge, done=(), **options):
    return {label.id: label for label in DirectLabeler(**options).label(PAIRS, judge, done)}


def test_labels_are_from_the_ratings_of_both_responses():
    judge = ScriptedJudge(say, mass=0.8)
    labels = labeled(judge)
    assert labels.keys() == {"a", "b", "c"}
    first = labels["a"]
    # good: nine with 1/4, ten with 3/4; bad: one with 3/4, two with 1/4
    assert first.score_1 == pytest.approx(2 * (9.75 - 1) / 9 - 1) == pytest.approx(-first.score_2)
    assert first.spread_1 == pytest.approx(2 / 9 * math.sqrt(3 / 16)) == pytest.approx(first.spread_2)
    assert [one for of in (first.ratings_1, first.ratings_2) for one in of] == pytest.approx(
        [0] * 8 + [0.25, 0.75] + [0.75, 0.25] + [0] * 8, abs=1e-12
    )
    assert first.p == pytest.approx(1)
    assert (first.p_12, first.p_21, first.skipped, first.judge) == (None, None, None, "scripted")
    assert (first.mass_12, first.mass_21) == pytest.approx((0.8, 0.8))
    assert labels["b"].score_2 == pytest.approx(0, abs=1e-12)
    assert labels["b"].p == pytest.approx(0.75 * (0.5 * 0.1) + 0.25 * (0.1 + 0.05))
    assert labels["c"].p == pytest.approx(0.5)  # the same rating


def test_each_response_is_shown_alone_to_the_judge():
    judge = ScriptedJudge(say, prompt=make_prompt())
    labeled(judge)
    [asked] = judge.asked
    assert asked["candidates"] == RATINGS and asked["thinking"] is None
    texts = [[question.messages[-1]["content"] for question in group] for group in asked["groups"]]
    assert all("good" in group[0] and "bad" not in group[0] and "bad" in group[1] for group in texts[:1])
    assert {question.ending for group in asked["groups"] for question in group} == {"Rating="}


def test_what_is_done_is_named_to_the_judge_and_not_yielded():
    judge = ScriptedJudge(say)
    assert labeled(judge, done=["b", "of another run"]).keys() == {"a", "c"}
    assert set(judge.asked[0]["done"]) == {1} and len(judge.asked[0]["groups"]) == 3


def test_a_response_that_cannot_be_rated_skips_its_pair():
    labels = labeled(
        ScriptedJudge(lambda context, response: "too odd" if response == "odd" else say(context, response))
    )
    assert labels["b"].skipped == "too odd" and labels["b"].p is labels["b"].score_1 is None
    assert labels["a"].skipped is None


@pytest.mark.parametrize(
    ("options", "thinking"),
    [
        ({}, Thinking(1, 128, 0.0, 0)),
        ({"rationales": 3}, Thinking(3, 128, 0.7, 0)),
        ({"rationales": 2, "rationale_temperature": 0.3, "rationale_tokens": 9, "seed": 5}, Thinking(2, 9, 0.3, 5)),
    ],
)
def test_rationales_are_asked_for_and_kept(options, thinking):
    judge = ScriptedJudge(say, prompt=make_prompt(), rationale=lambda texts, number: f"{texts['response']} {number}")
    label = labeled(judge, thinking=True, **options)["a"]
    assert judge.asked[0]["thinking"] == thinking
    assert {question.thinking for group in judge.asked[0]["groups"] for question in group} == {"Let us look at it."}
    n = thinking.rationales
    wanted = [[f"{response} {i}" for i in range(n)] for response in ("good", "bad")]
    assert [label.rationale_12, label.rationale_21] == (wanted if n > 1 else [one[0] for one in wanted])
    assert label.p == pytest.approx(1)


# ---- As a reward function -------------------------------------------------------------------------------


def test_rewards_come_in_the_order_of_the_completions():
    """Texts or messages, as GRPOTrainer passes them; the judge may answer in any order."""
    labeler = DirectLabeler(ScriptedJudge(say))
    wanted = [2 * (9.75 - 1) / 9 - 1, 0.0, -(2 * (9.75 - 1) / 9 - 1)]
    texts = ["good", "odd", "bad"]
    assert labeler(prompts=["x"] * 3, completions=texts, completion_ids=[[1]] * 3) == pytest.approx(wanted, abs=1e-12)
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    prompts = [[{"role": "user", "content": "x"}]] * 3
    assert labeler(prompts=prompts, completions=messages, trainer_state=None) == pytest.approx(wanted, abs=1e-12)
    assert labeler.__name__ == "direct"


def test_a_reward_that_is_missing_is_no_zero():
    down = "the server is down"
    labeler = DirectLabeler(ScriptedJudge(lambda context, response: down if response == "bad" else [1.0] * 10))
    assert labeler(prompts=["x"] * 3, completions=["good", "bad", "good"]) == [pytest.approx(0), None, pytest.approx(0)]
    assert labeler.failed == [down]
    assert None not in labeler(prompts=["x"], completions=["good"]) and not labeler.failed
    with pytest.raises(TypeError, match="DirectLabeler\\(judge\\)"):
        DirectLabeler()(prompts=["x"], completions=["good"])


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


class Recording(DirectLabeler):
    """Records its inputs and rewards."""

    calls: ClassVar[list] = []

    def __call__(self, prompts, completions, **columns):
        rewards = super().__call__(prompts, completions, **columns)
        self.calls.append((prompts, completions, rewards))
        return rewards


@pytest.fixture
def recording(monkeypatch):
    monkeypatch.setattr(Recording, "calls", [])
    return Recording


def test_ppo_is_rewarded_by_the_base_without_its_adapter(roomy_model, tmp_path, monkeypatch, recording):
    """The policy changes, but its judge, which is the same base, does not."""
    registered = installed_plugins().registry.find("labeler", "direct")
    monkeypatch.setitem(vars(registered), "component", recording)
    rest = dict.fromkeys(("sample", "label", "reward", "evaluate", "report"))
    recipe = tiny_recipe(
        tmp_path, roomy_model, **rest, rl={"rewards": ["direct"], "total_episodes": 8, "learning_rate": 0.1}
    )
    folder = run_recipe(recipe, installed_plugins(), tmp_path / "out")
    steps = [row for row in read_lines(folder / "metrics.jsonl") if row["stage"] == "rl"]
    assert len(steps) == len(recording.calls) == 2
    assert abs(steps[1]["objective/kl"]) > 1e-3  # the policy has changed
    judge = local_judge(roomy_model)
    for step, (prompts, completions, rewards) in zip(steps, recording.calls, strict=True):
        assert step["score/direct"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-6)
        assert step["objective/scores"] == pytest.approx(step["score/direct"], abs=1e-6)
        texts = [completion[0]["content"] for completion in completions]
        own = DirectLabeler().rate(prompts, texts, judge)
        assert rewards == pytest.approx([one.reward for one in own], abs=1e-4)
        assert max(rewards) - min(rewards) > 1e-3


@pytest.mark.parametrize("conversational", [True, False], ids=["conversations", "texts"])
@pytest.mark.parametrize("algorithm", ["GRPO", "RLOO"])
def test_trls_own_trainers_are_rewarded(roomy_model, tmp_path, recording, algorithm, conversational):
    import trl

    prompts = [f"what is {i}?" for i in range(4)]
    rows = [{"prompt": [{"role": "user", "content": p}] if conversational else p} for p in prompts]
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
    logged = [row["rewards/direct/mean"] for row in trainer.state.log_history if "rewards/direct/mean" in row]
    assert len(logged) == len(recording.calls) == 2
    for mean, (asked, completions, rewards) in zip(logged, recording.calls, strict=True):
        assert mean == pytest.approx(sum(rewards) / len(rewards), abs=1e-6)
        assert isinstance(completions[0], list) == isinstance(asked[0], list) == conversational
        assert all(-1 <= reward <= 1 for reward in rewards)
