"""The installed TRL is checked before anything is imported from it, and only where it is needed."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from trl_rlaif import UserError
from trl_rlaif.compat.trl_version import LOWEST, TOO_HIGH, check_trl

pytestmark = pytest.mark.trl


@pytest.mark.parametrize("version", ["1.12.0", "1.12.0.dev0", "1.16.0", "1.100.1"])
def test_what_works_passes(version):
    check_trl(version)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("0.9.6", "trl 0.9.6 is installed, which is too old"),
        ("1.11.1", "trl 1.11.1 is installed, which is too old"),
        ("2.0.0.dev0", "versions below 2"),
        ("2.3.0", "versions below 2"),
    ],
)
def test_what_does_not_work_is_refused_with_the_command_that_helps(version, message):
    with pytest.raises(UserError, match=message) as error:
        check_trl(version)
    assert "pip install 'trl>=1.12,<2'" in str(error.value)


def test_without_trl(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(UserError, match="trl is not installed"):
        check_trl()


def test_the_package_asks_for_the_same_versions():
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r'"trl(>=[^"]*)"', text) == [f">={LOWEST},<{TOO_HIGH}"]


@pytest.mark.parametrize("name", ["PPOTrainer", "PPOConfig", "RewardTrainer", "RewardConfig"])
def test_it_is_checked_before_trl_is_imported(name):
    script = f"""
import sys
from importlib import metadata
import trl_rlaif
metadata.version = lambda package: "1.4.0"
try:
    trl_rlaif.{name}
except trl_rlaif.UserError as error:
    print(error)
print("trl" in sys.modules, "torch" in sys.modules)
"""
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert "trl 1.4.0 is installed, which is too old" in output
    assert output.endswith("False False\n")
