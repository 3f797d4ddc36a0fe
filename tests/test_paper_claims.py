"""Statistics for the measurements of the papers' claims: intervals, verdicts, and the sample size that decides."""

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "papers"))
import claims


def with_effect(effect, n=6):
    """Differences with a mean of ``effect`` standard deviations."""
    values = np.random.default_rng(0).normal(size=n)
    return (values - values.mean()) / values.std(ddof=1) + effect


@pytest.mark.parametrize(("effect", "word"), [(3.0, "supported"), (-3.0, "contradicted"), (0.4, "undecided")])
def test_a_verdict_is_that_of_the_t_test(effect, word):
    differences = with_effect(effect)
    found, test = claims.verdict("", differences), stats.ttest_1samp(differences, 0)
    assert found.word == word and (test.pvalue < 0.05) == (word != "undecided")
    interval = test.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-12)


# From standard tables of sample sizes for the paired t-test: two-sided 5% and a power of 80%.
@pytest.mark.parametrize(("effect", "needed"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_how_many_would_decide(effect, needed):
    assert claims.verdict("", with_effect(effect, 5)).needed == needed


@pytest.mark.parametrize(
    ("differences", "word"),
    [([0.01, -0.01, 0.02, -0.02], "supported"), ([0.3, 0.31, 0.29, 0.3], "contradicted"), ([0.3, -0.3], "undecided")],
)
def test_two_are_alike_if_the_whole_interval_says_so(differences, word):
    assert claims.verdict("", differences, within=0.1).word == word


def test_one_measurement_decides_nothing():
    found = claims.verdict("", [5.0])
    assert found.word == "undecided" and found.needed is None and "inf" not in found.line()


def test_equal_differences_decide_nothing():
    """18 of 253 pairs with both seeds once gave an interval of zero width, and a verdict."""
    found = claims.verdict("", [18 / 253, 18 / 253])
    assert found.word == "undecided" and found.needed is None and "inf" not in found.line()


def test_differences_are_of_prompts():
    ours = [
        {"p": 0.9, "human": 1, "prompt": "a"},
        {"p": 0.2, "human": 1, "prompt": "a"},
        {"p": 0.1, "human": 2, "prompt": "b"},
    ]
    theirs = [row | {"p": 0.4} for row in ours]
    assert claims.by_prompt(ours, theirs) == [0.5, 0.0]
    with pytest.raises(ValueError, match="not of the same pairs"):
        claims.by_prompt(ours, theirs[1:])


def test_a_part_is_measured_once(tmp_path):
    parts = iter([{"p": 0.25}])
    assert [claims.stored(tmp_path, "seed 1, plain", next, parts) for _ in range(2)] == [{"p": 0.25}] * 2


def test_parts_that_were_measured_with_other_options_are_refused(tmp_path, monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["x.py", "--runs", str(tmp_path), *words])
        parser = claims.arguments("", "x")
        parser.add_argument("--updates", type=int, default=80)
        return claims.parsed(parser)

    call("--seeds", "1")
    assert call("--seeds", "5").seeds == 5
    with pytest.raises(SystemExit):
        call("--updates", "3")
    assert "measured with other options" in capsys.readouterr().err


def test_the_command_names_no_folder_of_this_machine(monkeypatch, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.touch()
    words = ["rlaif.py", str(data), "--seeds", "3", "--runs", str(tmp_path), "--output", str(tmp_path / "page.md")]
    monkeypatch.setattr(sys, "argv", words)
    assert claims._command() == "python benchmarks/papers/rlaif.py pairs.jsonl --seeds 3"
