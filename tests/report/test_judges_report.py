"""The report on several judges: their win rates, their agreement, and warnings."""

from __future__ import annotations

import pytest
from helpers.recipes import write_rows
from helpers.report_pages import HOSTILE, assert_only_our_script, make_run, part, read, set_results

from trl_rlaif.rating import read_comparisons
from trl_rlaif.report.label_data import MAX_LABELED
from trl_rlaif.report.parsing import Turn
from trl_rlaif.report.run_data import Sample
from trl_rlaif.report.warnings import length_correlation

pytestmark = pytest.mark.usefixtures("drawn")

LARGE = {
    "judge": "org/large", "win_rate": 0.3, "interval": [0.2, 0.41], "wins": 12, "ties": 0, "losses": 26, "unjudged": 2,
    "length_controlled": {"win_rate": 0.25, "interval": [0.15, 0.36]},
}  # fmt: skip
AGREEMENT = {
    "all": {"rate": 0.55, "interval": [0.4, 0.69], "kappa": 0.12, "kappa_interval": [-0.1, 0.3], "n": 38},
    "pairs": [
        {
            "judges": ["judge", "large"],
            "agreement": {"rate": 0.55, "interval": [0.4, 0.69], "kappa": -1e-16, "kappa_interval": None, "n": 38},
        }
    ],
}
SECTION = ("Win rates by judge", "Reward on held-out prompts, before and after")


@pytest.fixture
def folder(tmp_path):
    """A run without plots, which are slow."""
    folder = make_run(tmp_path / "run")
    for name in ("labels", "metrics", "samples"):
        (folder / f"{name}.jsonl").unlink()
    return folder


def set_judges(folder, **numbers):
    set_results(folder, lambda results: results["evaluate"]["sets"]["held-out"].update(numbers))


# ---- Table ----------------------------------------------------------------------------------------------


def test_one_judge_without_more_is_one_row(folder):
    text = part(read(folder), *SECTION)
    assert "judge judge-b 63.7% 54.8% to 71.7% 160 " in text
    assert "equal length" not in text and "kappa" not in text.split("Fraction of prompts")[0]


def test_every_judge_has_its_row_and_its_agreement(folder):
    set_judges(
        folder, judges={"large": LARGE, "mute": {"judge": "org/mute", "unjudged": 40}}, judge_agreement=AGREEMENT
    )
    page = read(folder)
    text = part(page, *SECTION)
    assert "judge judge-b 63.7%" in text
    assert "large org/large 30.0% 20.0% to 41.0% 25.0% 15.0% to 36.0% 38 2" in text
    assert "mute" not in text, "it has no win rate"
    assert "all judges agree 55.0% of 38 pairs (interval 40.0% to 69.0%), Fleiss' kappa 0.12" in text
    assert "judge and large 55.0% 40.0% to 69.0% 0.00 38" in text
    drawn = [a["aria-label"] for tag, a in page.elements if tag == "svg"]
    assert "Win rate on held-out, by judge: judge 63.7%; large 30.0%" in drawn


def test_lengths_and_harmlessness_are_told(folder):
    sides = {"start": {"rate": 0.9, "interval": [0.8, 0.95]}, "trained": {"rate": 0.6, "interval": [0.5, 0.7]}}
    set_judges(folder, lengths={"ratio": 1.25, "ratio_interval": [1.1, 1.4], "longer": 0.7}, harmless=sides)
    page = read(folder)
    text = part(page, *SECTION)
    assert "1.25× (interval 1.10 to 1.40)" in text and "longer response by the trained policy 70.0%" in text
    assert "harmless, initial policy 90.0% (interval 80.0% to 95.0%) harmless, trained policy 60.0%" in text
    assert "less harmless: 90.0% were harmless before training, 60.0% after it" in page.text


@pytest.mark.parametrize(
    "odd", [3, [1], {"judges": [3]}, {"all": {"rate": "x"}, "pairs": {"a": 1}}, {"pairs": [4, {}]}]
)
def test_other_shapes_do_not_stop_the_report(folder, odd):
    set_judges(folder, judges=odd, judge_agreement=odd, lengths=odd, harmless=odd, length_controlled=odd)
    assert "judge judge-b 63.7%" in part(read(folder), *SECTION)


def test_people_are_one_more_row(folder):
    rows = [
        {"set": "held-out", "id": str(i), "prompt": f"Hi {i}", "start": f"a{i}", "trained": f"b{i}", "p_trained": 0.9}
        for i in range(20)
    ]
    write_rows(folder / "samples.jsonl", rows)
    votes = [
        {"set": c.set, "id": c.name[1], "pair": c.name[2], "rater": rater, "choice": 1 if i < 15 else 0, "time": ""}
        for rater in ("ann", "bob")
        for i, c in enumerate(read_comparisons(folder)[:19])
    ]
    write_rows(folder / "votes.jsonl", votes)
    page = read(folder)
    text = part(page, *SECTION)
    assert "people 2 raters 78.9%" in text and "19 1" in text
    assert "people and judge 78.9%" in text
    assert "does not clearly agree with people" not in page.text
    write_rows(folder / "votes.jsonl", [row | {"choice": 1 - row["choice"]} for row in votes])
    page = read(folder)
    assert (
        "the judge does not clearly agree with people beyond chance: it makes the same choice in 21.1% of 19 pairs"
        in page.text
    )
    assert "preferred by judge, the initial policy by people" in page.text


def test_votes_that_cannot_be_read_are_noted(folder):
    (folder / "votes.jsonl").write_text("{}\n")
    text = read(folder).text
    assert "The human votes could not be counted: This run has no samples.jsonl" in text
    assert str(folder) not in text


# ---- Warnings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("controlled", "said"),
    [
        ({"win_rate": 0.52, "interval": [0.4, 0.63]}, "the preference is no longer clear"),
        ({"win_rate": 0.53, "interval": [0.51, 0.6]}, "the preference is weaker"),
        ({"win_rate": 0.62, "interval": [0.53, 0.7]}, ""),
        ({"win_rate": 0.7, "interval": [0.49, 0.8]}, ""),
        (None, ""),
    ],
)
def test_a_preference_that_length_bought_is_told(folder, controlled, said):
    set_judges(folder, length_controlled=controlled)
    text = read(folder).text
    assert (said in text) if said else "is largely due to length" not in text


def test_judges_that_disagree_are_told(folder):
    set_judges(folder, judges={"large": LARGE}, judge_agreement=AGREEMENT)
    text = read(folder).text
    assert (
        "contradict each other on held-out: the trained policy is preferred by judge, the initial policy by large"
        in text
    )
    assert "The judges hardly agree on held-out: they make the same choice in 55.0% of 38 pairs" in text
    good = {"all": AGREEMENT["all"] | {"kappa": 0.6}}
    set_judges(folder, judges={"large": LARGE | {"win_rate": 0.7, "interval": [0.6, 0.8]}}, judge_agreement=good)
    text = read(folder).text
    assert "contradict" not in text and "hardly agree" not in text


def sample(length, reward):
    texts = Turn("", "x" * min(length, 4000), max(length - 4000, 0))
    return Sample("s", "", [], Turn("", "", 0), texts, None, reward, None, [])


def test_a_reward_that_goes_with_length_is_told(folder):
    assert length_correlation([sample(3900 + 20 * i, i * i) for i in range(20)]) == pytest.approx(1)
    assert length_correlation([sample(i, -i) for i in range(20)]) == pytest.approx(-1)
    assert length_correlation([sample(i, i) for i in range(19)]) is None, "too few"
    assert length_correlation([sample(5, i) for i in range(30)]) is None
    for direction, exploited in ((1, True), (-1, False)):
        rows = [
            {"set": "held-out", "prompt": "Hi", "start": "a", "trained": "b" * i, "reward_trained": direction * i}
            for i in range(1, 25)
        ]
        write_rows(folder / "samples.jsonl", rows)
        set_judges(folder, tokens_start=20, tokens_trained=60)
        text = read(folder).text
        assert "3.0 times as long" in text
        assert ("The reward correlates with length (rank correlation 1.00)" in text) == exploited


# ---- Labels and RL --------------------------------------------------------------------------------------


def test_labeled_pairs_show_what_the_judge_wrote(folder):
    pairs = [
        {"id": i, "prompt": f"prompt-{i}.", "response_1": "yes", "response_2": "no", "human": 1 + i % 2}
        for i in range(100)
    ]
    labels = [
        {"id": i, "p": 0.8, "p_12": 0.9, "p_21": 0.7, "rationale_12": HOSTILE, "rationale_21": ["one", "two"]}
        for i in range(100)
    ]
    write_rows(folder / "pairs.jsonl", pairs)
    write_rows(folder / "labels.jsonl", labels)
    page = read(folder)
    text = part(page, "Labels of the judge", "Reward model")
    assert sum("labeled" in (a.get("class") or "") for tag, a in page.elements if tag == "article") == MAX_LABELED
    assert f"{MAX_LABELED} labeled pairs, with rationales Evenly spaced over all 100 labels" in text
    assert "p(1) = 0.90 when shown first, 0.70 when shown second people prefer response 1" in text
    assert "3 rationales In the order 1-2 <script>alert(1)</script>" in text
    assert "the first response is response 2 one In the order 2-1" in text
    said = [a["aria-label"] for tag, a in page.elements if tag == "svg"]
    assert "Agreement of people with the label, by its confidence, on 100 pairs" in said
    assert_only_our_script(page)


def test_score_is_drawn_over_kl_where_both_were_logged(folder):
    rows = [{"stage": "rl", "step": s, "objective/scores": 0.5 * s, "objective/kl": 2.0 * s} for s in range(1, 4)]
    rows += [{"stage": "rl", "step": 9, "objective/scores": 70.0}]
    write_rows(folder / "metrics.jsonl", rows)
    assert "Score versus KL score 0.50 → 1.50, KL 2.00 → 6.00" in read(folder).text
    write_rows(folder / "metrics.jsonl", rows[:1] + rows[3:])
    assert "Score versus KL" not in read(folder).text
