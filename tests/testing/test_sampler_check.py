"""check_pair_sampler passes samplers that keep the contract, and reports each violation."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from trl_rlaif import PairSampler, Prompt, SampledPair
from trl_rlaif.testing import ScriptedPolicy, check_pair_sampler


class Twice(PairSampler):
    """Keeps the contract; each broken sampler changes one thing."""

    def sample(self, prompts, generate, seed):
        asked = {prompt.id: prompt.prompt for prompt in prompts}
        first, second = generate(asked), generate(asked)
        for prompt in prompts:
            texts = first[prompt.id], second[prompt.id]
            if not all(texts) or texts[0] == texts[1]:
                yield SampledPair(prompt.id, dropped="no two responses")
            else:
                yield from self.pairs(SampledPair(prompt.id, *texts))

    def pairs(self, pair):
        yield pair


def test_a_good_sampler_passes():
    check_pair_sampler(Twice)


class Several(Twice):
    def pairs(self, pair):
        yield pair
        yield replace(pair, extra={"turned": True}, response_1=pair.response_2, response_2=pair.response_1)


def test_several_pairs_of_a_prompt_pass():
    check_pair_sampler(Several)


def test_with_a_policy_and_prompts_of_ones_own():
    class Numbers(Twice):
        def pairs(self, pair):
            yield replace(pair, extra={"difference": int(pair.response_1) - int(pair.response_2)})

        def sample(self, prompts, generate, seed):
            numbered = {p.id: str(p.extra.get("number", "")) for p in prompts}
            known = [p for p in prompts if numbered[p.id]]
            yield from (SampledPair(p.id, dropped="no number") for p in prompts if not numbered[p.id])
            answers = generate({p.id: numbered[p.id] for p in known}) if known else {}
            for p in known:
                if (answers[p.id] or "").isdigit():
                    yield from self.pairs(SampledPair(p.id, answers[p.id], numbered[p.id]))
                else:
                    yield SampledPair(p.id, dropped="no number")

    with pytest.raises(AssertionError, match="every prompt is dropped: no number"):
        check_pair_sampler(Numbers)
    policy = lambda: ScriptedPolicy(lambda text: str(int(text.split()[0]) + 1))  # noqa: E731
    prompts = [Prompt("one", "x", extra={"number": 1}), Prompt("two", "y", extra={"number": 2})]
    check_pair_sampler(Numbers, policy=policy, prompts=prompts)


class GivesTexts(Twice):
    def pairs(self, pair):
        yield pair.response_1


class InventsAnId(Twice):
    def pairs(self, pair):
        yield replace(pair, id="other")


class ForgetsPrompts(Twice):
    def pairs(self, pair):
        yield from [] if pair.id == "pair-3" else [pair]


class EqualResponses(Twice):
    def pairs(self, pair):
        yield replace(pair, response_2=pair.response_1)


class BlankResponse(Twice):
    def pairs(self, pair):
        yield replace(pair, response_2=" \n")


class BlankRevision(Twice):
    def pairs(self, pair):
        yield replace(pair, revision="")


class OneResponse(Twice):
    def pairs(self, pair):
        yield replace(pair, response_2=None)


class DropsAPair(Twice):
    def pairs(self, pair):
        yield replace(pair, dropped="for nothing")


class DropsAndYields(Twice):
    def pairs(self, pair):
        yield pair
        yield SampledPair(pair.id, dropped="for nothing")


class TakesAColumn(Twice):
    def pairs(self, pair):
        yield replace(pair, extra={"category": "a"})


class NoJson(Twice):
    def pairs(self, pair):
        yield replace(pair, extra={"nan": float("nan")})


class DrawsAnew(Twice):
    def pairs(self, pair):
        yield replace(pair, extra={"drawn": random.random()})


class CountsPrompts(Twice):
    def sample(self, prompts, generate, seed):
        yield from (replace(pair, extra={"prompts": len(prompts)} if not pair.dropped else {})
                    for pair in super().sample(prompts, generate, seed))  # fmt: skip


class ChangesPrompts(Twice):
    def sample(self, prompts, generate, seed):
        for prompt in prompts:
            prompt.extra["seen"] = True
        return super().sample(prompts, generate, seed)


class NeedsRoom(Twice):
    def sample(self, prompts, generate, seed):
        lengths = {id: len(text) for id, text in generate({p.id: p.prompt for p in prompts}).items()}
        return (replace(pair, extra={"length": lengths[pair.id]} if not pair.dropped else {})
                for pair in super().sample(prompts, generate, seed))  # fmt: skip


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (GivesTexts, "yields a str. Yield trl_rlaif.SampledPair"),
        (InventsAnId, "yields the id 'other', which no prompt has"),
        (ForgetsPrompts, "says nothing of the prompt 'pair-3'"),
        (EqualResponses, "yields two equal responses to 'pair-0'"),
        (BlankResponse, "yields a pair of 'pair-0' with a response that is no text, or blank"),
        (BlankRevision, "yields a pair of 'pair-0' with a response that is no text, or blank"),
        (OneResponse, "yields a pair of 'pair-0' with a response that is no text, or blank"),
        (DropsAPair, "drops 'pair-0' and gives a response"),
        (DropsAndYields, "drops the prompt 'pair-0' and yields more of it"),
        (TakesAColumn, "yields a pair of 'pair-0' with a column 'category', which pairs have"),
        (NoJson, "whose extra cannot be written as JSON"),
        (DrawsAnew, "the pairs of 'pair-0' are other ones in a second run"),
        (CountsPrompts, "the pairs of 'pair-0' are other ones where it is alone"),
        (ChangesPrompts, "changes the prompts. Copy what you change"),
        (NeedsRoom, "on conversations without room for an answer raises TypeError"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_breaks_the_contract_is_said(sampler, message):
    with pytest.raises(AssertionError) as caught:
        check_pair_sampler(sampler)
    assert str(caught.value).startswith(f"{sampler.__name__}: ") and message in str(caught.value)
