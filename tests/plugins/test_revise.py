"""The sampler `revise`: its requests, the pairs it makes, and the prompts it drops."""

from __future__ import annotations

import json
import random

import pytest
from trl_rlaif_revise import Revise

from trl_rlaif import Prompt, UserError
from trl_rlaif.recipe import recipes_dir
from trl_rlaif.testing import ScriptedPolicy, check_pair_sampler

ONE = [{"name": "short", "critique": "Is it long?", "revision": "Shorten it."}]
PROMPT = Prompt("a", "What is a fox?")
TURNS = ["user", "assistant", "user", "assistant", "user"]


@pytest.fixture
def revise(tmp_path):
    """A sampler with these principles."""

    def make(rows=ONE):
        (tmp_path / "principles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Revise(principles=str(tmp_path / "principles.jsonl"))

    return make


class Recorded:
    """Gives these answers, one per call, and records the requests."""

    def __init__(self, *answers):
        self.answers, self.asked = iter(answers), []

    def __call__(self, conversations):
        self.asked.append(dict(conversations))
        return dict.fromkeys(conversations, next(self.answers))


def only(sampler, policy, prompt=PROMPT):
    [pair] = sampler.sample([prompt], policy, seed=0)
    return pair


def test_it_keeps_the_contract(revise):
    check_pair_sampler(revise())
    check_pair_sampler(Revise(principles=str(recipes_dir() / "data" / "principles.jsonl")))


def test_the_revision_follows_the_critique_of_the_response(revise):
    policy = Recorded("A red animal of the woods.", "It is long.", "A red animal.")
    pair = only(revise(), policy)
    assert (pair.response_1, pair.response_2) == ("A red animal of the woods.", "A red animal.")
    assert pair.revision == pair.response_2
    assert pair.extra == {"principle": "short", "critique": "It is long."}
    assert policy.asked[0] == {"a": "What is a fox?"}
    conversation = policy.asked[2]["a"]
    assert [turn["role"] for turn in conversation] == TURNS and conversation[:3] == policy.asked[1]["a"]
    said = ["What is a fox?", "A red animal of the woods.", "Is it long?", "It is long.", "Shorten it."]
    assert [turn["content"] for turn in conversation] == said


def test_a_conversation_keeps_its_turns(revise):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    policy = Recorded("Hi.", "It is fine.", "Hello!")
    only(revise(), policy, Prompt("a", turns))
    assert policy.asked[2]["a"][:3] == [*turns, {"role": "assistant", "content": "Hi."}]
    assert len(turns) == 2


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        (["", "b", "c"], "empty response"),
        (["a", "", "c"], "empty critique"),
        (["a", "b", ""], "empty revision"),
        (["a", "b", "a"], "revision equal to the response"),
        (["a", None, "c"], "no room for the critique in the context"),
        (["a", "b", None], "no room for the revision in the context"),
    ],
)
def test_what_gives_no_pair_is_dropped_with_a_reason(revise, answers, reason):
    policy = Recorded(*answers)
    pair = only(revise(), policy)
    assert (pair.dropped, pair.response_1, pair.revision) == (reason, None, None)
    assert len(policy.asked) == len(answers) - (2 if not answers[0] else 1 if not answers[1] else 0)


def test_a_turn_that_is_begun_is_not_revised(revise):
    begun = [{"role": "user", "content": "Name a city."}, {"role": "assistant", "content": "The city is"}]
    policy = Recorded()
    assert only(revise(), policy, Prompt("a", begun)).dropped == "assistant's turn to be continued"
    assert not policy.asked


def test_principles_are_drawn_evenly_by_the_seed_and_the_prompt(revise):
    rows = [{"name": str(i), "critique": f"c{i}", "revision": f"r{i}"} for i in range(4)]
    prompts = [Prompt(f"p{i}", f"What is {i}?") for i in range(400)]

    def drawn(given, seed=0):
        return {pair.id: pair.extra["principle"] for pair in revise(rows).sample(given, ScriptedPolicy(), seed)}

    first = drawn(prompts)
    assert all(70 < list(first.values()).count(str(i)) < 130 for i in range(4))
    shuffled = random.Random(0).sample(prompts, 100)
    assert drawn(shuffled) == {prompt.id: first[prompt.id] for prompt in shuffled}
    assert drawn(prompts, seed=1) != first


def test_a_file_without_principles_is_refused(revise):
    with pytest.raises(UserError, match="There are no rows"):
        revise([])
