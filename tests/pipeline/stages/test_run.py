"""The real stages, end to end, on a tiny model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from datasets import load_from_disk
from helpers.recipes import tiny_recipe
from helpers.tiny import save_tiny_model
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from trl_rlaif import SharedBase
from trl_rlaif.files import read_lines
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.pipeline.work.reward import tokenize_preference
from trl_rlaif.plugins import installed_plugins

pytestmark = [pytest.mark.trl, pytest.mark.slow]


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """A complete run: (recipe, folder)."""
    base = tmp_path_factory.mktemp("run")
    recipe = tiny_recipe(base, tiny_model)
    return recipe, run_recipe(recipe, installed_plugins(), base / "out", command="trl-rlaif run tiny")


def test_the_folder_holds_what_the_architecture_says(finished):
    _, folder = finished
    for name in ("recipe.yaml", "pairs.jsonl", "labels.jsonl", "metrics.jsonl", "results.json", "report.html"):
        assert (folder / name).stat().st_size > 0, name
    for name in ("preferences", "reward", "policy"):
        assert (folder / name).is_dir(), name
    label = read_lines(folder / "labels.jsonl")[0]
    fields = "id p p_12 p_21 mass_12 mass_21 rationale_12 rationale_21 judge labeler setup pair".split()
    assert list(label) == fields
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert {"trl", "transformers", "peft", "torch"} <= recipe["versions"].keys()
    assert recipe["run"]["seed"] == 7


def test_results_agree_with_the_artefacts(finished):
    _, folder = finished
    results = folder.results()
    pairs, labels = read_lines(folder / "pairs.jsonl"), read_lines(folder / "labels.jsonl")
    assert results["sample"]["pairs"] == len(pairs) > 0
    assert results["label"]["labeled"] == len(labels) == len(pairs)
    samples = read_lines(folder / "samples.jsonl")
    test = results["evaluate"]["sets"]["test"]
    assert test["prompts"] == len(samples) == 4
    gain = [s["reward_trained"] - s["reward_start"] for s in samples]
    assert test["reward_gain"]["mean"] == pytest.approx(sum(gain) / 4)
    points = [0.5 if s["p_trained"] == 0.5 else float(s["p_trained"] > 0.5) for s in samples]
    assert test["win_rate"] == pytest.approx(sum(points) / 4)
    rl = [row for row in read_lines(folder / "metrics.jsonl") if row["stage"] == "rl"]
    assert [row["step"] for row in rl] == list(range(1, 7))
    assert results["rl"]["score_first"] == rl[0]["objective/scores"]
    assert results["rl"]["score_last"] == rl[-1]["objective/scores"]


def test_a_run_that_learned_nothing_says_so_at_its_end(tmp_path, tiny_model, capsys):
    recipe = tiny_recipe(tmp_path, tiny_model, rl={"learning_rate": 0.0}, evaluate=None, report=None)
    folder = run_recipe(recipe, installed_plugins(), tmp_path / "out")
    said = " ".join(capsys.readouterr().err.split("This run may have learned nothing:")[1].split())
    assert "The policy did not change: its KL to the reference stayed below 0.001 nats." in said
    rl = [row for row in read_lines(folder / "metrics.jsonl") if row["stage"] == "rl"]
    assert all(1 <= row["rollout/distinct"] <= 4 for row in rl)


def test_evaluation_takes_the_mean_over_several_responses(tmp_path, tiny_model):
    """The initial policy against one that never moved: each prompt's means are over the same responses."""
    recipe = tiny_recipe(
        tmp_path, tiny_model, rl={"learning_rate": 0.0, "total_episodes": 4},
        evaluate={"temperature": 1.0, "num_responses": 5}, report=None,
    )  # fmt: skip
    folder = run_recipe(recipe, installed_plugins(), tmp_path / "out")
    samples = read_lines(folder / "samples.jsonl")
    assert all(s["mean_reward_start"] == pytest.approx(s["mean_reward_trained"], abs=1e-6) for s in samples)
    assert all(s["start"] == s["trained"] and s["p_trained"] == 0.5 for s in samples)
    assert any(abs(s["mean_reward_start"] - s["reward_start"]) > 1e-4 for s in samples)  # the first is not the mean
    assert any(s["tokens_start"] % 1 for s in samples)  # nor do all have the same length
    assert folder.results()["evaluate"]["sets"]["test"]["reward_gain"]["mean"] == pytest.approx(0, abs=1e-6)


def test_peft_loads_the_policy(finished, tiny_model):
    _, folder = finished
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    inputs = tokenizer("what is the city?", return_tensors="pt")
    before = base(**inputs).logits.detach()
    policy = PeftModel.from_pretrained(base, folder / "policy")
    assert (policy(**inputs).logits - before).abs().max() > 1e-6  # it learned something


def test_the_reward_folder_is_a_sequence_classifier(finished, tiny_model):
    """Loaded with AutoPeftModel, reward/ scores like the reward role that PPO and evaluate use."""
    recipe, folder = finished
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1).eval()
    shared = SharedBase(AutoModelForCausalLM.from_pretrained(tiny_model), folder / "policy")
    shared.add_reward(folder / "reward")
    row = tokenize_preference(
        AutoTokenizer.from_pretrained(folder / "reward"), load_from_disk(str(folder / "preferences"))[0]
    )
    ids = torch.tensor([row["chosen_ids"]])
    with torch.no_grad():
        score = shared.eval().head("reward", shared.hidden("reward", input_ids=ids)[:, -1])
        assert score.item() == pytest.approx(model(ids).logits.item(), abs=1e-6)
    assert score.item() != 0


def test_dpo_takes_the_preferences_as_they_are(finished, tiny_model, tmp_path):
    _, folder = finished
    dataset = load_from_disk(str(folder / "preferences"))
    assert {"prompt", "chosen", "rejected", "p", "category"} <= set(dataset.column_names)
    assert all(0.5 <= p <= 1 for p in dataset["p"])
    arguments = DPOConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, bf16=False, report_to="none", disable_tqdm=True
    )
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        args=arguments,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
    )
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_complete_run_is_skipped_and_a_changed_one_is_made_again(finished, tiny_model, capsys):
    recipe, folder = finished
    before = {p: p.stat().st_mtime_ns for p in (folder / "pairs.jsonl", folder / "labels.jsonl")}
    run_recipe(recipe, installed_plugins(), folder.path, resume=True)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    changed = tiny_recipe(
        recipe.source.parent, tiny_model, label={"labeler": {"distilled": {"debias": "mean_prob"}}},
        reward=None, rl={"rewards": ["builtins:len"]}, evaluate=None,
    )  # fmt: skip
    run_recipe(changed, installed_plugins(), folder.path, only=["label"])
    assert (folder / "pairs.jsonl").stat().st_mtime_ns == before[folder / "pairs.jsonl"]
    labels, setup = read_lines(folder / "labels.jsonl"), folder.results()["label"]["setup"]
    assert len(labels) == 20  # from both settings
    for row in labels:
        if row["setup"] == setup:
            assert row["p"] == pytest.approx((row["p_12"] + row["p_21"]) / 2)


def test_sft_is_the_start_and_the_reference(tiny_model, tmp_path):
    rows = [{"prompt": f"what is {i}?", "completion": " a city"} for i in range(8)]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = tiny_recipe(
        tmp_path,
        tiny_model,
        sft={"data": "sft.jsonl", "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2},
        label=None,
        reward=None,
        rl={"rewards": ["helpers.rewards:length_penalty"], "total_episodes": 4, "learning_rate": 0.0},
        sample=None,
    )
    folder = run_recipe(recipe, installed_plugins(), tmp_path / "out")
    from safetensors.torch import load_file

    start = load_file(folder / "sft" / "adapter_model.safetensors")
    policy = load_file(folder / "policy" / "adapter_model.safetensors")
    assert start.keys() == policy.keys()
    # With a learning rate of zero, the policy equals the initial policy, which SFT trained.
    assert all(torch.equal(start[k], policy[k]) for k in start)
    assert any(v.abs().max() > 0 for k, v in start.items() if "lora_B" in k)
    step = read_lines(folder / "metrics.jsonl")[-1]
    assert step["stage"] == "rl" and step["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert folder.results()["evaluate"]["sets"]["test"]["reward_gain"] is None


def test_a_base_in_four_bits(tmp_path):
    """QLoRA: the same run on an NF4 base, which bitsandbytes also supports on CPUs."""
    model = save_tiny_model(tmp_path / "model", hidden_size=64)
    recipe = tiny_recipe(
        tmp_path,
        model,
        model={"dtype": "float32", "quantization": "nf4"},
        reward={"num_train_epochs": 1},
        rl={"total_episodes": 8},
        report=None,
    )
    folder = run_recipe(recipe, installed_plugins(), tmp_path / "out")
    results = folder.results()
    assert results["rl"]["updates"] == 2
    assert results["evaluate"]["sets"]["test"]["reward_gain"] is not None
    base = AutoModelForCausalLM.from_pretrained(model)
    PeftModel.from_pretrained(base, folder / "policy")  # the adapter fits the plain base, too


@pytest.mark.parametrize("algorithm", ["dpo", "grpo"])
def test_adapters_and_heads_on_four_bits_are_trained_in_float32(tmp_path, algorithm):
    """TRL would round them to bfloat16: their initial values, and each update."""
    model = save_tiny_model(tmp_path / "model", hidden_size=64)
    rows = [{"prompt": f"what is {i}?", "completion": " a city"} for i in range(4)]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    options = {"num_generations": 2, "total_episodes": 8, "response_length": 4} if algorithm == "grpo" else {}
    recipe = tiny_recipe(
        tmp_path,
        model,
        model={"dtype": "bfloat16", "quantization": "nf4"},
        sft={"data": "sft.jsonl", "max_steps": 2, "learning_rate": 1e-2},
        reward={"num_train_epochs": 1},
        rl=options | {"algorithm": algorithm, "learning_rate": 0.0},
        evaluate=None,
        report=None,
    )
    folder = run_recipe(recipe, installed_plugins(), tmp_path / "out")
    from safetensors.torch import load_file

    start, reward, policy = (
        load_file(folder / name / "adapter_model.safetensors") for name in ("sft", "reward", "policy")
    )
    assert {v.dtype for v in (start | reward | policy).values()} == {torch.float32}
    assert any("score" in name for name in reward)
    for trained in (start, reward):
        assert any((v != v.bfloat16()).any() for v in trained.values())
    assert all(torch.equal(start[name], policy[name]) for name in start)  # at a learning rate of zero


def test_a_report_is_built_again_only_if_something_changed(tmp_path, tiny_model, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe(tmp_path, tiny_model, reward=None, rl=None, evaluate=None, label=None)
    folder = run_recipe(recipe, installed_plugins(), "out").path
    said = capsys.readouterr().err
    assert "To run: sample, report. A time estimate follows after the first minute" in said
    page = folder / "report.html"
    page.write_text("untouched")
    run_recipe(recipe, installed_plugins(), "out", resume=True)
    assert page.read_text() == "untouched"
    assert "To run:" not in capsys.readouterr().err
    (folder / "votes.jsonl").touch()
    run_recipe(recipe, installed_plugins(), "out", resume=True)
    assert page.read_text() != "untouched"
    page.unlink()
    run_recipe(recipe, installed_plugins(), "out", resume=True)
    assert page.exists()


def test_a_run_is_told_how_long_one_with_its_settings_took(tmp_path, tiny_model, capsys):
    sections = {"reward": None, "rl": None, "evaluate": None, "label": None}
    recipe = tiny_recipe(tmp_path, tiny_model, **sections)
    first = run_recipe(recipe, installed_plugins(), tmp_path / "runs" / "first")
    first.add_results("sample", first.results_of("sample") | {"seconds": 100.0})
    first.add_results("report", {"seconds": 20.0})

    def said(name, seed=1, **changed):
        other = tiny_recipe(tmp_path, tiny_model, **sections | {"run": {"name": "x", "seed": seed}} | changed)
        run_recipe(other, installed_plugins(), tmp_path / "runs" / name)
        return capsys.readouterr().err

    assert "With these settings, the run 'first' in the same folder took 2 min 0 s for these stages." in said(
        "second", seed=7
    )
    assert "With these settings" not in said("third", sample={"max_new_tokens": 3})
    (tmp_path / "runs" / "second" / "results.json").write_text("{")
    assert "the run 'first' in the same folder took 2 min 0 s" in said("fourth")
    shutil.copytree(first.path, tmp_path / "runs" / "rounds" / "1")
    assert "With these settings, round 1 took 2 min 0 s" in said("rounds/2")
