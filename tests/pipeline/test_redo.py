"""Which stages a resumed run redoes, and why; superseded outputs; run folders of the first version."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from helpers import forked
from helpers.first_version import fingerprints as first_fingerprints
from helpers.first_version import write_first_version
from helpers.recipes import tiny_recipe, write_prompts

from trl_rlaif import UserError
from trl_rlaif.files import read_lines
from trl_rlaif.pipeline import redo, runner, superseding
from trl_rlaif.pipeline.machine import machine_of
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.stage import Stage
from trl_rlaif.pipeline.stages import STAGES
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import parse_recipe, prompt_folder
from trl_rlaif.report.build import write_report
from trl_rlaif.status import read_status

NUMBERS = {"pairs": 1, "dropped": {}, "sets": {}, "labeled": 1, "made": 1, "position_bias": None, "agreement": None}
ALL = ["sample", "label", "reward", "rl", "evaluate"]


@pytest.fixture
def make(tmp_path, tiny_model):
    """A function that makes the tiny recipe with changed sections."""
    return lambda **sections: tiny_recipe(tmp_path, tiny_model, **sections)


def finish(recipe, path) -> RunFolder:
    """A folder in which every stage of a recipe is complete, with outputs that identify their stage."""
    folder = RunFolder(path)
    for name, planned in redo.plan(recipe, folder).items():
        superseding.begin(folder, planned.stage, planned.fingerprint, planned.inputs.to_dict())
        for output in planned.stage.outputs:
            made = folder / output
            made.parent.mkdir(parents=True, exist_ok=True)
            if made.suffix:
                made.write_text(f'"{name}"\n')
            else:
                made.mkdir()
                (made / "weights").write_text(planned.fingerprint)
        folder.add_metrics(name, 1, {"loss": 0.5})
        folder.add_results(name, NUMBERS)
        folder.complete(name, planned.fingerprint)
    runner._write_recipe(recipe, folder, "trl-rlaif run tiny", machine_of(folder))
    return folder


@pytest.fixture
def folder(make, tmp_path):
    return finish(make(), tmp_path / "out")


def reasons(recipe, folder):
    """Why each stage is redone."""
    found = redo.redone(redo.plan(recipe, folder))
    return {each.stage.name: "; ".join(each.why) for each in found if each.stage.name != "report"}


def everything(folder):
    """Every file in a run folder that belongs to a stage, and its content."""
    found = {}
    for path in Path(folder).rglob("*"):
        if path.is_file() and path.name not in ("lock", "progress.json", "recipe.yaml"):
            found[str(path.relative_to(folder))] = path.read_text()
    return found


# ---- Redone stages --------------------------------------------------------------------------------------


def test_the_same_recipe_redoes_nothing(make, folder):
    assert reasons(make(), folder) == {}


def test_another_evaluation_prompt_redoes_the_evaluation_alone(make, folder, tmp_path):
    recipe = make()
    write_prompts(tmp_path / "test.jsonl", 4, start=21)
    why = reasons(recipe, folder)
    assert list(why) == ["evaluate"]
    assert why["evaluate"] == f"the content of data.eval_prompts has changed ({tmp_path / 'test.jsonl'})"


def test_a_file_that_was_moved_or_touched_is_the_same_input(make, folder, tmp_path):
    os.utime(tmp_path / "train.jsonl", (1, 1))
    shutil.copy(tmp_path / "train.jsonl", tmp_path / "moved.jsonl")
    assert reasons(make(data={"prompts": "moved.jsonl"}), folder) == {}


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"run": {"name": "other"}}, []),
        ({"reward": {"save_steps": 5, "logging_steps": 7, "report_to": "tensorboard", "packing": False}}, []),
        ({"reward": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}}, []),
        ({"rl": {"save_steps": 2, "micro_batch_tokens": 64, "gradient_checkpointing": True, "max_failed": 0.9}}, []),
        ({"label": {"batch_tokens": 64, "precision": "high"}}, []),
        ({"sample": {"temperature": 1.0}}, []),  # the default, written out
        ({"evaluate": {"track_every": 3}}, []),
        ({"report": None}, []),
        ({"sample": {"temperature": 0.9}}, ALL),
        ({"data": {"max_prompts": 4}}, ALL),
        ({"data": {"instruction": "Be brief."}}, ALL),
        ({"label": {"min_confidence": 0.6}}, ALL[1:]),
        ({"label": {"labeler": {"distilled": {"orders": "12"}}}}, ALL[1:]),
        ({"model": {"lora": {"r": 8, "alpha": 8}}}, ALL[2:]),
        ({"reward": {"learning_rate": 1e-3}}, ALL[2:]),
        ({"reward": {"per_device_train_batch_size": 2}}, ALL[2:]),
        ({"reward": {"transforms": ["advantage"]}}, ALL[2:]),
        ({"rl": {"kl_coef": 0.3}}, ALL[3:]),
        ({"rl": {"rewards": ["direct"]}}, ALL[3:]),
        ({"evaluate": {"temperature": 0.5}}, ALL[4:]),
        ({"evaluate": {"sets": {"forget": "train.jsonl"}, "stop_on_forgetting": 0.1}}, ALL[3:]),
    ],
)  # fmt: skip
def test_only_what_depends_on_a_change_is_redone(make, folder, changes, stages):
    assert list(reasons(make(**changes), folder)) == stages


def test_the_reason_names_the_key_with_both_values_or_the_stage_before(make, folder):
    why = reasons(make(reward={"learning_rate": 1e-3, "num_train_epochs": 5}), folder)
    assert why == {
        "reward": "reward.learning_rate was not set and is 0.001 now; reward.num_train_epochs was 2.0 and is 5.0 now",
        "rl": "reward is redone",
        "evaluate": "rl is redone; reward is redone",
    }


def test_a_policy_without_the_reward_model_does_not_depend_on_it(make, tmp_path):
    folder = finish(make(rl={"rewards": ["direct"]}), tmp_path / "direct")
    assert list(reasons(make(rl={"rewards": ["direct"]}, reward={"learning_rate": 1e-3}), folder)) == ["reward"]


def test_another_reward_function_in_the_same_file_is_another_input(make, tmp_path):
    (tmp_path / "mine.py").write_text("def good(prompts, completions, **columns): return [0.0] * len(prompts)")
    rl = {"rewards": ["mine.py:good"]}
    folder = finish(make(rl=rl), tmp_path / "mine")
    assert reasons(make(rl=rl), folder) == {}
    (tmp_path / "mine.py").write_text("def good(prompts, completions, **columns): return [1.0] * len(prompts)")
    assert list(reasons(make(rl=rl), folder)) == ["rl", "evaluate"]


def test_two_reward_files_with_one_function_name_are_two_inputs(make, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.py").write_text("def score(prompts, completions, **_):\n    return [0.0] * len(prompts)\n")
    rewards = {"rewards": [f"{tmp_path}/a.py:score", f"{tmp_path}/b.py:score"]}
    folder = finish(make(rl=rewards), tmp_path / "out")
    assert reasons(make(rl=rewards), folder) == {}
    (tmp_path / "a.py").write_text("def score(prompts, completions, **_):\n    return [1.0] * len(prompts)\n")
    assert "a.py" in reasons(make(rl=rewards), folder)["rl"]


@pytest.mark.parametrize("change", [{"bf16": True}, {"chat_template_path": "other.jinja"}])
def test_what_a_checkpoint_forgives_may_still_redo_a_finished_stage(make, folder, change):
    sft = {"data": "train.jsonl"}
    known = redo.plan(make(sft=sft), folder)["sft"].inputs
    assert redo.plan(make(sft=sft | change), folder)["sft"].inputs.changes_since(known)


def test_labels_survive_a_run_without_their_stage(make, folder, tmp_path):
    """Without ``label``, human choices are written where the labels' preferences were."""
    before = (folder / "preferences" / "weights").read_text()
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a?", "chosen": "b", "rejected": "c"}\n')
    without = make(label=None, data={"pairs": "pairs.jsonl", "format": "preference"}, sample=None)
    planned = redo.plan(without, folder)
    redo.apply(folder, planned, redo.redone(planned))
    assert not (folder / "preferences").exists() and not folder.marker("label")
    assert [path.read_text() for path in Path(folder / "superseded").glob("*/preferences/weights")] == [before]


def test_a_stage_that_waits_to_be_moved_is_not_complete(folder):
    folder.write_marker("reward", folder.marker("reward") | {"superseding": "now"})
    assert not folder.is_complete("reward")


def test_another_judges_prompt_redoes_what_asks_with_it(make, tmp_path):
    shutil.copytree(prompt_folder("general"), tmp_path / "mine")
    folder = finish(make(label={"prompt": "mine"}, evaluate={"prompt": "general"}), tmp_path / "mine_out")
    (tmp_path / "mine" / "base.txt").write_text("Another way to ask.")
    why = reasons(make(label={"prompt": "mine"}, evaluate={"prompt": "general"}), folder)
    assert list(why) == ALL[1:] and why["evaluate"] == "rl is redone; reward is redone"
    assert "the content of label.prompt has changed" in why["label"]


def test_a_judge_that_was_taught_again_in_its_folder_is_another(make, tmp_path, tiny_model):
    adapter = shutil.copytree(tiny_model, tmp_path / "judge")
    recipe = make(label={"judge": {"path": str(adapter)}})
    folder = finish(recipe, tmp_path / "judged")
    assert reasons(recipe, folder) == {}
    weights = adapter / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\x00\x01")
    why = reasons(recipe, folder)
    assert list(why) == ALL[1:]
    assert why["label"] == f"the content of label.judge.path has changed ({adapter})"
    marker = folder.marker("label")
    del marker["inputs"]["files"]["label.judge.path"]  # as earlier versions recorded it
    folder.write_marker("label", marker)
    assert reasons(recipe, folder) == {}
    moved = adapter.rename(tmp_path / "moved")
    why = reasons(make(label={"judge": {"path": str(moved)}}), folder)
    assert why["label"] == f'label.judge.path was "{adapter}" and is "{moved}" now'


def test_a_default_that_a_later_version_changes_is_no_change(make, folder, monkeypatch):
    from trl_rlaif.pipeline import inputs
    from trl_rlaif.recipe.sections import SampleSection

    inputs._defaults.cache_clear()
    monkeypatch.setattr(SampleSection.model_fields["top_p"], "default", 0.5)
    SampleSection.model_rebuild(force=True)
    try:
        recipe = make()
        assert recipe.sample.top_p == 0.5 and reasons(recipe, folder) == {}
    finally:
        monkeypatch.undo()
        SampleSection.model_rebuild(force=True)
        inputs._defaults.cache_clear()


# ---- Confirmation ---------------------------------------------------------------------------------------


@pytest.fixture
def stubbed(monkeypatch):
    """Stages that only record that they ran."""
    ran = []
    monkeypatch.setattr(Stage, "run", lambda stage, context: (ran.append(stage.name), NUMBERS)[1])
    monkeypatch.setattr(runner, "say_outcome", lambda folder: None)
    return ran


def test_nothing_is_changed_before_the_answer(make, folder, stubbed):
    before, asked = everything(folder.path), []
    with pytest.raises(UserError, match="--yes") as error:
        runner.run_recipe(make(rl={"kl_coef": 0.3}), installed_plugins(), folder.path, resume=True,
                          confirm=lambda message: asked.append(message))  # fmt: skip
    assert everything(folder.path) == before and stubbed == []
    [message] = asked
    assert "rl: rl.kl_coef was not set and is 0.3 now" in message and "evaluate: rl is redone" in message
    assert message in str(error.value) and error.value.exit_code == 2


def test_nothing_is_asked_where_nothing_is_redone(make, folder, stubbed):
    runner.run_recipe(make(), installed_plugins(), folder.path, resume=True, confirm=lambda _: pytest.fail("asked"))
    assert stubbed == []


def test_what_is_redone_is_moved_aside_first_and_comes_back_when_the_setting_does(make, folder, stubbed):
    before = everything(folder.path)
    runner.run_recipe(make(rl={"kl_coef": 0.3}), installed_plugins(), folder.path, resume=True, confirm=lambda _: True)
    assert stubbed == ["rl", "evaluate", "report"]
    [aside, *_] = sorted((folder / "superseded").iterdir())
    kept = everything(aside)
    for name in ("policy/weights", "checkpoints/rl/weights", "samples.jsonl", ".state/rl.json"):
        assert kept[name] == before[name], name
    assert set(RunFolder(aside).results()) == {"rl", "evaluate", "report"}
    assert [row["stage"] for row in read_lines(aside / "metrics.jsonl")] == ["rl", "evaluate", "report"]
    assert (folder / "reward" / "weights").exists() and not (folder / "policy").exists()
    write_report(folder.path)
    assert read_status(folder.path).state == "done"

    stubbed.clear()
    runner.run_recipe(make(), installed_plugins(), folder.path, resume=True, confirm=lambda _: True)
    assert stubbed == ["report"]
    assert (folder / "policy" / "weights").read_text() == before["policy/weights"]
    assert folder.results()["rl"] == NUMBERS and folder.metrics("rl")[0]["loss"] == 0.5


def test_a_stage_that_is_named_is_redone_without_a_question(make, folder, stubbed):
    runner.run_recipe(make(rl={"kl_coef": 0.3}), installed_plugins(), folder.path, only=["rl"],
                      confirm=lambda _: pytest.fail("asked"))  # fmt: skip
    assert stubbed == ["rl"] and (folder / "samples.jsonl").exists()
    assert [path.name for path in (folder / "superseded").glob("*/policy")] == ["policy"]


def test_without_a_terminal_the_command_asks_for_yes(make, folder, tmp_path):
    make(rl={"kl_coef": 0.3})
    before, output = everything(folder.path), tmp_path / "printed.txt"
    command = ("run", tmp_path / "recipe.yaml", "--output", folder.path, "--resume")
    ended = forked.start_command(*command, output=str(output))  # with /dev/null as standard input
    ended.join()
    assert ended.exitcode == 2 and everything(folder.path) == before
    printed = output.read_text()
    assert "rl: rl.kl_coef was not set and is 0.3 now" in printed and "Add --yes" in printed
    assert "Traceback" not in printed


# ---- A kill while outputs are moved ---------------------------------------------------------------------


@pytest.mark.parametrize("moment", range(24))
def test_a_kill_at_any_step_of_the_move_loses_nothing(folder, monkeypatch, moment):
    before = everything(folder.path)
    stages, steps = [STAGES[name] for name in ("reward", "rl", "evaluate")], []

    def killed_at(call):
        def step(*arguments, **options):
            if len(steps) == moment:
                raise KeyboardInterrupt
            steps.append(call)
            return call(*arguments, **options)

        return step

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink", "fsync"):
            patch.setattr(os, name, killed_at(getattr(os, name)))
        patch.setattr(Path, "unlink", killed_at(Path.unlink))
        try:
            superseding.supersede(folder, stages)
        except KeyboardInterrupt:
            pass
    planned_again = RunFolder(folder.path)
    superseding.finish(planned_again)
    superseding.supersede(planned_again, stages)  # in case the kill came before the move was recorded
    found = {name: text for path in (folder / "superseded").iterdir() for name, text in everything(path).items()}
    for name in before:
        if any(name.startswith(output) for stage in stages for output in stage.outputs):
            assert found[name] == before[name] and not (folder / name).exists(), name
    for stage in stages:
        assert json.loads(found[f".state/{stage.name}.json"]) == json.loads(before[f".state/{stage.name}.json"])
        assert not folder.marker(stage.name) and stage.name not in folder.results()
        rows = [row for path in (folder / "superseded").iterdir() for row in RunFolder(path).metrics(stage.name)]
        assert len(rows) == 1 and folder.metrics(stage.name) == []
        assert any(stage.name in RunFolder(path).results() for path in (folder / "superseded").iterdir())
    assert folder.is_complete("label") and "label" in folder.results() and folder.metrics("label")


# ---- Folders of the first version -----------------------------------------------------------------------


def resumed(recipe, out, **options):
    parsed = parse_recipe(recipe, registry=installed_plugins().registry)
    return runner.run_recipe(parsed, installed_plugins(), out, resume=True, **options)


def test_a_folder_of_the_first_version_is_resumed_without_redoing_anything(tmp_path, tiny_model, stubbed):
    recipe, out = write_first_version(tmp_path, tiny_model)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and ".state" not in str(path)}
    assert read_status(out).state == "done"
    for _ in range(2):  # the original folder, and what the first pass leaves
        resumed(recipe, out, confirm=lambda _: pytest.fail("asked"))
    assert set(stubbed) == {"report"} and not (out / "superseded").exists()
    after = {path: path.stat().st_mtime_ns for path in before if path.name not in ("recipe.yaml", "results.json")}
    assert after == {path: before[path] for path in after}
    assert RunFolder(out).marker("rl")["inputs"]["settings"]["rl.total_episodes"] == 8
    status = read_status(out)
    assert status.state == "done" and status.stages[2].summary == "10 of 10 pairs, position bias 100%"
    assert "labeled 10 of 10 pairs" in write_report(out).read_text()


@pytest.mark.parametrize(
    ("section", "changes", "stages"),
    [
        ("rl", {"total_episodes": 16}, ["rl", "evaluate"]),
        ("rl", {"save_steps": 2}, []),
        ("label", {"labeler": "distilled"}, ["label", "reward", "rl", "evaluate"]),
        ("sample", {"temperature": 0.5}, ["sample", "label", "reward", "rl", "evaluate"]),
    ],
)
def test_a_change_to_a_folder_of_the_first_version_is_found(tmp_path, tiny_model, section, changes, stages):
    path, out = write_first_version(tmp_path, tiny_model)
    recipe = yaml.safe_load(path.read_text())
    recipe[section] |= changes
    path.write_text(yaml.safe_dump(recipe))
    parsed = parse_recipe(path, registry=installed_plugins().registry)
    assert list(reasons(parsed, RunFolder(out))) == stages


def test_a_key_that_was_removed_since_the_first_version_is_a_change(tmp_path, tiny_model):
    path, out = write_first_version(tmp_path, tiny_model)
    recipe = yaml.safe_load(path.read_text())
    del recipe["rl"]["learning_rate"]
    path.write_text(yaml.safe_dump(recipe))
    parsed = parse_recipe(path, registry=installed_plugins().registry)
    why = reasons(parsed, RunFolder(out))
    assert why == {"rl": "rl.learning_rate was 0.01 and is not set now", "evaluate": "rl is redone"}


def test_a_key_that_a_later_version_adds_to_a_folder_of_the_first_is_no_change(tmp_path, tiny_model):
    path, out = write_first_version(tmp_path, tiny_model)
    saved = yaml.safe_load((out / "recipe.yaml").read_text())
    del saved["sample"]["top_p"], saved["model"]["matmul_precision"], saved["label"]["labeler"]["distilled"]["shots"]
    (out / "recipe.yaml").write_text(yaml.safe_dump(saved))
    for stage, fingerprint in first_fingerprints(saved).items():
        (out / ".state" / f"{stage}.json").write_text(json.dumps({"fingerprint": fingerprint, "complete": True}))
    parsed = parse_recipe(path, registry=installed_plugins().registry)
    assert reasons(parsed, RunFolder(out)) == {}


def test_where_the_first_version_left_no_trace_of_what_changed_it_says_so(tmp_path, tiny_model):
    path, out = write_first_version(tmp_path, tiny_model)
    write_prompts(tmp_path / "test.jsonl", 4, start=21)
    parsed = parse_recipe(path, registry=installed_plugins().registry)
    why = reasons(parsed, RunFolder(out))
    assert list(why) == ["sft", *ALL] and "did not record them" in why["rl"]
