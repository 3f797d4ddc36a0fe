"""A resumed run is the same run, or it is refused: PPO, rejection sampling, RLOO, GRPO, SFT, DPO, reward models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from helpers.group_processes import NONE
from helpers.ppo import numbers, small_trainer
from helpers.recipes import WORDS, tiny_recipe
from helpers.tiny import make_llama, make_scorer, make_tokenizer
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl_rlaif_regulator import Clip
from trl_rlaif_rehearsal.rejection import RejectionSampling

from trl_rlaif import RewardConfig, RewardTrainer, RewardTransform, UserError, content, run_identity
from trl_rlaif.files import read_state, write_state
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.pipeline.work.grpo_rloo import build_trainer
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.rl.rejection import RejectionTrainer
from trl_rlaif.run_identity import BATCH_SIZE, FILE, SameRun

pytestmark = pytest.mark.trl

WRITTEN = "when the checkpoint was written"


def _prompts(count=32, first="what"):
    texts = [f"{first if i == 0 else 'what'} is the {WORDS[i % 10]} {i}?" for i in range(count)]
    return Dataset.from_dict({"prompt": texts, "answer": [str(i) for i in range(count)]})


def _ppo(folder, **options):
    """Four updates of eight responses, once over 32 prompts; ``trainer.drawn`` has the prompts that it sampled for."""
    settings = {"total_episodes": 32, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = small_trainer(folder, **{"dataset": _prompts(), "response_length": 4} | settings | options)
    trainer.drawn, sample = [], trainer.sample
    trainer.sample = lambda batch: (trainer.drawn.extend(batch["prompt"]), sample(batch))[1]
    return trainer


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run's folder with the checkpoint of its second update, and the whole run."""
    folder = tmp_path_factory.mktemp("ppo")
    trainer = _ppo(folder)
    trainer.train()
    assert len(set(trainer.drawn)) == len(trainer.drawn) == trainer.state.episode == 32
    shutil.rmtree(folder / "checkpoint-4")
    return folder, trainer


def _copy(stopped, tmp_path) -> Path:
    return shutil.copytree(stopped[0], tmp_path / "run")


def test_a_resumed_run_draws_for_every_prompt_once(stopped, tmp_path):
    resumed = _ppo(_copy(stopped, tmp_path), save_steps=1, logging_steps=5, micro_batch_tokens=64)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.drawn == stopped[1].drawn[16:] and resumed.state.episode == 32


@pytest.mark.parametrize(("rows", "steps"), [(8, 1), (1, 8)])
def test_a_batch_may_be_split_otherwise(stopped, tmp_path, rows, steps):
    sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
    resumed = _ppo(_copy(stopped, tmp_path), **sizes)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.drawn == stopped[1].drawn[16:]
    for mine, theirs in zip(numbers(resumed), numbers(stopped[1]), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"gradient_accumulation_steps": 1}, f"{BATCH_SIZE} was 8 {WRITTEN}, and is 4 now."),
        ({"dataset": _prompts(31)}, f"had 32 rows {WRITTEN}, and have 31 now."),
        ({"dataset": _prompts(first="who")}, f"The column 'prompt' of the training data is not what it was {WRITTEN}."),
        ({"dataset": _prompts().rename_column("answer", "x").add_column("answer", ["?"] * 32)}, "The column 'answer'"),
        ({"num_mini_batches": 2}, f"num_mini_batches was 1 {WRITTEN}, and is 2 now."),
        ({"learning_rate": 1e-3}, f"learning_rate was 0.01 {WRITTEN}, and is 0.001 now."),
        ({"kl_coef": 0.5, "seed": 1}, f"kl_coef was 0.05 {WRITTEN}, and is 0.5 now."),
        ({"trainer_kwargs": {"reward_funcs": [lambda prompts, **_: [0.0] * len(prompts)]}}, "'length_penalty'"),
    ],
    ids=["batch", "fewer prompts", "another prompt", "another answer", "minibatches", "rate", "price of KL", "reward"],
)
def test_another_run_is_refused_with_both_values(stopped, tmp_path, options, found):
    folder = _copy(stopped, tmp_path)
    trainer = _ppo(folder, **options)
    with pytest.raises(UserError) as error:
        trainer.train(resume_from_checkpoint=True)
    assert found in str(error.value) and str(folder / "checkpoint-2") in str(error.value)
    assert "start a new run in another folder" in str(error.value)
    assert trainer.drawn == []
    if "seed" in options:
        assert "seed was 42" in str(error.value)


class Foreign(RewardTransform):
    """A third-party transform that keeps its options elsewhere."""

    def __init__(self):
        pass


def _without_options(checkpoint: Path) -> None:
    """Make a checkpoint like older ones, without the options of components and the scorer's settings."""
    kept = json.loads((checkpoint / FILE).read_text())
    kept["settings"] = {name: value for name, value in kept["settings"].items() if "." not in name}
    (checkpoint / FILE).write_text(json.dumps(kept))
    content.record(checkpoint)


def test_a_changed_option_of_a_component_is_refused_with_both_values(tmp_path, capsys):
    def trainer(high=5.0, drawn=2):
        transforms = [Clip(high=3.0), Foreign(), Clip(high=high)]
        kwargs = {"reward_transforms": transforms, "data_selectors": [RejectionSampling(num_responses=drawn)]}
        return _ppo(tmp_path, trainer_kwargs=kwargs)

    first = trainer()
    first.begin(None)
    first.checkpoints.save()
    with pytest.raises(UserError) as error:
        trainer(high=4.0, drawn=3).begin(True)
    assert f"reward_transforms.Clip 2.high was 5.0 {WRITTEN}, and is 4.0 now." in str(error.value)
    assert "Clip.high" not in str(error.value) and "RejectionSampling" not in str(error.value)
    # A selector that has not accepted anything may get other options.
    trainer(drawn=3).begin(True)
    assert "data_selectors.RejectionSampling.num_responses was 2" in " ".join(capsys.readouterr().err.split())
    trainer().begin(True)
    _without_options(tmp_path / "checkpoint-0")
    trainer(high=4.0, drawn=3).begin(True)


def test_options_that_json_cannot_hold_are_left_out():
    class Odd(Clip):
        class Options(Clip.Options):
            model_config = {"arbitrary_types_allowed": True}
            what: Any = None

    found = run_identity.named("reward_transforms", [Foreign(), Clip(), Odd(what=object())])
    assert found["reward_transforms"] == ["Foreign", "Clip", "Odd"]
    assert {name for name in found if "." in name} == {"reward_transforms.Clip.low", "reward_transforms.Clip.high"}


def test_a_run_may_be_made_longer_and_says_so(stopped, tmp_path, capsys):
    resumed = _ppo(_copy(stopped, tmp_path), total_episodes=48)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.episode == 48 and len(resumed.drawn) == 32 and resumed.drawn[:16] == stopped[1].drawn[16:]
    assert f"total_episodes was 32 when {resumed.args.output_dir}" in capsys.readouterr().err.replace("\n", "")


def test_a_checkpoint_of_before_is_taken_with_a_warning(stopped, tmp_path, capsys):
    folder = _copy(stopped, tmp_path)
    (folder / "checkpoint-2" / FILE).unlink()
    content.record(folder / "checkpoint-2")
    resumed = _ppo(folder)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.drawn == stopped[1].drawn[16:]
    assert f"checkpoint-2 has no {FILE}" in capsys.readouterr().err.replace("\n", "")


def test_rejection_sampling_is_the_same_run_or_refused(tmp_path):
    def train(dataset=None, iterations=2, **options):
        kwargs = {"data_selectors": [RejectionSampling(num_responses=2)]}
        trainer = _ppo(tmp_path, dataset=dataset or _prompts(8), trainer_kwargs=kwargs, **options)
        RejectionTrainer.of(trainer, iterations).train(resume_from_checkpoint=True)

    train(iterations=1)
    with pytest.raises(UserError, match=f"was 8 {WRITTEN}, and is 4 now"):
        train(gradient_accumulation_steps=1)
    with pytest.raises(UserError, match="The column 'prompt' of the training data"):
        train(_prompts(8, first="who"))
    train()


def _preferences(count, first="good"):
    prompts = [f"what is the {WORDS[i % 10]}?" for i in range(count)]
    chosen = [f"{first if i == 0 else 'good'} {WORDS[i % 10]}" for i in range(count)]
    return Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": ["bad"] * count})


def _trls(kind, folder, *, first="good", transforms=(), **options):
    tokenizer, dataset = make_tokenizer(), _preferences(16, first)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "steps"}
    settings |= {"save_steps": 2, "num_train_epochs": 1, "bf16": False, "use_cpu": True, "report_to": "none"}
    settings |= {"disable_tqdm": True, "gradient_checkpointing": False} | options
    shared = {"processing_class": tokenizer, "peft_config": LoraConfig(r=2, target_modules="all-linear")}
    if kind == "reward":
        return RewardTrainer(make_scorer(len(tokenizer)), RewardConfig(str(folder), **settings), train_dataset=dataset,
                             processing_class=tokenizer, reward_transforms=transforms)  # fmt: skip
    if kind == "sft":
        dataset = dataset.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")
    trainer_class, config = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}[kind]
    trainer = trainer_class(
        make_llama(len(tokenizer)), args=config(str(folder), **settings), train_dataset=dataset, **shared
    )
    trainer.add_callback(SameRun(trainer))  # as the stages do
    return trainer


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward"])
def test_trls_trainers_are_the_same_run_or_refused(tmp_path, kind):
    _trls(kind, tmp_path).train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    checkpoint = str(tmp_path / "checkpoint-2")
    for options, found in (
        ({"gradient_accumulation_steps": 1}, f"{BATCH_SIZE} was 4 {WRITTEN}, and is 2 now."),
        ({"first": "fine"}, "of the training data is not what it was"),
        ({"learning_rate": 0.5}, "learning_rate was"),
    ):
        with pytest.raises(UserError) as error:
            _trls(kind, tmp_path, **options).train(resume_from_checkpoint=checkpoint)
        assert found in str(error.value)
    for options in ({}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "save_steps": 1}):
        trainer = _trls(kind, tmp_path, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.global_step == 4


def test_a_reward_trainer_compares_the_options_of_its_transforms(tmp_path):
    _trls("reward", tmp_path, transforms=[Clip(high=5.0)], max_steps=2).train()
    with pytest.raises(UserError, match=rf"reward_transforms\.Clip\.high was 5\.0 {WRITTEN}, and is 4\.0 now"):
        _trls("reward", tmp_path, transforms=[Clip(high=4.0)]).train(resume_from_checkpoint=True)
    _without_options(tmp_path / "checkpoint-2")
    _trls("reward", tmp_path, transforms=[Clip(high=4.0)]).train(resume_from_checkpoint=True)


def test_a_reward_checkpoint_is_compared_wherever_it_was_put(tmp_path):
    _trls("reward", tmp_path / "a", max_steps=2).train()
    moved = shutil.move(tmp_path / "a" / "checkpoint-2", tmp_path / "moved")
    with pytest.raises(UserError, match="of the training data is not what it was"):
        _trls("reward", tmp_path / "b", first="fine").train(resume_from_checkpoint=str(moved))
    trainer = _trls("reward", tmp_path / "b")
    trainer.train(resume_from_checkpoint=str(moved))
    assert trainer.state.global_step == 4


RL = {"rewards": ["helpers.rewards:even_share"], "save_steps": 2, "save_total_limit": 9}


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "grpo"])
def test_a_recipe_whose_prompts_were_changed_in_their_folder_is_refused(tiny_model, tmp_path, algorithm):
    """The recipe and the path are the same; the runner only knows the content of files, not of folders."""
    rows = [{"prompt": f"what is the {word}?", "category": "a"} for word in WORDS]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "prompts"))
    groups = {"num_generations": 2} if algorithm != "ppo" else {}
    recipe = tiny_recipe(tmp_path, tiny_model, data={"prompts": str(tmp_path / "prompts")},
                         rl=RL | groups | {"algorithm": algorithm}, **NONE)  # fmt: skip
    folder = run_recipe(recipe, installed_plugins(), tmp_path / "out")

    def stop_it():
        for name in ("checkpoints/rl/checkpoint-6", "checkpoints/rl/checkpoint-4", "policy"):
            shutil.rmtree(folder / name, ignore_errors=True)
        marker = folder.state / "rl.json"
        write_state(marker, read_state(marker, "") | {"complete": False})

    stop_it()
    run_recipe(recipe, installed_plugins(), tmp_path / "out", resume=True)
    stop_it()
    shutil.rmtree(tmp_path / "prompts")
    Dataset.from_list(rows[:-1] + [rows[0]]).save_to_disk(str(tmp_path / "prompts"))
    with pytest.raises(UserError, match="of the training data is not what it was"):
        run_recipe(recipe, installed_plugins(), tmp_path / "out", resume=True)


def test_a_group_trainer_compares_the_settings_of_its_scorer(tiny_model, tmp_path):
    def trainer(**options):
        rl = RL | {"algorithm": "grpo", "num_generations": 2, "transforms": [{"clip": {"high": 2.0}}]} | options
        recipe = tiny_recipe(tmp_path, tiny_model, rl=rl, **NONE)
        return build_trainer(Context(recipe, RunFolder(tmp_path / "out"), installed_plugins()))[0]

    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / FILE).write_text(json.dumps(trainer().same_run.identity))
    weighted = [{"helpers.rewards:even_share": 2.0}]
    changed = {"whiten_scores": True, "rewards": weighted, "transforms": [{"clip": {"high": 3.0}}]}
    with pytest.raises(UserError) as error:
        trainer(**changed, max_failed=0.9, reward_timeout=5).same_run.compare(folder)
    for found in (
        f"rl.whiten_scores was False {WRITTEN}, and is True now.",
        f"rl.reward_weights was None {WRITTEN}, and is [2.0] now.",
        f"reward_transforms.Clip.high was 2.0 {WRITTEN}, and is 3.0 now.",
    ):
        assert found in str(error.value)
    assert "max_failed" not in str(error.value) and "reward_timeout" not in str(error.value)
    trainer(max_failed=0.9, reward_timeout=5).same_run.compare(folder)
    _without_options(folder)
    trainer(**changed).same_run.compare(folder)


def test_a_digest_is_of_the_content_alone():
    rows = [{"input_ids": [i, i + 1][: 1 + i % 2], "text": f"t{i}", "messages": [{"role": "user", "content": str(i)}],
             "p": i / 7} for i in range(2_500)]  # fmt: skip
    plain = Dataset.from_list(rows)
    found = run_identity.digests(plain)
    assert set(found) == {"input_ids", "text", "messages", "p"}
    doubled = Dataset.from_list(rows + rows).filter(lambda _, i: i < 2_500, with_indices=True)
    mapped = plain.map(lambda row: {"text": row["text"] + ""}, load_from_cache_file=False)
    shuffled = plain.select(range(2_499, -1, -1)).select(range(2_499, -1, -1))
    assert run_identity.digests(doubled) == run_identity.digests(mapped) == run_identity.digests(shuffled) == found
    for change in (
        {"input_ids": [7, 8]},
        {"text": "other"},
        {"messages": [{"role": "system", "content": "3"}]},
        {"p": 0.4},
    ):
        [column] = change
        other = run_identity.digests(Dataset.from_list([*rows[:3], rows[3] | change, *rows[4:]]))
        assert {name for name in found if other[name] != found[name]} == {column}
    # Row boundaries are part of the digest.
    one, two = ([{"input_ids": ids} for ids in split] for split in ([[1, 2], [3]], [[1], [2, 3]]))
    assert run_identity.digests(Dataset.from_list(one)) != run_identity.digests(Dataset.from_list(two))
