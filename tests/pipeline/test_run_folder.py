"""A run folder: atomic writes, readable after a kill, one process at a time."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers.recipes import tiny_recipe

from trl_rlaif import RunError, UserError
from trl_rlaif.files import (
    append_lines,
    is_signed,
    read_lines,
    read_state,
    signed,
    to_line,
    unsealed,
    unsigned,
    write_atomically,
    write_folder,
)
from trl_rlaif.pipeline import redo, runner
from trl_rlaif.pipeline.artifacts import FORMAT
from trl_rlaif.pipeline.machine import machine_of
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.stages import STAGES
from trl_rlaif.pipeline.superseding import begin, supersede
from trl_rlaif.report.run_data import read_run
from trl_rlaif.status import read_status

OUTPUTS = {name: stage.outputs for name, stage in STAGES.items()}

LONE = "a\ud83d b"  # half of a surrogate pair, as byte-level models may generate it


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def visible(path):
    """The names in a folder that are not hidden."""
    return sorted(p.name for p in path.iterdir() if not p.name.startswith("."))


# ---- Files and folders ----------------------------------------------------------------------------------


def test_a_file_is_replaced(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, "old é\n")
    write_atomically(path, "new 漢\n")
    assert path.read_bytes() == "new 漢\n".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_kill_before_the_end_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    def killed(*_):
        raise KeyboardInterrupt

    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, killed)
            with pytest.raises(KeyboardInterrupt):
                write_atomically(path, "new and longer")
        assert path.read_text() == "old" and visible(tmp_path) == ["a.json"]
    write_atomically(path, "new")  # leftovers of the kill do not interfere
    assert path.read_text() == "new"


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "deep" / "model"
    write_folder(path, lambda new: (new / "old").write_text("1"))
    write_folder(path, lambda new: (new / "new").write_text("2"))
    assert visible(path) == ["new"] and [p.name for p in path.parent.iterdir()] == ["model"]


def test_a_failure_while_a_folder_is_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "model"
    write_folder(path, lambda new: (new / "weights").write_text("old"))

    def fails(new):
        (new / "weights").write_text("half of the n")
        assert (path / "weights").read_text() == "old"  # until the new one is complete
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_folder(path, fails)
    assert (path / "weights").read_text() == "old" and visible(tmp_path) == ["model"]
    write_folder(path, lambda new: (new / "other").write_text("new"))  # nothing of the partial write is left
    assert [p.name for p in path.iterdir()] == ["other"]


def test_a_first_failure_leaves_no_folder(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_folder(tmp_path / "model", lambda new: 1 / 0)
    assert not (tmp_path / "model").exists()


# ---- Lines ----------------------------------------------------------------------------------------------

ROWS = [{"id": "é 漢 \u2028\u0085\x0b", "p": 0.1}, {"id": "a\nb\r\n", "p": None}, {"id": "<|end|>\x00", "n": [1, {}]}]


def test_lines_come_back_as_they_were(tmp_path):
    path = tmp_path / "labels.jsonl"
    append_lines(path, ROWS[:1])
    append_lines(path, ROWS[1:])
    append_lines(path, [])
    assert read_lines(path) == ROWS
    assert path.read_bytes().count(b"\n") == 3 and "é 漢".encode() in path.read_bytes()


def test_a_missing_file_has_no_lines(tmp_path):
    assert read_lines(tmp_path / "none.jsonl") == []
    assert not (tmp_path / "none.jsonl").exists()


def test_a_lone_surrogate_is_escaped(tmp_path):
    path = tmp_path / "pairs.jsonl"
    append_lines(path, [{"text": LONE}, {"text": "é"}])
    assert read_lines(path) == [{"text": LONE}, {"text": "é"}]
    assert b"\\ud83d" in path.read_bytes() and path.read_bytes().decode("utf-8")
    assert to_line({"text": "é"}) == '{"text": "é"}\n'


@pytest.mark.parametrize("cut", [1, 2, 7, 12])
def test_a_last_line_that_was_cut_off_is_removed(tmp_path, cut):
    path = tmp_path / "labels.jsonl"
    append_lines(path, ROWS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert read_lines(path) == ROWS[:2]
    append_lines(path, ROWS[2:])  # the next line is not joined to the broken one
    assert path.read_bytes() == whole and read_lines(path) == ROWS


def test_a_line_that_was_cut_within_a_character_is_removed(tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": "' + "漢".encode()[:2])
    assert read_lines(path) == [{"a": 1}] and path.read_bytes() == b'{"a": 1}\n'


def test_a_single_line_that_was_cut_off(tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text('{"a"')
    assert read_lines(path) == [] and path.read_text() == ""


@pytest.mark.parametrize("broken", [b'{"b": ', b"", b"\xff\xfe", b"nonsense"])
def test_a_broken_line_in_the_middle_is_named(tmp_path, broken):
    path = tmp_path / "labels.jsonl"
    content = b'{"a": 1}\n' + broken + b'\n{"c": 3}\n'
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_lines(path)
    assert f"{path}:2" in str(caught.value)
    assert path.read_bytes() == content


def test_no_bit_of_a_line_of_ours_flips_unseen(tmp_path):
    row = {"id": "ü\ud800", "p": 0.1 + 0.2, "none": None, "list": [1, 1e-320, True], "nan": float("inf")}
    append_lines(tmp_path / "rows.jsonl", [row])
    line = (tmp_path / "rows.jsonl").read_bytes()[:-1]
    assert unsealed(json.loads(line)) == row
    for place in range(8 * len(line)):
        flipped = bytearray(line)
        flipped[place // 8] ^= 1 << place % 8
        try:
            found = unsealed(json.loads(flipped))
        except ValueError:
            continue
        # The values are unchanged: the flip was in the checksum's key, or in a letter that may have either case.
        assert {key: found[key] for key in row} == row


def test_a_line_of_a_person_needs_no_checksum(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    assert read_lines(tmp_path / "rows.jsonl") == [{"a": 1}]


@pytest.mark.parametrize("damage", [b"", b"[]", b"null", b'{"a": 1, "crc32": "00000000"}', b"\xff", b"[" * 100_000])
def test_damaged_state_is_named_with_what_to_do(tmp_path, damage):
    folder = RunFolder(tmp_path)
    folder.begin("label", "f")
    path = folder.state / "label.json"
    path.write_bytes(damage)
    with pytest.raises(UserError, match="The file is damaged. Restore it. Without it, --resume makes the stage again"):
        folder.marker("label")
    assert not path.with_name("missing.json").exists() and read_state(path.with_name("missing.json"), "") == {}


def test_a_row_may_be_written_anew_by_another_program(tmp_path):
    append_lines(tmp_path / "rows.jsonl", [{"b": 1, "a": {"y": 0.5, "x": None, 2: 1, 10: 1}}])
    (row,) = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    anew = json.dumps(row, sort_keys=True, separators=(",", ":"))
    (tmp_path / "rows.jsonl").write_text(anew + "\n" + anew.replace("0.5", "0.6") + "\n")
    with pytest.raises(UserError, match="if you changed it on purpose, remove crc32") as caught:
        read_lines(tmp_path / "rows.jsonl")
    assert caught.value.problems[0].where.endswith("rows.jsonl:2")
    (tmp_path / "rows.jsonl").write_text(anew + "\n")
    assert read_lines(tmp_path / "rows.jsonl") == [{"b": 1, "a": {"y": 0.5, "x": None, "2": 1, "10": 1}}]


def test_a_signed_text_that_somebody_changed(tmp_path):
    text = signed("run: {name: ä}\n")
    assert is_signed(text.encode()) and is_signed(b"run: {name: a}\n") and unsigned(text) == "run: {name: ä}\n"
    assert not is_signed(text.replace("ä}", "b}").encode()) and not is_signed(text.encode()[:-3])


@pytest.mark.parametrize(
    ("error", "free"),
    [
        (OSError(28, "No space left on device"), 5000),
        (Exception("No space left on device (os error 28)"), 5000),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 58240 vs 58128"), 100),
    ],
)
def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch, error, free):
    folder = RunFolder(tmp_path)
    (tmp_path / "half.pt").touch()
    os.utime(tmp_path / "half.pt", (2e9, 2e9))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, free * 1024))
    with pytest.raises(RunError, match=f"The disk is full: {free:,} KiB are left") as caught, folder.locked():
        raise error
    assert caught.value.problems[0].where == str(tmp_path / "half.pt") and "--resume" in str(caught.value)


def test_a_full_disk_elsewhere_is_named(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    cache.mkdir()
    free = {str(cache): 0}
    monkeypatch.setattr(shutil, "disk_usage", lambda at: shutil._ntuple_diskusage(0, 0, free.get(str(at), 9 << 30)))
    with pytest.raises(RunError, match=f"0 KiB are left on that of {cache} ") as caught, RunFolder(tmp_path).locked():
        raise OSError(28, "No space left on device", str(cache / "a.tmp"))
    assert caught.value.problems[0].where == str(cache / "a.tmp")


def test_another_error_is_left_alone(tmp_path):
    with pytest.raises(RuntimeError, match="shape"), RunFolder(tmp_path).locked():
        raise RuntimeError("shape")


# ---- Stages ---------------------------------------------------------------------------------------------


def fill(folder, stage):
    """Write the outputs, metrics and results of a finished stage."""
    for name in OUTPUTS[stage]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.write_text("x\n")
        else:
            path.mkdir()
            (path / "weights").write_text("x")
    folder.add_metrics(stage, 1, {"loss": 0.5})
    folder.add_results(stage, {"n": 3})


def left(folder, stage):
    """A stage's existing artifacts, and whether it has metrics and results."""
    files = [name for name in OUTPUTS[stage] if (folder / name).exists()]
    rows = [row for row in read_lines(folder / "metrics.jsonl") if row["stage"] == stage]
    return files, bool(rows), stage in folder.results()


@pytest.fixture
def filled(folder):
    """A folder in which every stage is complete with the fingerprint A."""
    for stage in OUTPUTS:
        folder.begin(stage, "A")
        fill(folder, stage)
        folder.complete(stage, "A")
    return folder


def test_a_new_folder_holds_nothing(tmp_path):
    folder = RunFolder(tmp_path / "a" / "b")
    assert folder.path == (tmp_path / "a" / "b").resolve() and visible(folder.path) == []
    assert not folder.is_used and folder.results() == {} and not folder.is_complete("label")
    (folder / "recipe.yaml").write_text("")
    assert folder.is_used and RunFolder(folder.path).is_used


def test_a_stage_is_complete_when_it_says_so(folder):
    assert not folder.is_complete("label", "A")
    folder.begin("label", "A")
    assert not folder.is_complete("label", "A") and not folder.is_complete("label")
    folder.complete("label", "A")
    again = RunFolder(folder.path)
    assert again.is_complete("label", "A") and again.is_complete("label")
    assert not again.is_complete("label", "B") and not again.is_complete("reward")


def test_a_stage_that_was_cut_off_keeps_what_it_has(folder):
    begin(folder, STAGES["label"], "A")
    fill(folder, "label")
    begin(folder, STAGES["label"], "A")
    assert left(folder, "label") == ([*OUTPUTS["label"]], True, True)
    assert not folder.is_complete("label")


@pytest.mark.parametrize("fingerprint", ["A", "B"])
@pytest.mark.parametrize("stage", [name for name, stage in STAGES.items() if not stage.always])
def test_a_complete_stage_begins_from_nothing_and_leaves_the_others_alone(filled, stage, fingerprint):
    begin(filled, STAGES[stage], fingerprint)
    assert left(filled, stage) == ([], False, False)
    assert not filled.is_complete(stage)
    for other in set(OUTPUTS) - {stage}:
        assert left(filled, other) == ([*OUTPUTS[other]], True, True)
        assert filled.is_complete(other, "A")


def test_labels_outlive_their_stage(folder):
    """Labels are keyed by the settings they depend on: a redone stage reuses those that still apply."""
    (folder / "labels.jsonl").write_text("{}\n")
    begin(folder, STAGES["label"], "A")
    folder.complete("label", "A")
    begin(folder, STAGES["label"], "B")
    supersede(folder, [STAGES["label"]])
    assert (folder / "labels.jsonl").read_text() == "{}\n"


def test_a_stage_that_was_cut_off_under_other_settings_begins_from_nothing(folder):
    begin(folder, STAGES["label"], "A")
    fill(folder, "label")
    begin(folder, STAGES["label"], "B")
    assert left(folder, "label") == ([], False, False)
    folder.complete("label", "B")
    assert folder.is_complete("label", "B") and not folder.is_complete("label", "A")


def test_superseding_what_is_not_there_is_fine(folder):
    assert supersede(folder, [*STAGES.values()]) is None
    assert visible(folder.path) == []


# ---- Results and metrics --------------------------------------------------------------------------------


def test_results_of_stages_add_up(folder):
    folder.add_results("sample", {"pairs": 3})
    folder.add_results("label", {"judge": "é", "low": None})
    folder.add_results("sample", {"pairs": 4})
    expected = {"sample": {"pairs": 4}, "label": {"judge": "é", "low": None}}
    assert folder.results() == expected == json.loads((folder / "results.json").read_text())


def test_results_may_hold_a_lone_surrogate(folder):
    folder.add_results("evaluate", {"example": LONE})
    assert folder.results()["evaluate"]["example"] == LONE


def test_metrics_behind_a_step_are_dropped_for_one_stage(folder):
    for step in range(4):
        folder.add_metrics("rl", step, {"kl": step / 10})
        folder.add_metrics("reward", step, {"loss": LONE})
    folder.drop_metrics("rl", after=1)
    rows = read_lines(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if row["stage"] == "rl"] == [0, 1]
    assert rows[0] == {"stage": "rl", "step": 0, "kl": 0.0}
    assert [row["step"] for row in rows if row["stage"] == "reward"] == [0, 1, 2, 3]
    folder.drop_metrics("rl")
    assert [row["stage"] for row in read_lines(folder / "metrics.jsonl")] == ["reward"] * 4


def test_dropping_no_metrics_leaves_the_file_alone(folder):
    folder.drop_metrics("rl")
    assert not (folder / "metrics.jsonl").exists()
    folder.add_metrics("rl", 1, {"kl": 0.1})
    before = (folder / "metrics.jsonl").stat().st_ino
    folder.drop_metrics("rl", after=1)
    assert (folder / "metrics.jsonl").stat().st_ino == before


def test_metrics_go_on_after_a_kill_in_a_line(folder):
    for step in (1, 2):
        folder.add_metrics("rl", step, {"kl": 0.1})
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    folder.drop_metrics("rl", after=1)  # as a trainer does when it starts
    folder.add_metrics("rl", 2, {"kl": 0.2})
    assert [(row["step"], row["kl"]) for row in read_lines(path)] == [(1, 0.1), (2, 0.2)]


# ---- Locks and permissions ------------------------------------------------------------------------------


def test_a_second_user_is_kept_out_until_the_first_is_done(folder):
    second = RunFolder(folder.path)
    with folder.locked():
        with pytest.raises(UserError, match="Another process") as caught, second.locked():
            pass
        assert caught.value.exit_code == 2 and str(folder.path) in str(caught.value)
    with second.locked():
        pass


def test_the_lock_ends_with_an_exception(folder):
    with pytest.raises(ZeroDivisionError), folder.locked():
        raise ZeroDivisionError
    with folder.locked():
        pass


def test_the_lock_of_a_process_that_was_killed_is_gone(folder):
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    command = [sys.executable, "-c", hold, str(folder.path / ".state" / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"1\n"
        with pytest.raises(UserError, match="Another process"), folder.locked():
            pass
        process.kill()
        process.wait()
        with folder.locked(), (folder.path / ".state" / "lock").open("w") as file, pytest.raises(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError) as caught:
            RunFolder(path)
        assert caught.value.exit_code == 2
        assert str(path) in str(caught.value) and "--output" in str(caught.value)


@pytest.mark.parametrize("blocked", [".state", ".state/writable"])
def test_a_folder_that_cannot_be_written_to_is_a_user_error(tmp_path, blocked):
    path = tmp_path / "run" / blocked
    path.parent.mkdir(parents=True)
    path.write_text("") if blocked == ".state" else path.mkdir()
    with pytest.raises(UserError) as caught:
        RunFolder(tmp_path / "run")
    assert caught.value.exit_code == 2 and str(tmp_path / "run") in str(caught.value)


def test_a_folder_of_a_later_version_is_refused(tmp_path, tiny_model):
    recipe, folder = tiny_recipe(tmp_path, tiny_model), RunFolder(tmp_path / "run")
    runner._write_recipe(recipe, folder, "trl-rlaif run tiny", machine_of(folder))
    redo.plan(recipe, folder), read_status(folder.path), read_run(folder.path)
    saved = (folder / "recipe.yaml").read_text()
    assert f"format: {FORMAT}\n" in saved
    (folder / "recipe.yaml").write_text(saved.replace(f"format: {FORMAT}", f"format: {FORMAT + 1}"))
    for reading in (lambda: redo.plan(recipe, folder), lambda: read_status(folder.path), lambda: read_run(folder.path)):
        with pytest.raises(UserError, match="A later version of trl-rlaif wrote this folder"):
            reading()
