"""The labeler `ranking`: its questions about a group, and the rewards of the group's responses."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import pytest
from datasets import Dataset
from helpers.judges import ScriptedJudge
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_rlaif_distilled import DistilledLabeler
from trl_rlaif_ranking import RankingLabeler

from trl_rlaif import Answer, Judge, JudgePrompt, LocalJudge, UserError
from trl_rlaif.recipe import prompt_folder
from trl_rlaif.testing import check_labeler, make_pairs

WORTH = {"best": 2.0, "good": 1.0, "poor": -1.0, "worst": -2.0, "other": 0.5}
POSITION = 0.8


def log_odds(context, response_1, response_2):
    return WORTH[response_1] - WORTH[response_2] + POSITION


def say(**texts):
    return log_odds(**texts)


def asked(judge):
    """Each question's context and responses, in the order shown."""
    from trl_rlaif.testing.judges import shown

    return [
        (found["context"], found["response_1"], found["response_2"])
        for call in judge.asked
        for group in call["groups"]
        for found in (shown(judge.prompt, question) for question in group)
    ]


def rewards(prompts, completions, judge=None, **options):
    return RankingLabeler(judge or ScriptedJudge(say), **options)(prompts=prompts, completions=completions)


def test_the_contract_of_a_labeler_and_a_reward():
    check_labeler(RankingLabeler)
    check_labeler(RankingLabeler(method="all_pairs"))


def test_rewards_of_all_pairs_are_shares_of_wins():
    """Without contradictions, they follow from the judge's own probabilities, almost free of the position effect."""
    texts = ["good", "worst", "best", "poor"]
    found = rewards(["x"] * 4, texts, method="all_pairs")
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    wanted = [sum(2 * sigmoid(WORTH[a] - WORTH[b]) - 1 for b in texts if b != a) / 3 for a in texts]
    assert found == pytest.approx(wanted, abs=0.1)
    assert sum(found) == pytest.approx(0, abs=1e-12) and all(-1 <= reward <= 1 for reward in found)
    assert np.argsort(found).tolist() == np.argsort([WORTH[text] for text in texts]).tolist()


def test_a_tournament_asks_a_third_of_all_and_finds_the_order():
    """The position effect is estimated over all groups of a call: the four answers of one group are too few."""
    rng, judge = np.random.default_rng(0), ScriptedJudge(say)
    texts = [rng.permutation(list(WORTH)[:4]).tolist() for _ in range(8)]
    prompts = [f"prompt {i}" for i in range(8) for _ in range(4)]
    found = np.reshape(rewards(prompts, sum(texts, []), judge), (8, 4))
    assert len(asked(judge)) == len(set(asked(judge))) == 8 * 4
    assert [len(call["groups"][0]) for call in judge.asked] == [2, 2]  # half as many per round as there are responses
    for of, one in zip(texts, found, strict=True):
        assert np.argsort(one).tolist() == np.argsort([WORTH[text] for text in of]).tolist()
    everything = ScriptedJudge(say)
    rewards(["x"] * 4, texts[0], everything, questions=99, at_once=3)
    assert len(asked(everything)) == 12


def test_groups_are_apart_wherever_their_responses_are():
    prompts = ["x", "y", "x", "y", "y"]
    completions = ["best", "worst", "poor", "good", "other"]
    judge = ScriptedJudge(say)
    found = rewards(prompts, completions, judge)
    assert {context for context, *_ in asked(judge)} == {"x", "y"}
    assert all({a, b} <= {"best", "poor"} for context, a, b in asked(judge) if context == "x")
    assert found[0] > 0 > found[2] == pytest.approx(-found[0]) and found[1] < 0
    assert found[1] + found[3] + found[4] == pytest.approx(0, abs=1e-12)
    messages = [[{"role": "assistant", "content": text}] for text in completions]
    chat = [[{"role": "user", "content": prompt}] for prompt in prompts]
    assert rewards(chat, messages) == pytest.approx(found, abs=1e-12)


def test_the_same_text_has_the_same_reward_and_is_asked_about_once():
    judge = ScriptedJudge(say)
    found = rewards(["x"] * 4, ["good", "poor", "good", "good"], judge, method="all_pairs")
    assert len(asked(judge)) == 2
    assert found[0] == found[2] == found[3] and found[1] == pytest.approx(-3 * found[0])
    assert rewards(["x"] * 3, ["good"] * 3, silent := ScriptedJudge(say)) == [0.0, 0.0, 0.0] and not asked(silent)


def test_a_response_that_cannot_be_compared_has_no_reward():
    def partly(context, response_1, response_2):
        return "too odd" if "other" in (response_1, response_2) else log_odds(context, response_1, response_2)

    labeler = RankingLabeler(ScriptedJudge(partly), method="all_pairs")
    found = labeler(prompts=["x"] * 3, completions=["good", "other", "poor"])
    assert found[1] is None and found[0] > 0 and found[0] + found[2] == pytest.approx(0, abs=1e-12)
    assert labeler.failed == ["too odd"] * 4
    assert None not in labeler(prompts=["x"] * 2, completions=["good", "poor"]) and labeler.failed == []
    never = RankingLabeler(Silent(JudgePrompt.load(prompt_folder("general")), "silent"))
    assert never(prompts=["x"] * 2, completions=["good", "poor"]) == [None, None]
    assert never.failed == ["the judge gives neither candidate any probability"]


class Silent(Judge):
    """Gives both candidates a probability of 0."""

    def ask(self, groups, candidates, *, thinking=None, done=()):
        for index, group in enumerate(groups):
            yield index, [Answer(((-math.inf, -math.inf),))] * len(group)


def test_a_single_response_has_nobody_to_be_compared_with():
    with pytest.raises(UserError, match="compares the responses to a prompt, and 'y' has one") as error:
        rewards(["x", "x", "y"], ["good", "poor", "best"])
    assert "GRPO or RLOO" in error.value.problems[0].fix
    with pytest.raises(TypeError, match="RankingLabeler\\(judge\\)"):
        RankingLabeler()(prompts=["x"] * 2, completions=["good", "poor"])


def test_pairs_are_labeled_as_by_distilled():
    options = {"preamble": "detailed", "debias": "mean_prob"}
    pairs, judge = make_pairs(), ScriptedJudge()
    ours, theirs = ([*one(**options).label(pairs, judge)] for one in (RankingLabeler, DistilledLabeler))
    assert ours == theirs


class Recording(RankingLabeler):
    """Records its prompts and rewards."""

    calls: ClassVar[list] = []

    def __call__(self, prompts, completions, **columns):
        found = super().__call__(prompts, completions, **columns)
        self.calls.append((prompts, found))
        return found


@pytest.mark.parametrize("algorithm", ["GRPO", "RLOO"])
def test_trls_own_trainers_are_rewarded(tiny_model, tmp_path, monkeypatch, algorithm):
    import trl

    monkeypatch.setattr(Recording, "calls", [])
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    model.config.max_position_embeddings = 4096
    judge = LocalJudge(
        model, AutoTokenizer.from_pretrained(tiny_model), JudgePrompt.load(prompt_folder("general")), "tiny"
    )
    config = getattr(trl, f"{algorithm}Config")(
        str(tmp_path), max_steps=2, per_device_train_batch_size=8, num_generations=4, max_completion_length=6,
        learning_rate=1e-2, bf16=False, use_cpu=True, report_to="none", logging_steps=1, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    trainer = getattr(trl, f"{algorithm}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(tiny_model),
        reward_funcs=[Recording(judge)],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": f"what is {i}?"} for i in range(4)]),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
    )
    trainer.train()
    logged = [row["rewards/ranking/std"] for row in trainer.state.log_history if "rewards/ranking/std" in row]
    assert len(logged) == len(Recording.calls) == 2 and min(logged) > 0
    for prompts, found in Recording.calls:
        assert prompts == [prompts[0]] * 4 + [prompts[4]] * 4
        assert sum(found[:4]) == pytest.approx(0, abs=1e-9) == sum(found[4:])
        assert all(-1 <= reward <= 1 for reward in found)
