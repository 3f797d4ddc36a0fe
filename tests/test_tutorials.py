"""docs/tutorials/ and the README, followed exactly, with a tiny model and a scripted server."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from helpers.server import scripted_server, share

from trl_rlaif import Pair
from trl_rlaif.cli import app
from trl_rlaif.files import read_lines
from trl_rlaif.testing import ScriptedJudge, check_labeler

ROOT = Path(__file__).resolve().parents[1]
README, SERVER, OWN = (
    (ROOT / page).read_text(encoding="utf-8")
    for page in ("README.md", "docs/tutorials/label_with_a_server.md", "docs/tutorials/own_judge.md")
)


def _block(language, text):
    [found] = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return found


@pytest.mark.parametrize("page", [SERVER, README], ids=["tutorial", "readme"])
def test_a_file_is_labeled_by_a_server(page, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "my_pairs.jsonl").write_text(_block("json", SERVER).replace("Paris.", "Paris, a good city."))
    commands = re.findall(r"^    trl-rlaif ((?:check|run) my.yaml.*?)(?: +#.*)?$", page, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["check", "run"]
    with scripted_server() as server:
        recipe = _block("yaml", page).replace("http://localhost:8000/v1", server.base_url)
        recipe = re.sub("Qwen/Qwen2.5-0.5B-Instruct", tiny_model, re.sub("qwen|my-model", "scripted", recipe))
        (tmp_path / "my.yaml").write_text(recipe)
        for command in commands:
            app(command.split(), standalone_mode=False)
    folder = tmp_path / commands[1].split()[-1]
    found = sorted(row["p"] for row in read_lines(folder / "labels.jsonl"))
    pairs = read_lines(tmp_path / "my_pairs.jsonl")
    assert found == pytest.approx(sorted(share(p["response_1"], p["response_2"]) for p in pairs))
    assert found == pytest.approx([1 / 2, 2 / 3])
    if page is SERVER:
        capsys.readouterr()
        exec(_block("python", page), {})
        assert re.match(r"\['id', 'prompt', 'chosen', 'rejected', 'p', .* 0\.6", capsys.readouterr().out)


def test_the_labeler_of_the_tutorial_keeps_its_contract():
    module = {}
    exec(compile(_block("python", OWN), "own_judge.md", "exec", dont_inherit=True), module)
    check_labeler(module["Concise"])
    pair = Pair("a", "Hello", "Hi.", "A long greeting.")
    for log_odds, p in ((0.0, 0.7), (-2.0, 1 / (1 + math.exp(2)))):

        def of_the_first(context, response_1, response_2, log_odds=log_odds):
            return log_odds if response_1 == pair.response_1 else -log_odds

        judge = ScriptedJudge(of_the_first)
        [label] = module["Concise"]().label([pair], judge)
        assert label.p == pytest.approx(p)
