"""Results that commands remember between calls: until a package changes, never failures, and never causing one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from helpers.recipes import write_recipe

from trl_rlaif import remembered as module
from trl_rlaif.cli import app
from trl_rlaif.errors import UserError
from trl_rlaif.remembered import remembered

HEAVY = ("torch", "transformers", "trl", "datasets", "accelerate", "peft", "sklearn", "scipy.stats", "matplotlib")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "cache_dir", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "remembered.json"


def test_an_answer_is_found_once(cache):
    assert remembered("question", lambda: {"a": [1, None]}) == {"a": [1, None]}
    assert remembered("question", lambda: pytest.fail("asked again")) == {"a": [1, None]}
    assert remembered("another", lambda: 2) == 2
    assert remembered("question", lambda: pytest.fail("forgotten")) == {"a": [1, None]}


def test_it_is_found_again_once_a_package_is_installed(cache, tmp_path, monkeypatch):
    assert remembered("question", lambda: 1) == 1
    (tmp_path / "packages" / "trl-99.0.dist-info").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "packages")])
    assert remembered("question", lambda: 2) == 2


def test_neither_none_nor_an_error_is_kept(cache):
    def fail():
        raise ValueError

    with pytest.raises(ValueError):
        remembered("question", fail)
    assert remembered("question", lambda: None) is None
    assert remembered("question", lambda: 3) == 3


@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
def test_a_damaged_cache_is_begun_anew(cache, content):
    cache.parent.mkdir()
    cache.write_text(content, encoding="utf-8", errors="surrogateescape")
    assert remembered("question", lambda: 1) == 1
    assert remembered("question", lambda: 2) == 1


def test_a_cache_that_cannot_be_written_costs_time_alone(cache):
    cache.parent.write_text("a file where the folder should be")
    assert remembered("question", lambda: 1) == 1
    assert remembered("question", lambda: 2) == 2


def test_the_oldest_answers_go(cache, monkeypatch):
    monkeypatch.setattr(module, "_MOST", 2)
    for question in "abc":
        remembered(question, lambda: 1)
    assert [remembered(question, lambda: 2) for question in "bca"] == [1, 1, 2]


def test_a_recipe_that_passed_is_checked_without_a_heavy_library(tmp_path, tiny_model, monkeypatch):
    recipe = write_recipe(tmp_path, tiny_model)
    monkeypatch.setattr(module, "cache_dir", lambda: tmp_path)
    app(["check", str(recipe)], standalone_mode=False)
    code = (
        f"import sys; sys.argv = ['trl-rlaif', 'check', {str(recipe)!r}]\n"
        "from trl_rlaif.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    environment = os.environ | {"TRL_RLAIF_CACHE": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert ": good." in ended.stdout and ended.stdout.strip().endswith("[]"), ended


def test_settings_that_were_refused_are_refused_again(tmp_path, tiny_model, cache):
    recipe = write_recipe(tmp_path, tiny_model, rl={"lr_scheduler_kwargs": {"unknown": 1}})
    for _ in range(2):
        with pytest.raises(UserError, match="unknown"):
            app(["check", str(recipe)], standalone_mode=False)
