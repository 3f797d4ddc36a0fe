"""Contrasts: the better response is complete, the worse one is degraded in the way of its kind."""

from collections import Counter

import pytest

from trl_rlaif.data import Pair
from trl_rlaif.data.overlap import prompt_key
from trl_rlaif.teaching import KINDS, make_contrasts
from trl_rlaif.teaching.contrasts import complete, sentences

TEXTS = [
    "Bees make honey from nectar. They store it in wax combs. In winter the whole hive lives on it. Some of it is sold",
    "The train leaves at nine. It stops twice on its way to the coast. You should be there by noon, if all goes well.",
    "Bread needs flour, water, salt and time. Knead it well! Then let it rest for an hour before you bake it.",
    "A river carries sand to the sea. The sand settles where the water is slow. That is how a delta grows over time.",
]
PAIRS = [
    Pair(f"p{i}", f"Tell me about subject {i}", TEXTS[i % 4], TEXTS[(i + 1) % 4] + f" Number {i} is done.")
    for i in range(12)
]


def split(pair):
    """The better response, then the worse one."""
    responses = (pair.response_1, pair.response_2)
    return responses if pair.human == 1 else responses[::-1]


@pytest.fixture(scope="module")
def contrasts():
    return make_contrasts(PAIRS, KINDS, 72, seed=5)


def of_kind(contrasts, kind):
    found = [pair for pair in contrasts if pair.category == kind]
    assert len(found) > 5
    return found


def test_kinds_take_turns_and_the_better_one_is_first_in_about_half(contrasts):
    assert len(contrasts) == 72 and len({pair.id for pair in contrasts}) == 72
    counts = Counter(pair.category for pair in contrasts)
    assert set(counts) == set(KINDS) and max(counts.values()) - min(counts.values()) <= 1
    assert 20 <= sum(pair.human == 1 for pair in contrasts) <= 40
    keys = [(pair.prompt, *sorted((pair.response_1, pair.response_2))) for pair in contrasts]
    assert len(set(keys)) == len(keys)


def test_the_better_one_is_a_response_up_to_its_last_sentence(contrasts):
    known = {complete(text) for pair in PAIRS for text in (pair.response_1, pair.response_2)}
    for pair in contrasts:
        if pair.category != "constraint":
            assert split(pair)[0] in known


def test_another_prompts_answer_is_about_as_long(contrasts):
    answers = {}
    for pair in PAIRS:
        for text in (pair.response_1, pair.response_2):
            answers.setdefault(complete(text), set()).add(prompt_key(pair.prompt))
    for pair in of_kind(contrasts, "other_prompt"):
        good, bad = split(pair)
        assert answers[bad] - {prompt_key(pair.prompt)} and abs(len(good) - len(bad)) < 60


def test_what_is_cut_off_ends_within_a_sentence_and_may_be_longer(contrasts):
    longer = []
    for pair in of_kind(contrasts, "cut_off"):
        good, bad = split(pair)
        assert bad[-1] not in ".!?" and (good.startswith(bad) or bad.startswith(good))
        longer.append(len(bad) > len(good))
    assert {True, False} == set(longer)


def test_what_loops_says_a_few_words_again_and_again_and_is_as_long(contrasts):
    for pair in of_kind(contrasts, "looping"):
        good, bad = (response.split() for response in split(pair))
        assert len(bad) == len(good) and bad != good
        begins = next(i for i, (one, other) in enumerate(zip(good, bad, strict=True)) if one != other)
        period = next(n for n in range(2, begins + 1) if bad[begins:] == bad[begins - n : -n])
        assert good[:begins] == bad[:begins] and 3 * period <= len(good)


def test_what_is_shuffled_has_the_same_words(contrasts):
    for pair in of_kind(contrasts, "shuffled"):
        good, bad = split(pair)
        assert good != bad and Counter(good.split()) == Counter(bad.split())


def test_what_is_substituted_has_words_of_other_prompts_in_the_places_of_some(contrasts):
    said = {pair.prompt: f"{pair.response_1} {pair.response_2}".split() for pair in PAIRS}
    for pair in of_kind(contrasts, "substituted"):
        good, bad = (response.split() for response in split(pair))
        others = {word for prompt, words in said.items() if prompt != pair.prompt for word in words}
        changed = [new for old, new in zip(good, bad, strict=True) if old != new]
        assert changed and set(changed) <= others and len(changed) <= len(good) / 2


def test_a_constraint_is_added_to_the_prompt_and_one_response_keeps_it(contrasts):
    asked = Counter()
    for pair in of_kind(contrasts, "constraint"):
        good, bad = split(pair)
        base = next(p.prompt for p in PAIRS if pair.prompt.startswith(p.prompt + " "))
        one = pair.prompt.removeprefix(base).strip() in (
            "Answer in one sentence.", "Use a single sentence.", "Reply with one sentence only.",
        )  # fmt: skip
        asked[one] += 1
        assert (len(sentences(good)) == 1, len(sentences(bad)) == 1) == (one, not one)
    assert asked[True] and asked[False]


def test_the_same_seed_makes_the_same_contrasts_and_another_makes_others(contrasts):
    assert make_contrasts(PAIRS, KINDS, 72, seed=5) == contrasts
    assert make_contrasts(PAIRS, KINDS, 72, seed=4) != contrasts


def test_responses_too_short_for_a_contrast_yield_none_and_none_is_made_twice():
    assert make_contrasts([Pair("a", "What?", "Yes.", "No, never")], KINDS, 10, seed=0) == []
    few = make_contrasts(PAIRS[:2], KINDS, 1000, seed=0)
    assert 5 < len(few) <= 4 * len(KINDS)


def test_a_conversation_gets_no_constraint():
    turns = [{"role": "user", "content": "Tell me about bees"}]
    pairs = [Pair("c", turns, TEXTS[0], TEXTS[1]), Pair("d", "And trains", TEXTS[2], TEXTS[3])]
    found = make_contrasts(pairs, ["constraint", "looping"], 20, seed=0)
    assert {pair.category for pair in found if pair.prompt == turns} == {"looping"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Fo", "One. Two! Three?"),
        ('He said "no." Then he left. And', 'He said "no." Then he left.'),
        ("It costs 3.50 euros. Tha", "It costs 3.50 euros."),
        ("1. Eggs\n2. Milk\n3. Br", ""),
        ("no end at all", ""),
        ("你好。再见", "你好。"),
    ],
)
def test_complete_stops_at_the_last_sentences_end(text, expected):
    assert complete(text) == expected
