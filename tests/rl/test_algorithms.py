"""Everything that the table of algorithms names exists."""

from __future__ import annotations

import dataclasses

import pytest

from trl_rlaif.algorithms import ALGORITHMS
from trl_rlaif.recipe import RlSection

pytestmark = pytest.mark.trl


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_is_runnable_and_its_keys_exist(name):
    from trl_rlaif.rl.ppo.config import PPOConfig

    algorithm, known = ALGORITHMS[name], {field.name for field in dataclasses.fields(PPOConfig)}
    assert RlSection(algorithm=name).algorithm == name
    assert callable(algorithm.runner())
    assert known >= {*algorithm.preset, *algorithm.renamed}
    if algorithm.config is not None:
        theirs = {field.name for field in dataclasses.fields(algorithm.config_class())}
        # RLOO has no epsilon in some TRL releases; a key that it lacks is reported as unused.
        assert theirs >= set(algorithm.renamed.values()) - {"epsilon"}
    PPOConfig("out", bf16=False, use_cpu=True, **algorithm.preset)


def test_an_unknown_one_is_refused():
    with pytest.raises(ValueError, match="rejection_sampling"):
        RlSection(algorithm="pro")
