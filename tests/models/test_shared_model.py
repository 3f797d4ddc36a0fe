"""One base, many roles: each matches a model built for it alone, and switching changes nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.tiny import make_llama, make_scorer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_rlaif import SharedBase, UserError
from trl_rlaif.models.loading import keep_gradients
from trl_rlaif.models.shared_model import save_adapter

IDS = torch.tensor([[5, 6, 7, 8], [9, 4, 3, 7]])


def _config(**extra):
    # Randomly initialized, so that every adapter changes the output.
    return LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **extra)


@pytest.fixture
def reward_folder(tmp_path):
    return _reward_folder(tmp_path, 32)


@pytest.fixture
def wide_reward_folder(tmp_path):
    return _reward_folder(tmp_path, 64)


def _reward_folder(tmp_path, hidden_size):
    torch.manual_seed(3)
    model = get_peft_model(
        make_scorer(seed=0, hidden_size=hidden_size), _config(task_type="SEQ_CLS", modules_to_save=["score"])
    )
    model.save_pretrained(tmp_path / "reward")
    return tmp_path / "reward"


@pytest.fixture(params=["fp32", "nf4"])
def base_folder(request, tmp_path):
    # bitsandbytes quantizes in blocks of 64: a narrower layer cannot be computed on a CPU.
    make_llama(hidden_size=64).save_pretrained(tmp_path / "base")
    kwargs = {"dtype": torch.float32}
    if request.param == "nf4":
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    # The same kernel on both sides: see keep_gradients.
    return lambda: keep_gradients(AutoModelForCausalLM.from_pretrained(tmp_path / "base", **kwargs)).eval()


@torch.no_grad()
def test_each_role_equals_a_model_of_its_own(base_folder, wide_reward_folder, tmp_path):
    reward_folder = wide_reward_folder
    torch.manual_seed(1)
    shared = SharedBase(base_folder(), _config())
    shared.add_value()
    shared.add_reward(reward_folder)
    shared.eval()
    with shared.role(None):
        torch.testing.assert_close(shared.model(IDS).logits, base_folder()(IDS).logits, rtol=0, atol=0)
    for role in ("policy", "value"):
        save_adapter(shared.peft, role, tmp_path / role)
        alone = PeftModel.from_pretrained(base_folder(), tmp_path / role).eval()
        with shared.role(role):
            ours = shared.model(IDS).logits
        torch.testing.assert_close(ours, alone(IDS).logits, rtol=0, atol=0)
    alone = PeftModel.from_pretrained(base_folder(), reward_folder).eval()
    hidden = alone.get_base_model().model(IDS).last_hidden_state
    torch.testing.assert_close(shared.hidden("reward", input_ids=IDS), hidden, rtol=0, atol=0)


@torch.no_grad()
def test_the_reward_role_scores_like_the_classifier(reward_folder):
    scorer = PeftModel.from_pretrained(make_scorer(seed=0), reward_folder).eval()
    shared = SharedBase(_causal_from(make_scorer(seed=0)), _config())
    shared.add_reward(reward_folder)
    ours = shared.eval().head("reward", shared.hidden("reward", input_ids=IDS)[:, -1])
    torch.testing.assert_close(ours, scorer(IDS).logits, rtol=1e-6, atol=1e-6)


def _causal_from(scorer):
    model = make_llama()
    model.model.load_state_dict(scorer.model.state_dict())
    return model


def test_roles_leave_requires_grad_and_nesting_alone_also_after_an_exception():
    shared = SharedBase(make_llama(), _config())
    shared.add_value()
    before = {n: p.requires_grad for n, p in shared.named_parameters()}
    assert {n.split(".lora_")[1].split(".")[1] for n, on in before.items() if on and "lora_" in n} == {
        "policy",
        "value",
    }
    assert before["heads.value.weight"]
    with torch.no_grad(), shared.role("policy"):
        policy = shared.model(IDS).logits
        with pytest.raises(RuntimeError), shared.role("value"), shared.role(None):
            raise RuntimeError
        torch.testing.assert_close(shared.model(IDS).logits, policy, rtol=0, atol=0)
    assert {n: p.requires_grad for n, p in shared.named_parameters()} == before


@pytest.mark.parametrize("trunk", [False, True])
@torch.no_grad()
def test_a_value_that_was_saved_is_taken_up_and_trained_further(tmp_path, trunk):
    config, values = _config(), []
    for name in ("saved", "loaded"):
        torch.manual_seed(3 if name == "saved" else 4)  # both have the same policy, but new values would differ
        shared = SharedBase(make_llama(), config if name == "saved" else tmp_path / "policy")
        if name == "saved":
            save_adapter(shared.peft, "policy", tmp_path / "policy")
            shared.add_value(trunk=trunk)
            shared.heads["value"].weight.normal_()
            shared.save_value(tmp_path / "value")
        else:
            shared.load_value(tmp_path / "value")
        view = shared.add_value(trunk=trunk).eval()
        values.append(view.score(view.backbone(input_ids=IDS)))
        trained = {n for n, p in shared.named_parameters() if p.requires_grad and ("value" in n)}
        assert "heads.value.weight" in trained and (len(trained) == 1) == trunk
    assert torch.equal(*values) and values[0].std() > 0.1
    assert (tmp_path / "value" / "adapter_config.json").exists() != trunk


def test_gradients_reach_the_active_role_only():
    shared = SharedBase(make_llama(), _config())
    shared.add_value()
    with shared.role("value"):
        shared.head("value", shared.hidden("value", input_ids=IDS)).sum().backward()
    touched = {n for n, p in shared.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched == {"heads.value.weight"}  # the head starts at zero: nothing reaches the adapter yet
    shared.heads["value"].weight.data.normal_()
    shared.zero_grad()
    shared.head("value", shared.hidden("value", input_ids=IDS)).sum().backward()
    touched = {n for n, p in shared.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched and all(".value." in n for n in touched)


def test_gradients_pass_a_four_bit_base_after_eval(base_folder, tmp_path):
    """As in PPO: a rollout in eval mode, then an update in train mode."""

    def gradients(roll_out):
        torch.manual_seed(6)
        shared = SharedBase(base_folder(), _config())
        if roll_out:
            with torch.no_grad(), shared.eval().role("policy"):
                shared.model(IDS)
        with shared.train().role("policy"):
            shared.model(IDS).logits.square().mean().backward()
        return {n: p.grad for n, p in shared.named_parameters() if p.grad is not None}

    fresh, after = gradients(False), gradients(True)
    assert len(fresh) > 10 and all(g.abs().sum() > 0 for g in fresh.values())
    assert fresh.keys() == after.keys()
    assert all(torch.equal(fresh[n], after[n]) for n in fresh)


def test_a_start_is_policy_and_reference(tmp_path):
    torch.manual_seed(2)
    save_adapter(SharedBase(make_llama(), _config()).peft, "policy", tmp_path / "sft")
    shared = SharedBase(make_llama(), tmp_path / "sft", reference=tmp_path / "sft").eval()
    assert shared.reference == "reference"
    with torch.no_grad():
        with shared.role("policy"):
            policy = shared.model(IDS).logits
        with shared.role(shared.reference):
            torch.testing.assert_close(shared.model(IDS).logits, policy, rtol=0, atol=0)
        with shared.role(None):
            assert (shared.model(IDS).logits - policy).abs().max() > 1e-2
    assert not any(p.requires_grad for n, p in shared.named_parameters() if ".reference." in n)


def test_a_peft_model_becomes_policy_and_reference():
    torch.manual_seed(4)
    peft = get_peft_model(make_llama(), _config()).eval()
    before = peft(IDS).logits.detach()
    shared = SharedBase.around(copy.deepcopy(peft))
    with torch.no_grad():
        for role in ("policy", "reference"):
            with shared.role(role):
                torch.testing.assert_close(shared.model(IDS).logits, before, rtol=0, atol=0)


def test_wrong_folders_are_named(tmp_path, reward_folder):
    shared = SharedBase(make_llama(), _config())
    with pytest.raises(UserError, match="nowhere"):
        shared.add_reward(tmp_path / "nowhere")
    save_adapter(shared.peft, "policy", tmp_path / "policy")
    with pytest.raises(UserError, match="no score head"):
        shared.add_reward(tmp_path / "policy")
    (reward_folder / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="adapter_model.safetensors"):
        shared.add_reward(reward_folder)
    with pytest.raises(KeyError, match="no role 'critic'"):
        shared.role("critic")
