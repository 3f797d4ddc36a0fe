"""`rl.algorithm: rloo | grpo` on a tiny model: TRL's own numbers with nothing added, and this project's additions."""

from __future__ import annotations

import json
import shutil
from copy import copy

import pytest
import torch
from helpers.group_processes import NONE, TRAINERS, plain_trainer
from helpers.recipes import tiny_recipe, write_recipe
from safetensors.torch import load_file

from trl_rlaif import UserError
from trl_rlaif.evaluation.forgetting import mean_nll
from trl_rlaif.files import read_lines, read_state, write_state
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.pipeline.work.grpo_rloo import build_trainer
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import parse_recipe
from trl_rlaif.rl.rehearsal import batch_size

pytestmark = pytest.mark.trl

PLAIN = {"rewards": ["helpers.rewards:even_share"], "num_generations": 2, "kl_coef": 0.1, "save_steps": 100}


def run(folder, model, algorithm, **sections):
    recipe = tiny_recipe(folder, model, **sections | {"rl": PLAIN | {"algorithm": algorithm} | sections.get("rl", {})})
    return run_recipe(recipe, installed_plugins(), folder / "out")


def logged(folder):
    return [row for row in read_lines(folder / "metrics.jsonl") if row["stage"] == "rl"]


@pytest.mark.parametrize("algorithm", TRAINERS)
def test_with_nothing_added_the_policy_is_trls(tiny_model, tmp_path, algorithm):
    folder = run(tmp_path, tiny_model, algorithm, **NONE)
    context = Context(tiny_recipe(tmp_path, tiny_model), folder, installed_plugins())
    trainer = plain_trainer(
        context, tmp_path, algorithm, max_steps=6, learning_rate=1e-3, per_device_train_batch_size=4
    )
    trainer.train()
    ours = logged(folder)
    theirs = [row for row in trainer.state.log_history if "reward" in row]
    assert len(ours) == len(theirs) == 6
    assert len({round(row["reward"], 6) for row in ours}) > 1 and abs(ours[-1]["kl"]) > 1e-6  # the policy moved
    for mine, plain in zip(ours, theirs, strict=True):
        for name in ("reward", "kl", "loss", "completions/mean_length"):
            assert mine[name] == pytest.approx(plain[name], rel=1e-4, abs=1e-6), name
    trainer.save_model(str(tmp_path / "policy"))
    plain = load_file(tmp_path / "policy" / "adapter_model.safetensors")
    policy = load_file(folder / "policy" / "adapter_model.safetensors")
    assert plain.keys() == policy.keys()
    for name, value in plain.items():
        torch.testing.assert_close(policy[name], value, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo")
    rl = {
        "algorithm": "grpo",
        "rewards": ["reward", "helpers.rewards:length_penalty"],
        "transforms": ["advantage", "distribution_regulator"],
        "selectors": [{"selective_rehearsal": {"clusters": 2, "per_cluster": 2}}],
        "rehearsal_coef": 0.5,
        "cliprange": 0.1,
        "gamma": 0.9,
    }
    recipe = tiny_recipe(
        folder, tiny_model, rl=PLAIN | rl, reward={"transforms": ["advantage"]},
        evaluate={"max_new_tokens": 8, "sets": {"forget": "test.jsonl"}, "track_every": 3},
    )  # fmt: skip
    return run_recipe(recipe, installed_plugins(), folder / "out")


def test_rewards_transforms_and_pairs_take_part(finished):
    rows, numbers = [row for row in logged(finished) if "reward" in row], finished.results()["rl"]
    assert len(rows) == numbers["updates"] == 6 and numbers["episodes"] == 24
    assert numbers["kl_last"] == pytest.approx(rows[-1]["kl"] * rows[-1]["completions/mean_length"])  # as in PPO
    for row in rows:
        assert row["reward"] == pytest.approx(row["objective/scores"], abs=1e-5)
        assert {"score/model", "score/length_penalty", "rehearsal/nll", "kl"} <= row.keys()
    assert {"reward/a", "reward/b"} <= {name for row in rows for name in row}
    assert numbers["rehearsal"]["pairs"] == 4 and 0 < numbers["rehearsal"]["share_of_time"] < 1
    assert len(read_lines(finished / "rehearsal.jsonl")) == 4
    assert "gamma" in numbers["unused"] and not {"cliprange", "kl_coef", "total_episodes"} & set(numbers["unused"])


def test_rehearsal_holds_what_it_rehearses(tiny_model, tmp_path):
    found = {}
    for coef in (0.0, 5.0):
        folder = tmp_path / str(coef)
        folder.mkdir()
        selectors = [{"selective_rehearsal": {"clusters": 2, "per_cluster": 2}}]
        rl = PLAIN | {"algorithm": "rloo", "selectors": selectors, "rehearsal_coef": coef, "learning_rate": 1e-2}
        plugins, recipe = installed_plugins(), tiny_recipe(folder, tiny_model, rl=rl, **NONE)
        trainer, _, _ = build_trainer(Context(recipe, RunFolder(folder / "out"), plugins))
        scorer = trainer.scorer
        wide = copy(scorer.args)
        wide.local_mini_batch_size = 32
        assert batch_size(wide) == 4  # an eighth: there is no value model
        scorer.selection.take(scorer.selection.choose(0))
        trainer.train()
        pairs = scorer.rehearsal.pairs
        found[coef] = mean_nll(scorer.role_models, "policy", pairs, batch_size=4, device=torch.device("cpu"))
    assert found[5.0] < found[0.0] - 0.1


def test_forgetting_is_measured_and_the_report_is_there(finished):
    rows = logged(finished)
    assert [row["step"] for row in rows if "forgetting/forget/nll" in row] == [0, 3, 6]
    assert finished.results()["rl"]["forgetting"]["forget"]["prompts"] == 4
    assert (finished / "report.html").exists() and "win_rate" in finished.results()["evaluate"]["sets"]["forget"]


def test_a_resumed_run_takes_up_the_transforms_state(finished, tiny_model, tmp_path):
    from trl_rlaif.rl.grpo_rloo.trainer import ScorerCallback, kept_state

    recipe = tiny_recipe(tmp_path, tiny_model, rl=PLAIN | {"algorithm": "rloo", "save_steps": 2,
                         "transforms": ["distribution_regulator"]}, **NONE)  # fmt: skip
    plugins = installed_plugins()
    folder = run_recipe(recipe, plugins, tmp_path / "out")
    trainer, _, _ = build_trainer(Context(recipe, folder, plugins))
    [kept] = kept_state(folder / "checkpoints" / "rl" / "checkpoint-6")["processes"]
    [transform] = trainer.scorer.rewards.transforms
    assert str(transform.state_dict()) != str(kept["transforms"][0])
    trainer.state.global_step, trainer.state.max_steps = 6, 6
    ScorerCallback(trainer).on_train_begin(trainer.args, trainer.state, trainer.control)
    assert str(transform.state_dict()) == str(kept["transforms"][0])
    shutil.rmtree(folder / "checkpoints")


def test_a_resumed_run_goes_on_with_what_was_chosen_last(tiny_model, tmp_path):
    selectors = [{"selective_rehearsal": {"clusters": 2, "per_cluster": 2}}]
    rl = {"selectors": selectors, "selection_every": 2, "rehearsal_coef": 0.5, "save_steps": 2, "save_total_limit": 9}
    recipe = tiny_recipe(tmp_path, tiny_model, rl=PLAIN | rl | {"algorithm": "grpo"}, **NONE)
    folder = run_recipe(recipe, installed_plugins(), tmp_path / "out")
    whole = [row for row in logged(folder) if "reward" in row]
    policy = load_file(folder / "policy" / "adapter_model.safetensors")
    pairs = read_lines(folder / "rehearsal.jsonl")
    assert len({row["rehearsal/nll"] for row in whole}) == 6
    # As a kill after the fourth step leaves it.
    shutil.rmtree(folder / "checkpoints" / "rl" / "checkpoint-6")
    shutil.rmtree(folder / "policy")
    (folder / "checkpoints" / "rl" / "rehearsal.jsonl").unlink()
    marker = folder.state / "rl.json"
    write_state(marker, read_state(marker, "") | {"complete": False})
    run_recipe(recipe, installed_plugins(), tmp_path / "out", resume=True)
    again = [row for row in logged(folder) if "reward" in row]
    for before, after in zip(whole, again, strict=True):
        same = {name for name in before if "time" not in name}
        assert {n: after[n] for n in same} == pytest.approx({n: before[n] for n in same}, nan_ok=True)
    assert read_lines(folder / "rehearsal.jsonl") == pairs
    for name, value in load_file(folder / "policy" / "adapter_model.safetensors").items():
        assert torch.equal(value, policy[name]), name


def test_the_start_of_sft_is_policy_and_reference(tiny_model, tmp_path):
    (tmp_path / "sft.jsonl").write_text(json.dumps({"prompt": "what?", "completion": "the fox"}) + "\n")
    sft = {"data": "sft.jsonl", "max_steps": 2, "per_device_train_batch_size": 1, "learning_rate": 0.1}
    recipe = tiny_recipe(tmp_path, tiny_model, sft=sft, rl=PLAIN | {"algorithm": "rloo"}, **NONE)
    plugins = installed_plugins()
    folder = run_recipe(recipe, plugins, tmp_path / "out", only=["sft"])
    trainer, _, _ = build_trainer(Context(recipe, folder, plugins))
    state, start = dict(trainer.model.named_parameters()), load_file(folder / "sft" / "adapter_model.safetensors")
    for name, value in start.items():
        for adapter in ("policy", "reference", "ref"):
            parameter = state[name.replace(".weight", f".{adapter}.weight")]
            torch.testing.assert_close(parameter.detach(), value, rtol=0, atol=0)
            assert parameter.requires_grad == (adapter == "policy")


def test_settings_that_do_not_fit_are_said(tiny_model, tmp_path):
    recipe = tiny_recipe(tmp_path, tiny_model, rl=PLAIN | {"algorithm": "grpo", "num_generations": 3}, **NONE)
    with pytest.raises(UserError, match="divisible by num_generations|num_generations"):
        run_recipe(recipe, installed_plugins(), tmp_path / "out")
    path = write_recipe(tmp_path, tiny_model, rl=PLAIN | {"algorithm": "grpo", "num_generation": 3}, **NONE)
    with pytest.raises(UserError, match="num_generations"):
        parse_recipe(path, registry=installed_plugins().registry)


@pytest.mark.parametrize("algorithm", TRAINERS)
@pytest.mark.parametrize(
    ("written", "beta"),
    [({}, 0.05), ({"kl_coef": 0.2}, 0.2), ({"beta": 0.3, "kl_coef": 0.2}, 0.3), ({"kl_coef": 0.0}, 0.0)],
)
def test_the_price_of_kl_is_the_documented_one(tiny_model, tmp_path, algorithm, written, beta):
    rl = {"rewards": PLAIN["rewards"], "num_generations": 2, "algorithm": algorithm} | written
    recipe = tiny_recipe(tmp_path, tiny_model, rl=rl, **NONE)
    trainer, _, _ = build_trainer(Context(recipe, RunFolder(tmp_path / "out"), installed_plugins()))
    assert trainer.beta == trainer.args.beta == beta
