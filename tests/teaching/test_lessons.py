"""Lesson: the loss of a label given the known preference or ratings of its pair, against scipy."""

import numpy as np
import pytest
from scipy.special import rel_entr
from scipy.stats import entropy

from trl_rlaif import Label
from trl_rlaif.teaching import Lesson
from trl_rlaif.testing import make_pairs

PAIR = make_pairs()[0]
KNOWN, SAID = np.random.default_rng(0).dirichlet([0.3] * 10, (2, 2))


def test_the_loss_on_ratings_is_their_cross_entropy_whatever_p_says():
    label = Label(PAIR.id, p=0.9, ratings_1=SAID[0].tolist(), ratings_2=SAID[1].tolist())
    lesson = Lesson(PAIR, 0.2, "labels", (KNOWN[0].tolist(), KNOWN[1].tolist()))
    expected = (entropy(KNOWN, axis=1) + rel_entr(KNOWN, SAID).sum(1)).mean()
    assert lesson.loss(label) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("ratings", [{}, {"ratings_1": SAID[0].tolist(), "ratings_2": SAID[1].tolist()}])
def test_without_ratings_it_is_that_of_p(ratings):
    loss = Lesson(PAIR, 0.2, "people").loss(Label(PAIR.id, p=0.7, **ratings))
    assert loss == pytest.approx(entropy([0.2, 0.8]) + rel_entr([0.2, 0.8], [0.7, 0.3]).sum(), rel=1e-12)


def test_a_judge_that_is_certain_and_wrong_has_a_finite_loss():
    assert Lesson(PAIR, 1.0, "people").loss(Label(PAIR.id, p=0.0)) == pytest.approx(9 * np.log(10))
    assert Lesson(PAIR, 1.0, "people").loss(Label(PAIR.id, p=1.0)) == 0.0
