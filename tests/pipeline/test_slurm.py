"""recipes/slurm/label.sh with fakes for Slurm's commands: submitted jobs run immediately."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest
from helpers.labeling import LABEL_ALONE, make_pairs, preferences
from helpers.recipes import write_recipe, write_rows

from trl_rlaif import cli
from trl_rlaif.files import read_lines
from trl_rlaif.pipeline.judges import Judges
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import parse_recipe

SCRIPT = Path(__file__).parents[2] / "recipes/slurm/label.sh"
# Skips the options, runs the script once or once per array task, and fails if any of them fails.
SBATCH = r"""#!/usr/bin/env bash
printf '%s\n' "$*" >>"$LOG"
array=
while [[ $1 == --* ]]; do
    case $1 in --array=*) array=${1#--array=} ;; esac
    shift
done
if [[ $array ]]; then
    for id in $(seq "${array%-*}" "${array#*-}"); do SLURM_ARRAY_TASK_ID=$id bash "$@" >&2 || failed=1; done
else
    bash "$@" >&2 || failed=1
fi
echo "$(wc -l <"$LOG");cluster"
exit ${failed:-0}
"""
SRUN = '#!/usr/bin/env bash\n[[ ${SLURM_ARRAY_TASK_ID:-} == "${FAILS:-none}" ]] && exit 9\nexec "$@"\n'
# The command itself runs in the test process, where everything is already imported.
COMMAND = r"""#!/usr/bin/env bash
printf '%s\0' "$@" >"$ASKED"
read -r code out <"$ANSWERED"
printf '%s\n' "$out"
exit "$code"
"""


@pytest.fixture
def submit(tmp_path, monkeypatch, capsys):
    """Run the script with the fake commands; returns its exit code, its output and the submitted jobs."""
    (tmp_path / "bin").mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "trl-rlaif": COMMAND}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    asked, answered, log = (tmp_path / name for name in ("asked", "answered", "log"))
    os.mkfifo(asked)
    os.mkfifo(answered)
    places = {"ASKED": asked, "ANSWERED": answered, "LOG": log, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}

    def run(*arguments, **more):
        log.write_text("")
        env = os.environ | {name: str(value) for name, value in (places | more).items()}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(["bash", SCRIPT, *arguments], env=env, **pipes)
        threading.Thread(target=lambda: (process.wait(), asked.write_text("")), daemon=True).start()
        while command := asked.read_text():
            answered.write_text("{} {}\n".format(*called(command.split("\0")[:-1])))
        return process.returncode, process.stdout.read(), log.read_text().splitlines()

    def called(command):
        monkeypatch.setattr("sys.argv", ["trl-rlaif", *command])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code or 0, capsys.readouterr().out.strip().replace("\n", " ")

    return run


@pytest.fixture
def recipe(tiny_model, tmp_path):
    write_rows(tmp_path / "pairs.jsonl", make_pairs(7))
    data = {"prompts": None, "eval_prompts": None, "pairs": "pairs.jsonl"}
    return str(write_recipe(tmp_path, tiny_model, data=data, **LABEL_ALONE))


def labels(folder):
    return {row["id"]: row for row in read_lines(folder / "labels.jsonl")}


def test_the_script_is_one_that_bash_reads():
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0


def test_shares_that_are_joined_are_one_run(submit, recipe, tmp_path, monkeypatch):
    plugins = installed_plugins()
    whole = run_recipe(parse_recipe(recipe, registry=plugins.registry), plugins, tmp_path / "whole")
    code, said, submitted = submit(recipe, str(tmp_path / "run"), "3", "--gpus=1", FAILS="2")
    assert code == 1 and len(submitted) == 2  # shares are joined only when all are complete
    assert all("--gpus=1" in one and one.endswith(f"{recipe} {tmp_path / 'run'} 3") for one in submitted)
    assert "--dependency=afterok:1 --array=1-3" in submitted[1]
    shares = tmp_path / "run.shares"
    before = {name: (shares / name / "labels.jsonl").read_bytes() for name in ("1-of-3", "3-of-3")}
    assert not (tmp_path / "run" / "labels.jsonl").exists()

    loaded = []
    load = Judges.load
    monkeypatch.setattr(Judges, "load", lambda self, *args: loaded.append(self.context.folder) or load(self, *args))
    code, said, submitted = submit(recipe, str(tmp_path / "run"), "3", "--gpus=1")
    assert code == 0 and "Jobs: 1 (pairs), 2 (labels, 3 shares), 3 (join)." in said, said
    assert "--dependency=afterok:2" in submitted[2] and submitted[2].count("--array") == 0
    assert [folder.path.name for folder in loaded] == ["2-of-3"]  # existing labels are kept
    content = (tmp_path / "run" / "labels.jsonl").read_bytes()
    assert all(lines in content for lines in before.values()) and not shares.exists()
    ours, theirs = labels(tmp_path / "run"), labels(whole.path)
    assert ours.keys() == theirs.keys() and len(ours) == 7
    for id, row in ours.items():
        assert row["p"] == pytest.approx(theirs[id]["p"], abs=1e-5)
    assert preferences(RunFolder(tmp_path / "run")).keys() == preferences(whole).keys()

    code, said, _ = submit(recipe, str(tmp_path / "run"), "2", "--gpus=1")  # nothing is left to do
    assert code == 0 and len(loaded) == 1 and labels(tmp_path / "run") == ours, said
