"""Plots of any number of points."""

from __future__ import annotations

import pytest

from trl_rlaif.report.plots import score_over_kl


@pytest.mark.parametrize("count", [1, 2, 4, 7, 11])
def test_the_way_of_score_over_kl_is_drawn_whatever_its_length(drawn, count):
    """With four points the last one was 1.0000000000000002 strong, which matplotlib refuses."""
    assert score_over_kl([(0.1 * i, i % 3) for i in range(count)], "way") is not None
