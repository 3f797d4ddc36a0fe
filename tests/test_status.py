"""The status of a run: its display in another terminal, and the progress that the run publishes."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time

import pytest
import yaml
from helpers.recipes import tiny_recipe, write_recipe
from rich.console import Console

from trl_rlaif import progress
from trl_rlaif.cli import app
from trl_rlaif.errors import UserError
from trl_rlaif.files import read_lines, write_atomically
from trl_rlaif.pipeline.artifacts import PROGRESS
from trl_rlaif.pipeline.forecast import forecast
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.pipeline.stages import STAGES, active_stages
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.progress import Forecast, Meter, pace, progress_bar, publishing
from trl_rlaif.recipe import packaged_recipes, parse_recipe
from trl_rlaif.status import describe, follow, read_status

PRINTS = {"sample": "s", "label": "l", "reward": "r", "rl": "p"}
COMMAND = "trl-rlaif run 'my recipe' --set rl.kl_coef=0.1"


@pytest.fixture
def folder(tmp_path):
    """A run that has sampled its pairs."""
    folder = RunFolder(tmp_path / "run")
    recipe = {"run": {"name": "mine"}, **dict.fromkeys(PRINTS, {}), "command": COMMAND}
    write_atomically(folder / "recipe.yaml", json.dumps(recipe))
    folder.begin("sample", "s")
    folder.add_results("sample", {"pairs": 12, "dropped": {}, "seconds": 65.0})
    folder.complete("sample", "s")
    return folder


def test_a_run_says_once_how_long_it_will_take(tmp_path, monkeypatch, capsys):
    """After 90 s, a stage with 40% of the run's work has done a quarter of it: a tenth of the run."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "time", lambda: now[0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    known = Forecast({"sample": 0.4, "label": 0.6}, ("rl",), {"sample", "label"})
    with publishing(tmp_path, {}, known) as publisher:
        publisher.begin("sample")
        with progress_bar("Sampling", 100) as advance:
            now[0] += 30
            advance(10)
            assert "will take" not in capsys.readouterr().err
            now[0] += 60
            advance(15)
            assert "will take about 15 min 0 s in total, without rl, at" in capsys.readouterr().err
            now[0] += 60
            advance(15)
        publisher.begin("label")
    assert "will take" not in capsys.readouterr().err


def test_the_seconds_of_a_stage_are_those_of_all_its_attempts(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "time", lambda: now[0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with pytest.raises(KeyboardInterrupt), publishing(tmp_path, {}) as publisher:
        assert publisher.begin("label") == 0
        now[0] += 30
        raise KeyboardInterrupt
    killed = progress.Publisher(tmp_path / "progress.json", {})  # killed: it ends without cleanup
    now[0] += 500
    assert killed.begin("label", resumed=True) == 30
    now[0] += 12
    killed.publish()
    now[0] += 500
    progress.Publisher(tmp_path / "progress.json", {}).publish(at_once=True)  # killed before it began a stage
    with publishing(tmp_path, {}) as publisher:
        assert publisher.begin("sample", resumed=True) == 0
        assert publisher.begin("label", resumed=True) == 42
        assert publisher.begin("reward", resumed=True) == 0
    with publishing(tmp_path, {}) as publisher:
        assert publisher.begin("label", resumed=True) == publisher.begin("reward", resumed=True) == 0


def test_the_seconds_of_what_is_made_from_other_inputs_do_not_count(tmp_path):
    progress.Publisher(tmp_path / "progress.json", {}).begin("label")
    assert progress.Publisher(tmp_path / "progress.json", {}).begin("label") == 0
    (tmp_path / "progress.json").write_text("[1]")
    assert progress.Publisher(tmp_path / "progress.json", {}).begin("label", resumed=True) == 0


def test_stages_that_have_ended_count_for_how_long_it_will_take(tmp_path, monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "time", lambda: now[0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    known = Forecast({"given": 0.5, "sample": 0.2, "label": 0.8}, (), {"sample", "label"})
    with publishing(tmp_path, {}, known) as publisher:
        publisher.skip("given")
        publisher.begin("sft")
        now[0] += 500  # sft is not in the forecast
        publisher.begin("sample")
        now[0] += 40
        publisher.begin("label")
        with progress_bar("Labeling", 8, 4) as advance:  # half of it already existed
            now[0] += 40
            advance(2)
    # After 580 s: 80 s for 0.2 + 0.2 of the run, and 0.2 is left.
    assert "will take about 10 min 20 s in total" in capsys.readouterr().err


def test_what_is_known_of_a_run_beforehand(tmp_path, tiny_model):
    """With a recipe like the quickstart, with an algorithm of unknown duration, and without the data."""
    recipe = tiny_recipe(tmp_path, tiny_model, rl={"total_episodes": 8})
    ahead = [*active_stages(recipe).values()]
    known = forecast(recipe, ahead)
    assert [*known.shares] == ["sample", "label", "reward", "rl", "evaluate"] and not known.unknown
    assert sum(known.shares.values()) == pytest.approx(1) and known.measured == {*known.shares, "report"} - {"evaluate"}
    more = tiny_recipe(tmp_path, tiny_model, rl={"total_episodes": 80})
    assert forecast(more, ahead).shares["rl"] > known.shares["rl"]
    assert forecast(tiny_recipe(tmp_path, tiny_model, rl={"algorithm": "dpo"}), ahead).unknown == ("rl",)
    (tmp_path / "train.jsonl").unlink()
    assert forecast(recipe, ahead) is None


def test_what_the_quickstart_takes_is_foreseen():
    """Within 60% of each stage's share of the time in benchmarks/results/quickstart.md."""
    recipe = parse_recipe(packaged_recipes()["quickstart"], registry=installed_plugins().registry)
    known = forecast(recipe, [*active_stages(recipe).values()])
    seconds = {"sample": 54, "judge": 212, "label": 47, "rl": 419, "evaluate": 80}
    assert known.shares == {name: pytest.approx(took / 812, rel=0.6) for name, took in seconds.items()}


@pytest.mark.parametrize("numbers", [[], "12", {"pairs": 12}, {"pairs": 12, "dropped": 3, "seconds": "long"}])
def test_numbers_that_are_not_as_they_are_written_today(folder, numbers):
    (folder / "results.json").write_text(json.dumps({"sample": numbers}))
    [sample, *_] = read_status(folder.path).stages
    assert (sample.state, sample.summary, sample.seconds) == ("done", "", None)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test advances."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def _labels(folder, run):
    """A label stage that calls ``run`` halfway."""
    with folder.locked(), publishing(folder.state, PRINTS) as publisher:
        folder.begin("label", "l")
        publisher.begin("label")
        with progress_bar("Labeling", 12, 2, "pairs") as advance:
            advance(4)
            run()


def _states(status):
    return [stage.state for stage in status.stages]


# ---- Active runs ------------------------------------------------------------------------------------------


def test_a_stage_at_work_shows_how_far_it_is(folder):
    found = []
    _labels(folder, lambda: (progress._publish(at_once=True), found.append(read_status(folder.path))))
    [status] = found
    assert (status.state, status.name, status.pid) == ("running", "mine", os.getpid())
    assert _states(status) == ["done", "running", "waiting", "waiting"]
    assert status.stages[0].summary == STAGES["sample"].summary(folder.results()["sample"]) == "12 pairs"
    [bar] = status.stages[1].bars
    assert (bar.description, bar.done, bar.total, bar.unit) == ("Labeling", 6, 12, "pairs")
    assert bar.rate > 0 and bar.seconds_left is not None and status.resume == ""
    text = describe(status)
    assert "mine" in text and "sample    done in 1 min 5 s. 12 pairs" in text
    assert "Labeling 6 of 12 (" in text and " pairs/s, " in text and "--resume" not in text


def test_nested_bars_are_told_from_the_outermost_on(folder):
    found = []

    def inside():
        with progress_bar("Judging", 3):
            found.append(read_status(folder.path).stages[1].bars)
        found.append(read_status(folder.path).stages[1].bars)

    _labels(folder, inside)
    assert [[bar.description for bar in bars] for bars in found] == [["Labeling", "Judging"], ["Labeling"]]


def test_the_newest_of_the_metrics_that_matter(folder):
    found = []
    rows = [
        ("rl", 0, {"forgetting/test/win_rate": 0.5}),
        ("rl", 1, {"objective/scores": 1.25, "objective/kl": 0.5, "eps": 3}),
        ("rl", 2, {"objective/scores": float("nan")}),
        ("reward", 9, {"loss": 7.0}),
    ]
    with folder.locked(), publishing(folder.state, PRINTS) as publisher:
        for stage in ("label", "reward", "rl"):
            folder.begin(stage, PRINTS[stage])
            folder.complete(stage, PRINTS[stage])
        folder.begin("rl", "p")
        publisher.begin("rl")
        for row in rows:
            folder.add_metrics(*row)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"stage": "rl", "step": 3, "objective/sc')  # being written
        before = (folder / "metrics.jsonl").read_bytes()
        found = read_status(folder.path).stages[3]
        assert (folder / "metrics.jsonl").read_bytes() == before
    assert found.step == 2
    assert found.metrics == {"objective/scores": None, "objective/kl": 0.5, "forgetting/test/win_rate": 0.5}
    json.dumps(found.metrics, allow_nan=False)


def test_the_time_left_grows_shorter_without_a_word(folder, monkeypatch):
    left = []

    def look():
        progress._publish(at_once=True)
        told = json.loads((folder.state / PROGRESS).read_text())
        told["bars"][0]["seconds_left"] = 5.0
        write_atomically(folder.state / PROGRESS, json.dumps(told))
        for seconds in (0, 3, 10**6):
            monkeypatch.setattr("trl_rlaif.status.snapshot.time.time", lambda s=seconds: told["updated_at"] + s)
            left.append(read_status(folder.path).stages[1].bars[0].seconds_left)

    _labels(folder, look)
    assert left == [pytest.approx(5), pytest.approx(2), 0]


# ---- Inactive runs ----------------------------------------------------------------------------------------


def test_a_run_that_failed_says_why_and_how_to_go_on(folder):
    def fail():
        raise MemoryError("no room for \x1b[31mred")

    with pytest.raises(MemoryError):
        _labels(folder, fail)
    status = read_status(folder.path)
    assert (status.state, _states(status)) == ("interrupted", ["done", "interrupted", "waiting", "waiting"])
    assert status.reason.startswith("MemoryError: no room for") and "\x1b" not in describe(status)
    assert status.resume == f"{COMMAND} --resume" and status.resume_in == os.getcwd()
    assert f"Go on with: {status.resume}" in describe(status)


def test_a_killed_run_is_told_from_one_that_runs(folder):
    """The last status that its process wrote is the same; only the lock is gone."""
    written = []
    _labels(folder, lambda: written.append((folder.state / PROGRESS).read_text()))
    (folder.state / PROGRESS).write_text(written[0])
    with folder.locked():
        assert read_status(folder.path).state == "running"
    status = read_status(folder.path)
    assert (status.state, status.reason) == ("interrupted", "")
    [bar] = status.stages[1].bars
    assert (bar.total, bar.seconds_left) == (12, None)
    assert "no process works on it" in describe(status)


def test_one_that_was_asked_for_a_stage_alone_has_ended(folder):
    text = json.dumps({"run": {}, "command": "trl-rlaif run a --only label --resume"})
    write_atomically(folder / "recipe.yaml", text)
    with folder.locked(), publishing(folder.state, PRINTS):
        folder.begin("label", "l")
        folder.complete("label", "l")
    status = read_status(folder.path)
    assert (status.state, _states(status)) == ("ended", ["done", "done", "waiting", "waiting"])
    assert status.resume == "trl-rlaif run a --resume"


def test_a_stage_that_will_be_made_anew_is_not_done(folder):
    with folder.locked(), publishing(folder.state, PRINTS | {"sample": "other settings"}):
        assert _states(read_status(folder.path))[0] == "waiting"


def test_nothing_in_the_folder_is_changed(folder):
    before = {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in folder.path.rglob("*")}
    folder.state.chmod(0o500)
    try:
        assert read_status(folder.path).state == "interrupted"
    finally:
        folder.state.chmod(0o700)
    assert {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in folder.path.rglob("*")} == before


@pytest.mark.parametrize("content", [None, "", "[1]", "a: [", "\x00"])
def test_a_folder_of_no_run_is_refused(tmp_path, content):
    folder = tmp_path / "other"
    if content is not None:
        RunFolder(folder)
        (folder / "recipe.yaml").write_text(content)
    with pytest.raises(UserError, match="no (readable|such)"):
        read_status(folder)
    with pytest.raises(UserError):
        app(["status", str(folder)], standalone_mode=False)


# ---- The command ------------------------------------------------------------------------------------------


def test_it_answers_without_loading_a_heavy_library(folder):
    code = (
        "import sys; sys.argv = ['trl-rlaif', 'status', sys.argv[1], '--json']\n"
        "from trl_rlaif.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'trl', 'datasets', 'matplotlib', 'numpy') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(folder.path)]
    told, loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert loaded == "[]"
    assert json.loads(told)["stages"][0] == {
        "name": "sample", "state": "done", "seconds": 65.0, "summary": "12 pairs", "bars": [], "step": None,
        "metrics": {},
    }  # fmt: skip


def test_watching_ends_with_the_run(folder, monkeypatch, capsys):
    looks = []
    monkeypatch.setattr("trl_rlaif.status.showing.time.sleep", lambda seconds: looks.append(seconds))

    def watch():
        for status in follow(folder.path):
            assert status.state == "running"
            if len(looks) == 2:
                raise KeyboardInterrupt  # ends the run

    with pytest.raises(KeyboardInterrupt):
        _labels(folder, watch)
    assert looks == [2.0, 2.0]
    app(["status", str(folder.path), "--watch"], standalone_mode=False)
    assert len(looks) == 2 and "interrupted: it was stopped" in capsys.readouterr().out


# ---- Progress ---------------------------------------------------------------------------------------------


def test_a_word_a_second_is_enough(folder, clock):
    def told():
        return json.loads((folder.state / PROGRESS).read_text())["bars"][0]["done"]

    with publishing(folder.state, PRINTS), progress_bar("Labeling", 100) as advance:
        seen = []
        for _ in range(12):
            clock.now += 0.25
            advance(1)
            seen.append(told())
    assert seen == [0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12]


def test_a_full_disk_does_not_end_a_run(folder, monkeypatch):
    full = []

    def replace(*paths):
        full.append(paths)
        raise OSError(28, "No space left on device")

    with publishing(folder.state, PRINTS), monkeypatch.context() as patch:
        patch.setattr(progress.os, "replace", replace)
        with progress_bar("Labeling", 2) as advance:
            advance(2)
    assert full


def test_outside_a_run_nothing_is_told(tmp_path, monkeypatch):
    with publishing(tmp_path, PRINTS):
        pass
    (tmp_path / PROGRESS).unlink()
    with progress_bar("Labeling", 2) as advance:
        advance(2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rate", "left", "unit", "words"),
    [
        (3.21, 125.0, "pairs", "3.2 pairs/s, 2 min 5 s left"),
        (250.0, 4.0, "", "250/s, 4.0 s left"),
        (0.05, 60.0, "updates", "3.0 updates/min, 1 min 0 s left"),
        (0.001, 7200.0, "steps", "3.6 steps/h, 2 h 0 min left"),
        (None, None, "pairs", ""),
    ],
)
def test_rates_in_words(rate, left, unit, words):
    assert pace(rate, left, unit) == words


def test_what_was_done_before_does_not_count_for_the_rate(clock):
    meter = Meter("Labeling", 100, 60)
    clock.now += 10
    assert meter.rate is None and meter.seconds_left is None
    meter.done += 20
    assert (meter.rate, meter.seconds_left) == (2.0, 10.0)


def test_without_a_terminal_a_line_now_and_then(clock, monkeypatch, capsys):
    monkeypatch.setattr(progress, "console", Console(stderr=True, force_terminal=False))
    with progress_bar("Labeling", 100, 20, "pairs") as advance:
        for _ in range(5):
            clock.now += 15
            advance(5)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "  Labeling: 30 of 100, 20.0 pairs/min, 3 min 30 s left",
        "  Labeling: 40 of 100, 20.0 pairs/min, 3 min 0 s left",
    ]


def test_on_a_terminal_nested_bars_are_lines_of_one_display(monkeypatch, capsys):
    monkeypatch.setattr(progress, "console", Console(stderr=True, force_terminal=True, width=120))
    with progress_bar("Training", 4, 0, "updates") as advance:
        with progress_bar("Judging [set]", 7) as inner:
            inner(3)
            time.sleep(0.01)
            advance(1)
            progress._display.refresh()
        progress._display.refresh()
    assert progress._display is None and progress._open == []
    shown = capsys.readouterr().err
    assert "Judging [set]" in shown and "3/7" in shown and "1/4" in shown and " updates/s, " in shown


# ---- Real stages ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watched(tiny_model, tmp_path_factory):
    """A whole tiny run with a tracker: its folder, the tracker's logs by stage, and every published bar."""
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    got, bars = [], {}

    class Tracker(TrainerCallback):
        """A stand-in for wandb's callback."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            got.append((os.path.basename(args.output_dir), args.run_name, state.global_step, dict(logs)))

    def record(self, *, at_once=False):
        for meter in progress._open:
            bars.setdefault(self._state["stage"], {})[meter.description] = (meter.done, meter.total, meter.unit)

    base = tmp_path_factory.mktemp("watched")
    (base / "sft.jsonl").write_text('{"prompt": "what?", "completion": " a city"}\n' * 4)
    recipe = tiny_recipe(
        base,
        tiny_model,
        sft={"data": "sft.jsonl", "max_steps": 2, "per_device_train_batch_size": 2, "report_to": "wandb"},
        reward={"report_to": ["wandb"], "num_train_epochs": 1},
        rl={"report_to": "wandb", "total_episodes": 8},
        evaluate={"sets": {"test": str(base / "test.jsonl")}, "track_every": 1},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Tracker)
        patch.setattr(progress.Publisher, "publish", record)
        folder = run_recipe(recipe, installed_plugins(), base / "out", command="trl-rlaif run tiny")
    return folder, got, bars


def test_a_tracker_gets_the_metrics_by_their_names(watched):
    folder, got, _ = watched
    summaries = ("train_runtime", "eval_runtime")
    tracked = [
        {"stage": stage, "step": step, **{k: v for k, v in logs.items() if isinstance(v, int | float)}}
        for stage, _, step, logs in got
        if not any(name in logs for name in summaries)
    ]
    assert tracked == read_lines(folder / "metrics.jsonl")
    assert {row["stage"] for row in tracked} == {"sft", "reward", "rl"}
    assert any("objective/scores" in row for row in tracked) and any("forgetting/test/nll" in row for row in tracked)
    assert {name for _, name, *_ in got} == {"tiny"}


def test_every_stage_says_how_far_it_is(watched):
    folder, _, bars = watched
    assert list(bars) == [stage.name for stage in read_status(folder.path).stages]
    for stage, shown in bars.items():
        for description, (done, total, unit) in shown.items():
            assert done == total > 0, (stage, description)
            assert unit or stage == "report", (stage, description)


def test_a_finished_run_is_done(tiny_model, tmp_path):
    recipe = write_recipe(tmp_path, tiny_model, label=None, reward=None, rl=None, evaluate=None, report=None)
    app(["run", str(recipe), "--output", str(tmp_path / "out")], standalone_mode=False)
    status = read_status(tmp_path / "out")
    assert (status.state, status.resume, _states(status)) == ("done", "", ["done"])
    assert status.stages[0].seconds > 0 and status.stages[0].summary


def test_a_comparison_is_told_by_arms(tmp_path):
    from trl_rlaif.status import describe

    resolved = {"run": {"name": "all"}, "compare": [{"plain": {}}, {"direct": {}}, {"dpo": {}}], "rl": {}}
    (tmp_path / ".state").mkdir()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(resolved))
    for name, complete in (("plain", True), ("direct", False)):
        run = tmp_path / "variants" / name
        (run / ".state").mkdir(parents=True)
        (run / "recipe.yaml").write_text(yaml.safe_dump({"run": {"name": "all"}, "rl": {}}))
        (run / ".state" / "rl.json").write_text(json.dumps({"fingerprint": "f", "complete": complete}))
        (run / "results.json").write_text(json.dumps({"rl": {"seconds": 5.0}} if complete else {}))
    with (tmp_path / ".state" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = read_status(tmp_path)
        assert [(s.name, s.state) for s in found.stages] == [
            ("plain", "done"), ("direct", "interrupted"), ("dpo", "waiting"), ("compare", "waiting"),
        ]  # fmt: skip
        assert found.stages[0].seconds == 5.0 and "interrupted: rl" in describe(found)
    assert read_status(tmp_path).state == "interrupted"


def test_what_is_one_unit_as_a_whole_has_no_rate(clock):
    meter = progress.Meter("Writing the report", 1)
    clock.now += 124
    meter.done = 1
    assert meter.rate is None and progress.pace(meter.rate, meter.seconds_left) == ""
