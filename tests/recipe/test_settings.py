"""Settings of TRL's trainers that no run can use are refused with their line before any stage runs."""

from __future__ import annotations

import pytest
from helpers.recipes import run_cli, tiny_recipe, write_recipe
from helpers.tiny import save_tiny_model

from trl_rlaif.errors import UserError
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.training import settings_of
from trl_rlaif.plugins import installed_plugins

HEAD = "model: {path: gpt2}\ndata: {prompts: prompts.jsonl, pairs: pairs.jsonl, format: preference}\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def write_finetuning(path):
    path.write_text('{"prompt": "a", "completion": "b"}\n')


@pytest.mark.parametrize(
    ("section", "line", "fix"),
    [
        ("rl", "eval_strategy: steps", "reward.eval_fraction"),
        ("reward", "eval_on_start: true", "reward.eval_fraction"),
        ("reward", "load_best_model_at_end: true", "reward.eval_fraction"),
        ("reward", "length_column_name: size", "knows the lengths"),
        ("rl", "algorithm: dpo\n  train_sampling_strategy: group_by_length", "no length"),
        ("rl", "save_strategy: best", "reward.eval_fraction"),
        ("rl", "algorithm: rloo\n  remove_unused_columns: true", "the columns of the prompts"),
        ("rl", "log_level: loud", "Write one of detail, debug"),
        ("rl", "ddp_backend: gloo", "accelerate launch"),
        ("reward", "deepspeed: zero.json", "accelerate launch"),
        ("reward", "lr_scheduler_kwargs: power", "Write a mapping or null."),
    ],
)
def test_what_no_run_can_use_is_refused_with_its_line(only, section, line, fix):
    problem = only(f"{HEAD}reward:\n  eval_fraction: 0\n{'rl:' if section == 'rl' else ''}\n  {line}\n")
    assert problem.where.startswith("recipe.yaml:") and fix in problem.fix


@pytest.mark.parametrize(
    ("section", "keys", "said"),
    [
        ("sft", {"dataloader_prefetch_factor": 2}, "dataloader_num_workers"),
        ("reward", {"dataloader_prefetch_factor": 2}, "dataloader_num_workers"),
        ("rl", {"dataloader_prefetch_factor": 2}, "dataloader_num_workers"),
        ("rl", {"dataloader_persistent_workers": True}, "num_workers"),
        ("reward", {"activation_offloading": True}, "there is none"),
        ("rl", {"optim": "lomo"}, "lomo"),
        ("sft", {"use_liger_kernel": True}, "needs the package liger-kernel"),
        ("reward", {"optim_args": "lr"}, "unpack"),
        ("reward", {"lr_scheduler_kwargs": {"powers": 2}}, "powers"),
        ("reward", {"report_to": ["paper"]}, "paper is not supported"),
        ("rl", {"algorithm": "dpo", "dataloader_prefetch_factor": 2}, "dataloader_num_workers"),
        ("rl", {"algorithm": "dpo", "loss_type": ["sigmoid", "loud"]}, "loss_type is 'loud'; DPOTrainer knows"),
        ("rl", {"algorithm": "grpo", "loss_type": "loud"}, "loss_type is 'loud'; GRPOTrainer knows"),
        ("rl", {"algorithm": "grpo", "scale_rewards": "loud"}, "scale_rewards is 'loud'"),
        ("rl", {"algorithm": "grpo", "num_generations": 3}, "num_generations"),
        ("rl", {"algorithm": "rloo", "fp16": True}, "fp16"),
    ],
)
@pytest.mark.parametrize("command", ["check", "run"])
def test_what_trl_refuses_is_found_before_anything_is_computed(
    model, tmp_path, monkeypatch, capsys, command, section, keys, said
):
    write_finetuning(tmp_path / "sft.jsonl")
    keys = {**({"data": "sft.jsonl"} if section == "sft" else {}), **keys}
    recipe = write_recipe(tmp_path, model, **{section: keys})
    output = ("--output", tmp_path / "out") if command == "run" else ()
    code, message = run_cli(monkeypatch, capsys, command, recipe, *output)
    assert code == 2 and said in message
    assert str(recipe) in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("section", ["sft", "dpo", "grpo", "rloo", "reward", "ppo"])
def test_bf16_null_means_the_same_in_every_trainer(model, tmp_path, monkeypatch, section, fast):
    """TRL's own configs treat null as true: GRPO's log-probabilities then differed from its scorer's."""
    from trl_rlaif.pipeline.trial import _config

    monkeypatch.setattr("trl_rlaif.hardware.computes_bfloat16", lambda device: fast)
    write_finetuning(tmp_path / "sft.jsonl")
    sections = {"sft": {"sft": {"data": "sft.jsonl", "bf16": None}}, "reward": {"reward": {"bf16": None}}}
    changed = sections.get(section, {"rl": {"algorithm": section, "bf16": None}})
    context = Context(tiny_recipe(tmp_path, model, **changed), RunFolder(tmp_path / "run"), installed_plugins())
    assert _config(context, next(iter(changed))).bf16 is fast


def test_every_loss_that_trl_documents_is_taken():
    from trl import DPOConfig, GRPOConfig

    from trl_rlaif.pipeline.trial import _check_texts

    for loss in (
        "sigmoid",
        "hinge",
        "ipo",
        "exo_pair",
        "nca_pair",
        "robust",
        "bco_pair",
        "sppo_hard",
        "aot",
        "apo_zero",
    ):
        _check_texts(DPOConfig(output_dir="x", loss_type=[loss], use_cpu=True, bf16=False), "DPOTrainer")
    for loss in ("grpo", "dapo", "dr_grpo", "bnpo"):
        _check_texts(GRPOConfig(output_dir="x", loss_type=loss, use_cpu=True, bf16=False), "GRPOTrainer")


def test_a_trainers_refusal_names_the_section_and_a_full_disk_does_not(model, tmp_path):
    recipe = tiny_recipe(tmp_path, model)
    with (
        pytest.raises(UserError, match=r"recipe\.yaml:\d+: .*section 'reward' .*: no pad token"),
        settings_of(recipe, "reward"),
    ):
        raise ValueError("no pad token")
    with pytest.raises(UserError, match="ImportError: wandb"), settings_of(recipe, "reward"):
        raise ImportError("wandb")
    with pytest.raises(OSError, match="No space"), settings_of(recipe, "reward"):
        raise OSError(28, "No space left on device")
    with pytest.raises(UserError, match=r"recipe\.yaml:\d+: its own$"), settings_of(recipe, "reward"):
        raise UserError("its own")
