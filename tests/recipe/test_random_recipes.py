"""Small random recipes that `check` accepts run to the end on a tiny model or fail with a UserError.

``benchmarks/fuzz.py runs`` does the same with many more.
"""

from __future__ import annotations

import random

from helpers.random_recipes import BAD, outcome_of, write_random_recipe, write_sources

ACCEPTED = 5


def test_whatever_is_accepted_runs_or_says_why_not(tmp_path):
    sources, found = write_sources(tmp_path / "sources"), []
    while len([one for one in found if one["outcome"] != "refused"]) < ACCEPTED:
        folder = tmp_path / str(len(found))
        folder.mkdir()
        found.append(outcome_of(write_random_recipe(random.Random(f"test {len(found)}"), sources, folder)))
    assert [(number, one) for number, one in enumerate(found) if one["outcome"] in BAD] == []
    assert "ran" in {one["outcome"] for one in found}
