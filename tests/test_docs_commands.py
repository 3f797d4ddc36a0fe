"""Every command that README.md and docs/ show exists, and runs: those of a page in its order, on tiny models."""

from __future__ import annotations

import io
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer
from helpers.hub import fake_hub
from helpers.labeling import make_pairs
from helpers.packaged import assert_complete, tiny_overrides
from helpers.pages import COMMANDS, Reader
from helpers.recipes import write_prompts, write_recipe, write_rows
from helpers.server import batch_answers, scripted_server
from helpers.trained import add_trained

from trl_rlaif.cli import app
from trl_rlaif.files import read_lines
from trl_rlaif.judging.judge import Written
from trl_rlaif.judging.local import LocalJudge
from trl_rlaif.judging.remote import RemoteJudge
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.recipe import packaged_recipes

RUBRIC = "3: names the city"
INSTEAD = {"RECIPE": "my.yaml", "allenai/reward-bench-2:test": "my_preferences.jsonl"}
# What a reader brings along.
BROUGHT = {"my_prompts.jsonl": 40, "my_eval_prompts.jsonl": 4}
PAIRS = ("my_pairs.jsonl", "pandalm_600.jsonl")
MADE = ("reward", "policy", "judge")
COPIES = {"share2", "runs/a", "runs/b"}  # of runs/my, as the pages say


@pytest.mark.parametrize("command", sorted({shlex.join(words) for page in COMMANDS.values() for words, _ in page}))
def test_a_command_exists_with_its_options(command):
    whole = here = typer.main.get_command(app)
    words = shlex.split(command)
    while words and words[0] in getattr(here, "commands", {}):
        here = here.commands[words.pop(0)]
    assert here is not whole
    here.make_context("trl-rlaif", words)


class Terminal(io.StringIO):
    def isatty(self):
        return True


class CommandReader(Reader):
    """Who types the commands of a page in a folder with data, a recipe of pairs, my.yaml, and its run in runs/my."""

    def __init__(self, folder, monkeypatch, server, used):
        super().__init__(folder, monkeypatch)
        self.server, self.monkeypatch = server, monkeypatch
        for file, count in BROUGHT.items():
            write_prompts(Path(file), count)
        rubric = [{"criterion": "names the city", "weight": 3}]
        prompts = read_lines(Path("my_prompts.jsonl"))[:4]
        write_rows(Path("my_rubrics.jsonl"), [row | {"rubric": rubric} for row in prompts])
        sides = {"chosen": "a fox", "rejected": "a dog", "subset": "animals"}
        write_rows(Path("my_preferences.jsonl"), [row | sides for row in prompts])
        for file in PAIRS:
            write_rows(Path(file), make_pairs(24, human=(1, 2, 1)))
        sections = {"data": {"pairs": "my_pairs.jsonl", "max_prompts": 4}, "sample": None}
        if "label" in used:  # batch files are a server's
            judge = {"backend": "openai", "path": "scripted", "prefill": False, "base_url": server.base_url}
            sections["label"] = {"judge": judge}
        if "run" not in used:
            sections["judge"] = {}
        write_recipe(folder, self.model, **sections).rename("my.yaml")
        app("run my.yaml --only sample --output runs/my".split(), standalone_mode=False)
        for what in MADE:
            add_trained(RunFolder(Path("runs/my")), what)

    def type(self, words):
        """Run a command."""
        words = [INSTEAD.get(word, self.tiny(word)) for word in words]
        if "hub" in words:
            words += ["--base", "me/base"]  # of a model in a folder
        self._prepare(words)
        with self.monkeypatch.context() as patch:
            patch.setattr("sys.stdin", Terminal(f"{self.model}\nmy_prompts.jsonl\n8\nppo\n"))
            patch.setattr("trl_rlaif.rating.server.RatingServer.serve_forever", _interrupted)
            if words[0] in ("run", "label", "draft-rubrics"):
                words = self._tiny(words)
            for judge in (LocalJudge, RemoteJudge):  # a tiny model writes no rubric
                patch.setattr(judge, "write", lambda self, asked, **_: [Written(RUBRIC, True)] * len(asked))
            assert not app(words, standalone_mode=False), words

    def _prepare(self, words):
        """What the page takes as given."""
        if words[0] == "run" and not {"--resume", "--only"} & {*words} and "runs/my" in words:
            shutil.rmtree("runs/my")  # the page's own run
        for copy in COPIES & {*words}:
            if not Path(copy).exists():
                shutil.copytree("runs/my", copy)
        if "--import-batch" in words:
            write_rows(Path("answers.jsonl"), batch_answers(self.server, Path("ask.jsonl")))

    def _tiny(self, words):
        recipe = packaged_recipes().get(words[1], Path(words[1]))
        changes = [] if "name: tiny" in recipe.read_text() else tiny_overrides(recipe, self.model, Path())
        return [*words[:2], *(word for text in changes for word in ("--set", text)), *words[2:]]


def _interrupted(*_):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def server():
    with scripted_server() as one:
        yield one


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with fake_hub() as hub:
        hub.join(monkeypatch, tmp_path / "hf")
        yield hub


@pytest.mark.parametrize("page", COMMANDS)
@pytest.mark.usefixtures("hub", "only_local_servers")
def test_the_commands_of_a_page_run_in_its_order(page, tmp_path, monkeypatch, capsys, server):
    reader = CommandReader(tmp_path, monkeypatch, server, {words[0] for words, _ in COMMANDS[page]})
    for words, file in COMMANDS[page]:
        capsys.readouterr()
        reader.type(words)
        said = "".join(capsys.readouterr())
        assert said, words
        if words[0] == "run" and not {"--only", "--shard"} & {*words}:
            (folder,) = re.findall(r"^The run is in (.+)$", said, re.MULTILINE)
            assert_complete(Path(folder))
        if file:
            Path(file).write_text(said, encoding="utf-8")
