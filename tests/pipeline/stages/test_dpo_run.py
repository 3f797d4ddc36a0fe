"""`rl.algorithm: dpo` against a plain script with TRL's DPOTrainer, with soft labels, and after SFT."""

from __future__ import annotations

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from helpers.recipes import tiny_recipe, write_recipe
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer

from trl_rlaif import RunError, UserError
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.preferences import write_preferences
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.pipeline.work import dpo
from trl_rlaif.pipeline.work.dpo import build_trainer
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import parse_recipe
from trl_rlaif.rl.soft_dpo import SoftDPOTrainer

pytestmark = [pytest.mark.trl, pytest.mark.slow]

RL = {"algorithm": "dpo", "kl_coef": 0.3, "num_train_epochs": 2, "per_device_train_batch_size": 4}


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    base = tmp_path_factory.mktemp("dpo")
    recipe = tiny_recipe(base, tiny_model, reward=None, rl=RL)
    return recipe, run_recipe(recipe, installed_plugins(), base / "out")


def _config(folder, **options):
    return DPOConfig(
        str(folder), beta=0.3, learning_rate=1e-3, num_train_epochs=2, per_device_train_batch_size=4, seed=7,
        bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", use_cpu=True, **options,
    )  # fmt: skip


def _adapter():
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def test_with_labels_that_are_sure_the_policy_is_that_of_a_plain_script(tiny_model, tmp_path):
    recipe = tiny_recipe(tmp_path, tiny_model, reward=None, rl=RL)
    folder = run_recipe(recipe, installed_plugins(), tmp_path / "out", only=["sample"])
    context = Context(recipe, folder, installed_plugins())
    write_preferences(context, context.pairs(), np.arange(len(context.pairs())) % 2.0)
    set_seed(7)  # as the runner does
    assert dpo.run(context)["labels"] == {"soft": True, "mean_confidence": 1.0, "ties": 0}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(7)
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
        args=_config(tmp_path),
        train_dataset=load_from_disk(str(folder / "preferences")).select_columns(["prompt", "chosen", "rejected"]),
        processing_class=tokenizer,
        peft_config=_adapter(),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "policy"))
    plain = load_file(tmp_path / "policy" / "adapter_model.safetensors")
    ours = load_file(folder / "policy" / "adapter_model.safetensors")
    assert plain.keys() == ours.keys()
    assert any(value.abs().max() > 0 for name, value in ours.items() if "lora_B" in name)
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options", [{}, {"precompute_ref_log_probs": True}, {"f_divergence_type": "js_divergence"}], ids=str
)
def test_soft_labels_are_learned_from_as_they_are(tiny_model, tmp_path, options):
    """-[p log s(h) + (1 - p) log s(-h)] and its gradients, from plain float64 forward passes."""
    p = [1.0, 0.9, 0.5, 0.62]
    rows = [
        {"prompt": f"what is {i}?", "chosen": " a quick fox" * (i + 1), "rejected": " the dog", "p": p[i]}
        for i in range(4)
    ]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    reference = copy.deepcopy(model).double()
    trainer = SoftDPOTrainer(
        model=model, args=_config(tmp_path, **options), train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_model), peft_config=_adapter(),
    )  # fmt: skip
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    batch = next(iter(trainer.get_train_dataloader()))
    assert sorted(batch["p"].tolist()) == pytest.approx(sorted(p))
    assert pickle.dumps(trainer.data_collator)  # for data loader workers
    examples = {k: v.clone() for k, v in batch.items()}
    policy = get_peft_model(copy.deepcopy(reference), _adapter()).double()
    policy.load_state_dict(trainer.model.state_dict())
    loss = trainer.compute_loss(trainer.model, batch)
    ratios = _logprobs(policy, examples) - _logprobs(reference, examples)
    if "f_divergence_type" in options:
        ratios = math.log(2) + torch.nn.functional.logsigmoid(ratios)
    h = 0.3 * (ratios[:4] - ratios[4:])
    q, sigmoid = examples["p"].double(), torch.sigmoid(h)
    wanted = -(q * sigmoid.log() + (1 - q) * (1 - sigmoid).log()).mean()
    assert h.abs().max() > 0.05
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert loss.item() != pytest.approx(-sigmoid.log().mean().item(), rel=1e-3)
    loss.backward()
    wanted.backward()
    pairs = list(zip(trainer.model.parameters(), policy.parameters(), strict=True))
    assert sum(ours.grad is not None for ours, _ in pairs) > 10
    for ours, theirs in pairs:
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


def _logprobs(model, batch):
    """The log-probability of each response given its prompt, one sequence at a time."""
    found, columns = [], [batch[name] for name in ("input_ids", "attention_mask", "completion_mask")]
    for ids, attended, completion in zip(*columns, strict=True):
        ids, completion = ids[attended.bool()][None], completion[attended.bool()].bool()
        logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        found.append(logprobs[completion[1:]].sum())
    return torch.stack(found)


def test_a_loss_in_another_way_is_not_taken_for_dpo(tiny_model, tmp_path, monkeypatch):
    rows = [{"prompt": "a", "chosen": " quick", "rejected": " dog", "p": 0.7}] * 4
    trainer = SoftDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), args=_config(tmp_path),
        train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(tiny_model),
        peft_config=_adapter(),
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.loss_types = ["hinge"]  # as if a TRL release had changed the default loss
    with pytest.raises(RunError, match="in a way that does not support soft labels"):
        trainer.compute_loss(trainer.model, dict(batch))
    assert trainer.beta == 0.3


def test_its_results_and_what_it_made_no_use_of(finished):
    _, folder = finished
    numbers = folder.results()["rl"]
    assert numbers["updates"] == 6 and numbers["pairs"] == 10
    assert {"response_length", "total_episodes", "num_ppo_epochs"} <= set(numbers["ignored"])
    assert "kl_coef" not in numbers["ignored"] and "learning_rate" not in numbers["ignored"]
    assert 0 <= folder.results()["evaluate"]["sets"]["test"]["win_rate"] <= 1
    assert (folder / "report.html").exists()


def test_the_start_of_sft_is_the_reference(tiny_model, tmp_path):
    (tmp_path / "sft.jsonl").write_text(json.dumps({"prompt": "what?", "completion": "the fox"}) + "\n")
    sft = {"data": "sft.jsonl", "max_steps": 2, "per_device_train_batch_size": 1, "learning_rate": 0.1}
    recipe = tiny_recipe(tmp_path, tiny_model, sft=sft, reward=None, rl=RL, evaluate=None, report=None)
    plugins = installed_plugins()
    folder = run_recipe(recipe, plugins, tmp_path / "out", only=["sft", "sample", "label"])
    trainer, _ = build_trainer(Context(recipe, folder, plugins))
    start = load_file(folder / "sft" / "adapter_model.safetensors")
    for part in ("default", "ref"):
        state = dict(trainer.model.named_parameters())
        for name, value in start.items():
            torch.testing.assert_close(state[name.replace(".weight", f".{part}.weight")].cpu(), value, rtol=0, atol=0)


def test_it_needs_preferences(tiny_model, tmp_path):
    path = write_recipe(tmp_path, tiny_model, label=None, reward=None, rl=RL)
    with pytest.raises(UserError, match="'dpo' has no preferences to learn from"):
        parse_recipe(path, registry=installed_plugins().registry)
    path = write_recipe(tmp_path, tiny_model, reward=None, rl=RL | {"betta": 0.2})
    with pytest.raises(UserError, match="betta"):
        parse_recipe(path, registry=installed_plugins().registry)
