"""Every row of docs/correctness.md is within its limit, and the page shows these rows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # last: modules there share names with folders here

from exactness import CHECKS  # noqa: E402


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.difference.__name__)
def test_a_formula_is_computed_exactly(check):
    assert check.difference() <= check.limit


def test_the_page_shows_every_formula():
    page = (ROOT / "docs" / "correctness.md").read_text(encoding="utf-8")
    for check in CHECKS:
        assert check.formula in page.replace("\\|", "|")
