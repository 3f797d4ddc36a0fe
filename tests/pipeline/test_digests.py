"""Flipped bits and lost files in a completed stage's outputs are detected before anything is computed from them."""

from __future__ import annotations

import pytest
from helpers.recipes import tiny_recipe

from trl_rlaif import UserError
from trl_rlaif.pipeline import artifacts, digests
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.pipeline.stages import STAGES
from trl_rlaif.plugins import installed_plugins


@pytest.fixture
def run(tmp_path, tiny_model):
    """A recipe with two stages, and a folder in which both are complete."""
    recipe = tiny_recipe(tmp_path, tiny_model, reward=None, rl=None, evaluate=None, report=None)
    return recipe, run_recipe(recipe, installed_plugins(), tmp_path / "out")


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _files(folder):
    names = (artifacts.PAIRS, artifacts.LABELS, artifacts.PREFERENCES)
    return [p for name in names for p in [folder / name, *(folder / name).rglob("*")] if p.is_file()]


def test_every_flipped_bit_and_lost_file_is_noticed(run):
    recipe, folder = run
    assert len(_files(folder)) >= 4
    for path in _files(folder):
        before = path.read_bytes()
        for change, said in ((_flip, "is not what the stage"), (lambda p: p.unlink(), "is gone")):
            change(path)
            with pytest.raises(UserError, match=said) as caught:
                run_recipe(recipe, installed_plugins(), folder.path, resume=True)
            assert str(path) in {problem.where for problem in caught.value.problems}
            assert "--only" in caught.value.problems[0].fix
            path.write_bytes(before)
    run_recipe(recipe, installed_plugins(), folder.path, resume=True)


def test_a_changed_number_of_a_stage_is_noticed(run):
    recipe, folder = run
    folder.add_results("label", folder.results_of("label") | {"labeled": 3})
    with pytest.raises(UserError, match="numbers of the stage 'label' are not what it wrote") as caught:
        run_recipe(recipe, installed_plugins(), folder.path, resume=True)
    assert [problem.where for problem in caught.value.problems] == [str(folder / artifacts.RESULTS)]


def test_a_lost_line_of_metrics_is_said_and_makes_nothing_again(run, capsys):
    recipe, folder = run
    folder.add_metrics("label", 1, {"loss": 0.5})
    run_recipe(recipe, installed_plugins(), folder.path, resume=True)
    assert "the rows of the stage 'label' in" in capsys.readouterr().err.replace("\n", " ")


def test_a_recipe_of_the_run_that_somebody_changed_is_said_and_written_anew(run, capsys):
    recipe, folder = run
    path = folder / artifacts.RECIPE
    before = path.read_text()
    path.write_text(before.replace("seed: 7", "seed: 6"))
    run_recipe(recipe, installed_plugins(), folder.path, resume=True)
    assert "was not what the run wrote" in capsys.readouterr().err and "seed: 7" in path.read_text()


def test_what_is_made_again_may_be_damaged(run):
    recipe, folder = run
    before = (folder / artifacts.PAIRS).read_bytes()
    _flip(folder / artifacts.PAIRS)
    run_recipe(recipe, installed_plugins(), folder.path, only=["sample", "label"])
    assert (folder / artifacts.PAIRS).read_bytes() == before


def test_checkpoints_and_reports_are_not_recorded(tmp_path):
    folder = RunFolder(tmp_path)
    for stage in (STAGES["reward"], STAGES["report"]):
        for name in stage.outputs:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("x")
        digests.complete(folder, stage, "a")
    assert sorted(folder.marker("reward")["digests"]) == [artifacts.REWARD, artifacts.REWARD_SCORES]
    assert folder.marker("report")["digests"] == {}


@pytest.mark.parametrize("content", ["{", "[]", "\x00", '{"complete": ', '{"complete": true}'])
def test_a_damaged_marker_or_results_file_is_named(tmp_path, content):
    folder = RunFolder(tmp_path)
    for path, read in (
        (folder.state / "rl.json", lambda: folder.marker("rl")),
        (folder / "results.json", folder.results),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match="damaged") as caught:
            read()
        assert caught.value.problems[0].where == str(path)


def test_what_other_stages_wrote_or_a_cache_is_not_recorded(tmp_path):
    folder = RunFolder(tmp_path)
    (folder / artifacts.PREFERENCES).mkdir()
    for name in ("data.arrow", "cache-1.arrow"):
        (folder / artifacts.PREFERENCES / name).write_text("x")
    for name in ("label", "reward", "rl"):
        digests.complete(folder, STAGES[name], "a")
    assert sorted(folder.marker("label")["digests"]) == [f"{artifacts.PREFERENCES}/data.arrow"]
    assert folder.marker("reward")["digests"] == folder.marker("rl")["digests"] == {}


def test_a_donor_that_is_damaged_gives_nothing(run, tmp_path):
    recipe, folder = run
    _flip(folder / artifacts.PAIRS)
    with pytest.raises(UserError, match="is not what the stage 'sample' wrote"):
        run_recipe(recipe, installed_plugins(), tmp_path / "other", donors=[folder])
