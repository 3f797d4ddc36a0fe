"""The command line: fast startup, exit codes, and errors as messages."""

from __future__ import annotations

import subprocess
import sys

import pytest

import trl_rlaif
from trl_rlaif import cli, progress
from trl_rlaif.errors import RunError, UserError


def _main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["trl-rlaif", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("--help", "rewardbench"),
        ("recipes", "quickstart"),
        ("plugins", "selective_rehearsal"),
        ("check nothing", "no recipe 'nothing'"),
        ("run nothing", "no recipe 'nothing'"),
        ("status nowhere", "no such folder"),
    ],
)
def test_what_only_lists_loads_no_heavy_library(command, word):
    heavy = ("torch", "transformers", "trl", "datasets", "accelerate", "peft", "sklearn", "scipy.stats", "matplotlib")
    code = (
        f"import sys; sys.argv = {['trl-rlaif', *command.split()]}\n"
        "from trl_rlaif.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert word in ended.stdout + ended.stderr and ended.stdout.strip().endswith("[]")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("wrong", where="a:1", fix="right"), 2, "a:1: wrong right"),
        (RunError("failed"), 1, "failed"),
        (OSError(28, "No space left on device", "x.jsonl"), 1, "x.jsonl: No space left on device"),
        (ZeroDivisionError("by zero"), 1, "ZeroDivisionError: by zero"),
    ],
)
def test_an_error_is_one_message(monkeypatch, capsys, error, code, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("trl_rlaif.recipe.parse_recipe", fail)
    assert _main(monkeypatch, "check", "quickstart") == code
    stderr = capsys.readouterr().err
    assert message in stderr and "Traceback" not in stderr


def test_a_stopped_run_says_how_to_go_on(monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("trl_rlaif.pipeline.runner.run_recipe", stop)
    assert _main(monkeypatch, "run", "quickstart") == 130
    assert "--resume" in capsys.readouterr().err


def test_debug_shows_the_traceback(monkeypatch):
    def fail(*args, **kwargs):
        raise UserError("wrong")

    monkeypatch.setattr("trl_rlaif.recipe.parse_recipe", fail)
    monkeypatch.setattr(sys, "argv", ["trl-rlaif", "--debug", "check", "quickstart"])
    with pytest.raises(UserError):
        cli.main()


def test_packaged_recipes_are_listed_shown_and_good(monkeypatch, capsys, tmp_path):
    assert _main(monkeypatch, "recipes") == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert "quickstart" in names
    for name in names:
        assert _main(monkeypatch, "check", name) == 0
        assert "Warning" not in capsys.readouterr().err  # it does not train on evaluation prompts
        assert _main(monkeypatch, "recipes", "show", name) == 0
        assert f"trl-rlaif run {name}" in capsys.readouterr().out  # the recipe contains the exact command
    assert _main(monkeypatch, "recipes", "show", "quikstart") == 2


def test_plugins_are_listed_with_their_options(monkeypatch, capsys):
    assert _main(monkeypatch, "plugins") == 0
    output = capsys.readouterr().out
    assert "distilled" in output and f"trl-rlaif {trl_rlaif.__version__}" in output and "debias" in output
    assert "criteria: default {}." in output and "Undefined" not in output


def test_one_component(monkeypatch, capsys):
    assert _main(monkeypatch, "plugins", "advantage") == 0
    output = capsys.readouterr().out
    assert "margin: default 4.0" in output and "distilled" not in output
    assert _main(monkeypatch, "plugins", "advantag") == 2
    assert "Did you mean 'advantage'?" in capsys.readouterr().err


def test_version(monkeypatch, capsys):
    assert _main(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"trl-rlaif {trl_rlaif.__version__}\n"


def test_a_report_of_no_run(monkeypatch, capsys, tmp_path):
    assert _main(monkeypatch, "report", str(tmp_path)) == 2


HOSTILE = "\x1b]0;pwned\x07\x1b[31m\r\x9b2J\u202egnp.exe\ud800"


def test_what_would_steer_the_terminal_is_shown(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise UserError(HOSTILE, where="a:1", fix="First line.\nSecond line.")

    monkeypatch.setattr("trl_rlaif.recipe.parse_recipe", fail)
    assert _main(monkeypatch, "check", "quickstart") == 2
    said = r"a:1: \x1b]0;pwned\x07\x1b[31m\r\x9b2J\u202egnp.exe\ud800"
    assert capsys.readouterr().err == f"trl-rlaif: {said} First line.\nSecond line.\n"
    progress.say(HOSTILE)
    with progress.progress_bar(HOSTILE, 1):
        pass
    assert not set(capsys.readouterr().err) & set("\x1b\x07\r\x9b\u202e\ud800")


@pytest.mark.parametrize(("body", "said"), [("raise SystemExit(0)", "SystemExit"), ("x = 1", "no attribute 'reward'")])
def test_a_reward_function_is_imported_by_check(monkeypatch, capsys, tmp_path, body, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(body + "\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hello"}\n')
    (tmp_path / "r.yaml").write_text(
        "model: {path: gpt2}\ndata: {prompts: p.jsonl}\nrl:\n  rewards:\n  - mine.py:reward\n"
    )
    assert _main(monkeypatch, "check", "r.yaml") == 2
    error = capsys.readouterr().err
    assert "r.yaml:5" in error and said in error
