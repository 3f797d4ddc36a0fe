"""Pairs from scored responses, and from responses labeled good or bad."""

import pytest

from trl_rlaif.data import load_pairs, load_prompts
from trl_rlaif.errors import UserError


def fails(source, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        load_pairs(source, **kwargs)
    return str(caught.value)


def preferred(pair):
    """(better, worse); for a tie, both in alphabetical order and a third entry."""
    if pair.human == 0:
        return (*sorted((pair.response_1, pair.response_2)), "tie")
    return (pair.response_1, pair.response_2) if pair.human == 1 else (pair.response_2, pair.response_1)


def kto(prompt, completion, label, **more):
    return {"prompt": prompt, "completion": completion, "label": label, **more}


# Good and bad responses


def test_rows_of_one_prompt_pair_up_and_the_rest_is_counted(write):
    path = write(
        kto("Q", "good 1", True, id="g", source="s"),
        kto("R", "bad R", False),
        kto("Q", "good 2", True),
        kto("Q", "bad 1", False, id="b"),
        kto("R", "good R", True),
        kto("Q", "good 3", True),
        kto("S", "good S", True),
    )
    loaded = load_pairs(path)
    assert [(pair.id, pair.prompt, preferred(pair)) for pair in loaded.items] == [
        ("g", "Q", ("good 1", "bad 1")),
        ("f-5", "R", ("good R", "bad R")),
    ]
    assert loaded.items[0].extra == {"source": "s"}
    assert loaded.skip_counts() == {"no row of the same prompt with the other label": 3}
    assert [skip.where for skip in loaded.skipped] == [f"{path}:{line}" for line in (3, 6, 7)]


def test_messages_pair_up_too(write):
    user, says = {"role": "user", "content": "Q"}, lambda text: [{"role": "assistant", "content": text}]
    pair = load_pairs(write(kto([user], says("a"), 0), kto([user], says("b"), 1))).items[0]
    assert pair.prompt == [user] and preferred(pair) == ("b", "a")


def test_a_csv_has_its_labels_as_text(tmp_path):
    path = tmp_path / "f.csv"
    path.write_text("prompt,completion,label\nQ,a,True\nQ,b,false\n")
    assert preferred(load_pairs(path).items[0]) == ("a", "b")


def test_rows_without_label_or_response_do_not_pair(write):
    rows = [kto("Q", "a", None), kto("Q", " ", True), kto("Q", "b", True), kto("Q", "c", False)]
    loaded = load_pairs(write(*rows))
    assert [preferred(pair) for pair in loaded.items] == [("b", "c")]
    assert loaded.skip_counts() == {"no label": 1, "empty response": 1}


@pytest.mark.parametrize("label", ["good", 2, [True], -1])
def test_other_labels_are_wrong(write, label):
    path = write(kto("Q", "a", True), kto("Q", "b", label))
    assert fails(path).startswith(f"{path}:2: 'label' is ")


def test_only_unpaired_rows(write):
    assert "All 2 rows were skipped" in fails(write(kto("Q", "a", True), kto("R", "b", False)))


# Scores


def test_all_pairs_of_scored_responses(write):
    path = write({"id": "x", "prompt": "Q", "responses": ["a", "b", "c"], "scores": [1, 3, 1], "source": "s"})
    loaded = load_pairs(path)
    assert [(pair.id, preferred(pair)) for pair in loaded.items] == [
        ("x-2-1", ("b", "a")),
        ("x-1-3", ("a", "c", "tie")),
        ("x-2-3", ("b", "c")),
    ]
    assert loaded.items[0].extra == {"source": "s", "score_chosen": 3.0, "score_rejected": 1.0}


def test_the_best_against_the_worst(write):
    path = write(
        {"prompt": "Q", "completions": ["a", "b", "c", "d"], "scores": [2, 3, 1, 3]},
        {"prompt": "R", "completions": ["a", "b"], "scores": [2, 2]},
    )
    items = load_pairs(path, scored="best_worst").items
    assert [(pair.id, preferred(pair)) for pair in items] == [("f-1-2-3", ("b", "c")), ("f-2-1-2", ("a", "b", "tie"))]


def test_ultrafeedback_as_it_was_published(write):
    completions = [
        {"model": "m1", "response": "a", "overall_score": 7.5, "fine-grained_score": 4.0},
        {"model": "m2", "response": "b", "overall_score": 8.5, "fine-grained_score": 4.5},
    ]
    pair = load_pairs(write({"source": "s", "instruction": "Q", "completions": completions})).items[0]
    assert (pair.prompt, preferred(pair)) == ("Q", ("b", "a"))
    assert pair.extra == {"source": "s", "score_chosen": 8.5, "score_rejected": 7.5}


def test_what_makes_no_pair_is_counted(write):
    path = write(
        {"prompt": "Q", "responses": ["a", "b", None], "scores": [1, 2, 3]},
        {"prompt": "Q", "responses": ["a", "a"], "scores": [1, 2]},
        {"prompt": "Q", "responses": ["a", "b"], "scores": [1, None]},
        {"prompt": "Q", "responses": None, "scores": None},
    )
    loaded = load_pairs(path)
    assert [preferred(pair) for pair in loaded.items] == [("b", "a")]
    assert loaded.skip_counts() == {
        "empty response": 2,
        "fewer than two responses with a score": 2,
        "responses are identical": 1,
    }


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"responses": ["a", "b"], "scores": [1]}, "'responses' holds 2 responses, and 1 scores"),
        ({"responses": ["a", "b"]}, "'scores' is null"),
        ({"responses": ["a", "b"], "scores": ["x", 1]}, "'scores' is \"x\""),
        ({"responses": "ab", "scores": [1, 2]}, "'responses' is a text"),
        ({"completions": [{"response": "a"}, {"response": "b"}]}, "no text with a score in entry 1 of 'completions'"),
        ({"responses": [1, 2], "scores": [1, 2]}, "is a number"),
    ],
)
def test_wrong_scores(write, row, part):
    path = write({"prompt": "Q", **row})
    message = fails(path)
    assert message.startswith(f"{path}:1: ") and part in message


# Together with other formats


def test_one_format_a_file(write):
    rows = [
        kto("Q", "a", True),
        {"prompt": "Q", "responses": ["a", "b"], "scores": [1, 2]},
        {"prompt": "Q", "chosen": "a", "rejected": "b"},
    ]
    for first in rows:
        for second in rows:
            if first is not second:
                assert "Mixed formats in one file" in fails(write(first, second))


def test_named_formats(write):
    both = {"prompt": "Q", "chosen": "a", "rejected": "b", "responses": ["c", "d"], "scores": [1, 2]}
    assert preferred(load_pairs(write(both), format="scored").items[0]) == ("d", "c")
    assert "no 'completion' and 'label'" in fails(write(both), format="kto")


def test_their_prompts_are_read_once(write):
    loaded = load_prompts(write(kto("Q", "a", True), kto("Q", "b", False), kto("R", "c", True)))
    assert [(prompt.prompt, prompt.extra) for prompt in loaded.items] == [("Q", {}), ("R", {})]
    assert loaded.skip_counts() == {"repeated prompt of a preference file": 1}
    path = write({"prompt": "Q", "responses": ["a", "b"], "scores": [1, 2], "source": "s"})
    assert load_prompts(path).items[0].extra == {"source": "s"}


def test_equal_scores_of_a_preference_file_are_a_tie(write):
    row = {"prompt": "Q", "chosen": "a", "rejected": "b"}
    scores = [(4, 4.0), (4, 3), (None, None), ("5", "5.0"), (4, None), (2, 3)]
    rows = [row | {"score_chosen": chosen, "score_rejected": rejected} for chosen, rejected in scores]
    assert [pair.human == 0 for pair in load_pairs(write(*rows)).items] == [True, False, False, True, False, False]
    assert "'score_chosen' is \"high\"" in fails(write(row | {"score_chosen": "high", "score_rejected": 1}))


def test_a_margin_is_a_number(write):
    row = {"prompt": "Q", "chosen": "a", "rejected": "b"}
    pairs = load_pairs(write(row | {"margin": 2}, row | {"margin": "0.5"}, row | {"margin": None}, row)).items
    assert [pair.extra for pair in pairs] == [{"margin": 2.0}, {"margin": 0.5}, {}, {}]
    assert "'margin' is true" in fails(write(row | {"margin": True}))
