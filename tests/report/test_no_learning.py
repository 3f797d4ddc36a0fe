"""Signs that a run learned nothing: the report starts with them, and shows none for a run that learned."""

from __future__ import annotations

import json

import pytest
from helpers.report_pages import make_run, read, set_results

from trl_rlaif.evaluation import length_preference
from trl_rlaif.report.no_learning import signs_of_no_learning
from trl_rlaif.report.run_data import read_run

UPDATES = 12


def log(folder, **series):
    """Adds rl metrics of 12 updates; a single number is used for each."""
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for step in range(1, UPDATES + 1):
            row = {name: value[step - 1] if isinstance(value, list) else value for name, value in series.items()}
            file.write(json.dumps({"stage": "rl", "step": step, **row}) + "\n")


def signs(folder):
    return signs_of_no_learning(read_run(folder))


def test_a_run_that_learned_has_none(tmp_path):
    folder = make_run(tmp_path / "run")
    log(folder, **{"rollout/ended": 0.4, "rollout/distinct": 200, "frac_reward_zero_std": 0.3})
    assert signs(folder) == []
    assert "learned nothing" not in read(folder).text


@pytest.mark.parametrize(
    ("series", "said"),
    [
        ({"rollout/ended": [0.9] * 7 + [0.05] * 5}, "Only 5.0% of the responses in rl ended with a stop token"),
        ({"rollout/distinct": 1}, "1 distinct response among the 320 per update"),
        ({"rollout/distinct": 31}, "31 distinct responses among the 320 per update"),
        ({"frac_reward_zero_std": 0.95}, "In 95.0% of the groups, all responses have the same reward"),
        ({"objective/kl": 0.0}, "its KL to the reference stayed below 0.001 nats"),
        ({"objective/kl": [0.0, 5e-4, -5e-4] * 4}, "its KL to the reference stayed below 0.001 nats"),
    ],
)
def test_each_metric_is_judged_at_its_end(tmp_path, series, said):
    folder = make_run(tmp_path / "run")
    log(folder, **series)
    assert [said in sign for sign in signs(folder)] == [True]
    text = read(folder).text
    # Before the results themselves.
    assert 0 < text.index(said) < text.index("the mean reward rose")


@pytest.mark.parametrize(
    ("series", "flat"),
    [
        ({"objective/scores": 0.3}, True),
        ({"objective/scores": [0.1, -0.1] * 6}, True),
        ({"objective/scores": [-0.1 * step for step in range(12)]}, True),
        # Least squares over 12 updates: 0.02 per step under this noise of 0.05 is 5 standard errors.
        ({"objective/scores": [0.02 * step + 0.05 * (-1) ** step for step in range(12)]}, False),
        # A regulator keeps the mean of the transformed scores at 0 while the reward model's own scores rise.
        ({"objective/scores": 0.0, "score/model": [0.1 * step for step in range(12)]}, False),
    ],
)
def test_a_flat_reward(tmp_path, series, flat):
    folder = make_run(tmp_path / "run")
    log(folder, **series)
    set_results(folder, lambda r: r["evaluate"]["sets"]["held-out"]["reward_gain"].update(interval=[-0.1, 0.2]))
    assert [sign.startswith("The reward did not clearly rise") for sign in signs(folder)] == [True] * flat


def test_a_rise_on_held_out_prompts_counts(tmp_path):
    folder = make_run(tmp_path / "run")
    log(folder, **{"objective/scores": 0.3})
    assert signs(folder) == []  # the mean reward on held-out prompts rose


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r["label"].update(mean_confidence=0.52), "their mean confidence is 52.0% (50% is a coin flip)"),
        (lambda r: r["reward"].update(accuracy_interval=[0.45, 0.8]), "not clearly better than chance"),
        (lambda r: r["reward"].update(accuracy_interval=[0.2, 0.45]), "against their labels (accuracy 20.0% to 45.0%)"),
        (lambda r: r["sample"].update(ended=0.02), "Only 2.0% of the responses in sample ended with a stop token"),
        (
            lambda r: r["label"].update(
                length_preference={"judge": 0.75, "people": 0.5, "interval": [0.1, 0.4], "n": 80}
            ),
            "it prefers the longer response in 75.0% of 80 pairs, people in 50.0%",
        ),
        (
            lambda r: r["label"].update(
                length_preference={"judge": 0.3, "people": 0.6, "interval": [-0.4, -0.2], "n": 80}
            ),
            "it prefers the shorter response in 70.0% of 80 pairs, people in 40.0%",
        ),
    ],
)
def test_each_result_is_judged(tmp_path, change, said):
    folder = make_run(tmp_path / "run")
    set_results(folder, change)
    assert [said in sign for sign in signs(folder)] == [True]


def test_a_length_preference_within_chance_is_none(tmp_path):
    folder = make_run(tmp_path / "run")
    found = {"judge": 0.75, "people": 0.5, "interval": [-0.05, 0.5], "n": 8}
    set_results(folder, lambda r: r["label"].update(length_preference=found))
    assert signs(folder) == []


def test_length_preference():
    p, human = [0.9, 0.2, 0.5, 0.8, 0.9, 0.7], [1, 2, 1, 0, None, 2]
    lengths = [(9, 3), (3, 9), (9, 3), (3, 9), (9, 3), (5, 5)]
    found = length_preference(p, human, lengths)
    # The judge: longer, longer, neither, shorter. People: longer, longer, longer, neither.
    assert (found["judge"], found["people"], found["n"]) == (2.5 / 4, 3.5 / 4, 4)
    low, high = found["interval"]
    assert -0.5 <= low < -0.25 < high <= 0
    assert length_preference(p, [None] * 6, lengths) is None
