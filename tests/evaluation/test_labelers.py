"""The calibration error against a plain loop, and the comparison of two labelers against scipy and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from trl_rlaif.evaluation import agreement, calibration_error, compare_agreement

# ---- Calibration error ----------------------------------------------------------------------------------


def plain_error(p, human, bins):
    """Guo et al. 2017, equation 3, bin by bin."""
    known = [(x, h) for x, h in zip(p, human, strict=True) if h in (1, 2)]
    total = 0.0
    for b in range(bins):
        low, high = 0.5 + b * 0.5 / bins, 0.5 + (b + 1) * 0.5 / bins
        inside = [(x, h) for x, h in known if low <= max(x, 1 - x) < high or (b == bins - 1 and max(x, 1 - x) == 1)]
        if not inside:
            continue
        right = sum(0.5 if x == 0.5 else float((x > 0.5) == (h == 1)) for x, h in inside) / len(inside)
        sure = sum(max(x, 1 - x) for x, _ in inside) / len(inside)
        total += len(inside) / len(known) * abs(right - sure)
    return total


@pytest.mark.parametrize("bins", [1, 4, 10, 15])
@pytest.mark.parametrize("seed", [0, 1])
def test_calibration_error_is_that_of_a_plain_loop(seed, bins):
    rng = np.random.default_rng(seed)
    p = [*rng.random(200), *rng.beta(0.2, 0.2, 100), 0.0, 1.0, 0.5]
    human = rng.choice([1, 2, 0, None], len(p)).tolist()
    found = calibration_error(p, human, bins=bins)
    assert found == pytest.approx(plain_error(p, human, bins), abs=1e-12)
    assert found > 0.1  # these labels are independent of the choices


def test_calibration_error_by_hand():
    # Of two labels with a confidence of 0.9, one is right; the label with 0.6 is right.
    assert calibration_error([0.9, 0.1, 0.6], [1, 1, 1]) == pytest.approx((2 * (0.9 - 0.5) + 1 * (1 - 0.6)) / 3)
    assert calibration_error([0.5, 0.5], [1, 2]) == 0.0
    assert calibration_error([1.0, 0.0], [1, 2]) == 0.0
    assert calibration_error([1.0, 0.0], [2, 1]) == 1.0
    assert calibration_error([0.7, 0.7], [0, None]) is None
    assert calibration_error([], []) is None


def test_calibration_error_does_not_care_which_response_is_called_the_first():
    rng = np.random.default_rng(5)
    p, human = rng.random(100).tolist(), rng.choice([1, 2], 100).tolist()
    swapped = calibration_error([1 - x for x in p], [3 - h for h in human])
    assert swapped == pytest.approx(calibration_error(p, human), abs=1e-12)


def test_calibration_error_goes_away_for_labels_that_are_right_as_often_as_they_say():
    rng = np.random.default_rng(6)
    p = rng.random(50_000)
    human = np.where(rng.random(50_000) < p, 1, 2).tolist()
    assert calibration_error(p.tolist(), human) < 0.01
    sharper = np.clip(2 * (p - 0.5) + 0.5, 0, 1)
    assert calibration_error(sharper.tolist(), human) > 0.1


def test_calibration_error_wants_a_choice_for_each_label():
    with pytest.raises(ValueError):
        calibration_error([0.5, 0.6], [1])


# ---- Two labelers ---------------------------------------------------------------------------------------


def by_hand(better, worse):
    """The exact McNemar test: a two-sided test of a fair coin on the pairs where the labelers disagree."""
    n = better + worse
    tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1)) / 2**n
    return min(1.0, 2 * tail)


def made(better, worse, both, neither):
    """Labels of two labelers, and human choices, with these counts."""
    p = [0.9] * better + [0.2] * worse + [0.8] * both + [0.1] * neither
    other = [0.3] * better + [0.7] * worse + [0.6] * both + [0.4] * neither
    return p, other, [1] * len(p)


@pytest.mark.parametrize("counts", [(8, 1, 5, 2), (1, 8, 5, 2), (5, 5, 0, 0), (20, 9, 100, 3), (1, 0, 0, 0)])
def test_compare_agreement_is_an_exact_mcnemar_test(counts):
    better, worse, *_ = counts
    p, other, human = made(*counts)
    found = compare_agreement(p, other, human)
    assert (found["better"], found["worse"], found["n"]) == (better, worse, sum(counts))
    assert found["difference"] == pytest.approx(agreement(p, human)["rate"] - agreement(other, human)["rate"])
    assert found["p_value"] == pytest.approx(by_hand(better, worse), rel=1e-12)
    assert found["p_value"] == binomtest(better, better + worse).pvalue


def test_compare_agreement_from_the_other_side():
    p, other, human = made(8, 1, 5, 2)
    one, back = compare_agreement(p, other, human), compare_agreement(other, p, human)
    assert one["difference"] == -back["difference"] == 7 / 16
    assert one["p_value"] == back["p_value"] == pytest.approx(2 * (1 + 9) / 2**9)


def test_compare_agreement_of_labelers_that_never_part():
    assert compare_agreement([0.9, 0.2], [0.6, 0.4], [1, 1]) == {
        "difference": 0.0, "better": 0, "worse": 0, "p_value": 1.0, "n": 2,
    }  # fmt: skip
    assert compare_agreement([], [], []) is None


def test_a_label_of_a_half_is_not_right():
    assert compare_agreement([0.9, 0.2], [0.5, 0.5], [1, 2])["better"] == 2
    assert compare_agreement([0.5], [0.5], [1])["p_value"] == 1.0


def test_compare_agreement_wants_a_choice_for_each_label():
    with pytest.raises(ValueError):
        compare_agreement([0.9, 0.1], [0.9], [1, 2])
    with pytest.raises(ValueError):
        compare_agreement([0.9, 0.1], [0.9, 0.1], [1])
