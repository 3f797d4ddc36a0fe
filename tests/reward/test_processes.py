"""Two processes with different numbers of forward passes train a reward model as one process does."""

from __future__ import annotations

import pytest
import torch
from helpers import reward_processes
from helpers.processes import fork

from trl_rlaif.reward import scoring

pytestmark = [pytest.mark.trl, pytest.mark.slow]


@pytest.mark.parametrize("layout", ["rows", "groups"])
def test_two_processes_train_as_one(tmp_path, layout, monkeypatch):
    monkeypatch.setattr(scoring, "_reads_rows", scoring._reads_rows)  # to restore what `run` replaces
    one = reward_processes.run(tmp_path / "one", batch=4, rows=layout == "rows")
    two = fork(reward_processes.__file__, tmp_path, layout)
    assert any(a != b for a, b in zip(two[0]["forwards"], two[1]["forwards"], strict=True))
    assert len(one["losses"]) == 6 and len(one["factors"]) == 2
    assert two[0]["losses"] == pytest.approx(one["losses"], rel=1e-4)
    for result in two:
        assert result["factors"] == pytest.approx(one["factors"])
        assert result["parameters"].keys() == one["parameters"].keys()
        for name, value in one["parameters"].items():
            torch.testing.assert_close(result["parameters"][name], value, rtol=1e-3, atol=1e-4)
