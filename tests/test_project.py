"""The project's claims: its Python versions are those of CI, and its run folder format is the documented one."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

from trl_rlaif.pipeline.artifacts import FORMAT

ROOT = Path(__file__).resolve().parents[1]
JOBS = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_python_versions_are_those_that_ci_runs():
    run = JOBS["test"]["strategy"]["matrix"]["python"]
    assert PROJECT["requires-python"] == f">={run[0]}"
    named = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", name) for name in PROJECT["classifiers"]]
    assert [found.group(1) for found in named if found] == run
    for page in ("README.md", "docs/installation.md", "docs/faq.md"):
        assert f"Python {run[0]} to {run[-1]}" in (ROOT / page).read_text(encoding="utf-8")


def test_the_format_of_run_folders_is_the_one_that_is_promised():
    assert f"now {FORMAT}." in (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
