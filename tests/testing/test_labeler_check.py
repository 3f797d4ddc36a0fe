"""check_labeler passes labelers that keep the contract, and reports each violation with a fix."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from pydantic import BaseModel, ConfigDict
from trl_rlaif_direct import DirectLabeler
from trl_rlaif_distilled import DistilledLabeler

from trl_rlaif import Label, Labeler, Options, RewardTransform
from trl_rlaif.testing import ScriptedJudge, check_labeler, make_judge_prompt, make_pairs


class Fair(Labeler):
    """Keeps the contract; each broken labeler changes one thing."""

    def label(self, pairs, judge, done=()):
        for pair in pairs:
            if pair.id not in done:
                yield self.one(pair)

    def one(self, pair):
        first, second = len(pair.response_1), len(pair.response_2)
        return Label(pair.id, p=first / (first + second), judge="length")


@pytest.mark.parametrize(
    "labeler",
    [
        Fair,
        Fair(),
        DirectLabeler,
        DirectLabeler(thinking=True, rationales=2),
        DistilledLabeler,
        DistilledLabeler(shots=2, preamble="detailed", orders="12"),
        DistilledLabeler(thinking=True, debias="mean_prob"),
    ],
    ids=lambda component: getattr(component, "__name__", type(component).__name__),
)
def test_good_labelers_pass(labeler):
    check_labeler(labeler)


def test_with_a_judge_and_pairs_of_ones_own():
    def judge():
        return ScriptedJudge(lambda context, response_1, response_2: 2.0, prompt=make_judge_prompt())

    check_labeler(DistilledLabeler(orders="12"), judge=judge, pairs=make_pairs(3, seed=4))


class Loose(BaseModel):
    word: str = "please"


class Unchecked(Options):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Needed(Options):
    word: str


class NoModel(Fair):
    Options = Loose


class TakesAnything(Fair):
    Options = Unchecked


class NeedsAWord(Fair):
    Options = Needed


class NeedsMore(Fair):
    def __init__(self, client):
        super().__init__()


class GivesAList(Fair):
    def label(self, pairs, judge, done=()):
        return [self.one(pair) for pair in pairs if pair.id not in done]


class GivesNumbers(Fair):
    def one(self, pair):
        return 0.5


class OutOfRange(Fair):
    def one(self, pair):
        return replace(super().one(pair), p=1.5)


class NotANumber(Fair):
    def one(self, pair):
        return replace(super().one(pair), p=float("nan"))


class GivesTensors(Fair):
    def one(self, pair):
        import torch

        return replace(super().one(pair), p=torch.tensor(0.5))


class WrongScore(Fair):
    def one(self, pair):
        return replace(super().one(pair), score_1=7.0)


class WrongRatings(Fair):
    def one(self, pair):
        return replace(super().one(pair), ratings_2=[0.5, 0.25])


class SaysNothing(Fair):
    def one(self, pair):
        return Label(pair.id)


class SaysBoth(Fair):
    def one(self, pair):
        return replace(super().one(pair), skipped="too hard")


class NoJson(Fair):
    def one(self, pair):
        return replace(super().one(pair), rationale_12={"a", "b"})


class SkipsAll(Fair):
    def one(self, pair):
        return Label(pair.id, skipped="no keyword")


class OwnIds(Fair):
    def one(self, pair):
        return replace(super().one(pair), id=pair.id.upper())


class Repeats(Fair):
    def label(self, pairs, judge, done=()):
        for label in super().label(pairs, judge, done):
            yield from (label, label)


class DropsTheLast(Fair):
    def label(self, pairs, judge, done=()):
        return super().label(pairs[:-1], judge, done)


class Again(Fair):
    def label(self, pairs, judge, done=()):
        return super().label(pairs, judge)


class Dice(Fair):
    def one(self, pair):
        return replace(super().one(pair), p=random.random())


class SeededOnce(Fair):
    def label(self, pairs, judge, done=()):
        generator = random.Random(0)
        for label in super().label(pairs, judge, done):
            yield replace(label, p=generator.random())


class ByPlace(Fair):
    def label(self, pairs, judge, done=()):
        for i, pair in enumerate(pairs):
            if pair.id not in done:
                yield Label(pair.id, p=1 / (1 + i))


class Cleans(Fair):
    def one(self, pair):
        pair.extra["seen"] = True
        return super().one(pair)


class NeedsCategories(Fair):
    def one(self, pair):
        return replace(super().one(pair), judge=pair.category.upper())


class NeedsTwoPairs(Fair):
    def label(self, pairs, judge, done=()):
        assert pairs[0].id
        return super().label(pairs, judge, done)


class AsksMore(Fair):
    candidates = ("1", "2")

    def questions(self, pair, prompt):
        return DistilledLabeler().questions(pair, prompt)[: 1 + len(pair.prompt) % 2]


class OtherEndings(DistilledLabeler):
    def questions(self, pair, prompt):
        return [replace(q, ending=f"{i}: ") for i, q in enumerate(super().questions(pair, prompt))]


class TurnedAround(DistilledLabeler):
    def teaching_loss(self, logprobs, p):
        return super().teaching_loss(logprobs, 1 - p)


class MeanLoss(DirectLabeler):
    def teaching_loss(self, logprobs, p):
        return super().teaching_loss(logprobs, p).mean()


class Reward(Fair):
    __name__ = "length"

    def __call__(self, prompts, completions, **columns):
        return [float(len(completion)) for completion in completions]


class Unnamed(Reward):
    __name__ = None


class TooFew(Reward):
    def __call__(self, prompts, completions, **columns):
        return [1.0]


class Unbounded(Reward):
    def __call__(self, prompts, completions, **columns):
        return [float("inf") for _ in completions]


class TextOnly(Reward):
    def __call__(self, prompts, completions, **columns):
        return [float(len(completion.strip())) for completion in completions]


class Pops(Reward):
    def __call__(self, prompts, completions, **columns):
        columns["category"].clear()
        return super().__call__(prompts, completions)


BROKEN = [
    (AsksMore, "asks about some pairs more often", "Ask the same of every pair"),
    (OtherEndings, "has several endings", "End all with the same text"),
    (TurnedAround, "answers that teaching_loss() brings to 0.2", "Give a loss that is least"),
    (MeanLoss, "for one pair", "shape (B,)"),
    (RewardTransform, "is not a trl_rlaif.Labeler", "class RewardTransform(Labeler)"),
    (NoModel, "its Options are", "subclass of trl_rlaif.Options"),
    (TakesAnything, "takes options that it does not know", "forbid"),
    (NeedsAWord, "cannot be made without options", "Pass an instance"),
    (NeedsMore, "cannot be made from its options alone", "pass **options on"),
    (GivesAList, "label() returns a list", "Yield each label"),
    (GivesNumbers, "yields a float", "Label(pair.id, p=...)"),
    (OutOfRange, "p = 1.5 of 'pair-0', outside [0, 1]", "clamp"),
    (NotANumber, "p = nan of 'pair-0'", "Normalize"),
    (GivesTensors, "a Tensor as p of 'pair-0'", "float(...)"),
    (WrongScore, "score_1 = 7.0 of 'pair-0', outside [-1, 1]", "clamp"),
    (WrongRatings, "ratings_2 of 'pair-0' that do not add up to 1", "Normalize"),
    (SaysNothing, "neither p nor", "Give it p; or skipped"),
    (SaysBoth, "both p and", "Give it p; or skipped"),
    (NoJson, "cannot be written as JSON", "finite numbers and texts"),
    (SkipsAll, "every pair is skipped: no keyword", "pairs=..."),
    (OwnIds, "the id 'PAIR-0', which no pair has", "Pass the pair's id on"),
    (Repeats, "two labels of 'pair-0'", "exactly one"),
    (DropsTheLast, "no label of 'pair-7'", "skipped='why'"),
    (Again, "labels 'pair-0' again", "Leave out the ids in done"),
    (Dice, "is another one in a second run", "seeded by an option"),
    (SeededOnce, "is another one where others are done", "depend on the pair alone"),
    (ByPlace, "is another one where it is labeled alone", "depend on the pair alone"),
    (Cleans, "label() changes the pairs", "Copy what you change"),
    (NeedsCategories, "label() on a pair with one letter as response raises AttributeError", "Make it cope"),
    (NeedsTwoPairs, "label() on no pairs raises IndexError", "Make it cope"),
    (Unnamed, "is callable and has no __name__", "Set self.__name__"),
    (TooFew, "does not return a list of 6 rewards", "one number a completion"),
    (Unbounded, "returns the reward inf", "finite number"),
    (TextOnly, "as a reward function on messages raises AttributeError", "Make it cope"),
    (Pops, "changes its arguments", "Copy what you change"),
]


@pytest.mark.parametrize(("labeler", "what", "fix"), BROKEN, ids=[broken[0].__name__ for broken in BROKEN])
def test_what_is_broken_is_named(labeler, what, fix):
    with pytest.raises(AssertionError) as caught:
        check_labeler(labeler)
    message = str(caught.value)
    assert message.startswith(f"{labeler.__name__}: ") and what in message and fix in message


def test_a_reward_function_of_both_forms_passes():
    check_labeler(Reward)
