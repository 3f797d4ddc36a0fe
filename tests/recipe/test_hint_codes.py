"""The types of config fields validate the same values after a round trip through JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import TypeAdapter

from trl_rlaif.algorithms import ALGORITHMS
from trl_rlaif.recipe.hint_codes import coded, decoded
from trl_rlaif.recipe.trl_fields import CONFIG_CLASSES, config_hints, strict_hint

SECTIONS = [(section, None) for section in CONFIG_CLASSES] + [("rl", name) for name in ALGORITHMS]


@pytest.mark.parametrize(("section", "algorithm"), SECTIONS)
def test_every_field_checks_the_same_values(section, algorithm):
    hints = config_hints(section, algorithm)
    assert sum(hint is not Any for hint in hints.values()) > 50
    for name, hint in hints.items():
        again = decoded(json.loads(json.dumps(coded(hint))))
        assert _schema(again) == _schema(hint), name


def _schema(hint: Any) -> Any:
    return TypeAdapter(strict_hint(hint)).json_schema()
