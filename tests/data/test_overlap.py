"""Which prompts count as the same, and splits with no prompt on both sides."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.model_selection import GroupShuffleSplit

from trl_rlaif.data.overlap import finetuned_prompts, prompt_key, question_key, split_by_group


def user(text, **more):
    return {"role": "user", "content": text, **more}


def test_white_space_and_case_make_no_other_prompt():
    same = [
        "What is  the capital\nof Laos? ",
        "what is the capital of Laos?",
        [user("What is the capital of Laos?")],
        [user([{"type": "text", "text": "What is the capital "}, {"type": "text", "text": "of Laos?"}])],
    ]
    assert len(set(map(prompt_key, same))) == 1
    under_instructions = [{"role": "system", "content": "Be brief."}, *same[2]]
    assert question_key(under_instructions) == question_key(same[0]) == prompt_key(same[0])
    # If the system turn holds the document, the prompts are not one cluster.
    assert prompt_key(under_instructions) != prompt_key(same[0])
    others = [
        "What is the capital of Laos",
        [user("Hi"), {"role": "assistant", "content": "Hello."}, *same[2]],
        [user("Hi"), {"role": "assistant", "content": "Hi!"}, *same[2]],
        [*same[2], {"role": "assistant", "content": None, "tool_calls": []}],
        [*same[2], {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "search"}}]}],
        [{"role": "tool", "content": "What is the capital of Laos?"}],
    ]
    assert len({prompt_key(prompt) for prompt in [*others, same[0]]}) == 7


def test_every_answer_of_a_conversation_has_its_prompt():
    turns = [user("a"), {"role": "assistant", "content": "b"}, user("c"), {"role": "assistant", "content": "d"}]
    assert finetuned_prompts({"messages": turns}) == [turns[:1], turns[:3]]
    assert finetuned_prompts({"messages": turns[1:3]}) == []
    assert finetuned_prompts({"prompt": "a", "completion": "b"}) == ["a"]
    assert finetuned_prompts({"text": "a b"}) == []


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.1, 0.3, 0.9])
def test_groups_stay_together_and_the_share_is_kept(share, seed):
    draw = np.random.default_rng(seed)
    groups = draw.permutation(np.repeat([f"p{i}" for i in range(80)], draw.integers(1, 9, 80))).tolist()
    training, held_out = split_by_group(groups, share, seed)
    assert sorted(training + held_out) == list(range(len(groups)))
    assert not {groups[i] for i in training} & {groups[i] for i in held_out}
    assert abs(len(held_out) - share * len(groups)) <= 4  # half of the largest group
    assert split_by_group(groups, share, seed) == (training, held_out) != split_by_group(groups, share, seed + 1)
    assert training == sorted(training) and held_out == sorted(held_out)


def test_every_group_is_held_out_as_often_as_sklearns():
    groups = [f"p{i // 4}" for i in range(40)]
    ours, theirs = np.zeros(40), np.zeros(40)
    draws = 2000
    for seed in range(draws):
        ours[split_by_group(groups, 0.3, seed)[1]] += 1 / draws
    for _, held_out in GroupShuffleSplit(draws, test_size=0.3, random_state=0).split(groups, groups=groups):
        theirs[held_out] += 1 / draws
    noise = (2 * 0.3 * 0.7 / draws) ** 0.5
    np.testing.assert_allclose(ours, theirs, atol=5 * noise)


def test_one_prompt_is_left_to_train_on():
    assert split_by_group(["a"] * 9, 0.5, 0) == (list(range(9)), [])
    assert split_by_group(["a", "b"], 0.9, 0)[0] and split_by_group(["a", "b"], 0.0, 0) == ([0, 1], [])
    assert split_by_group([], 0.5, 0) == ([], [])
