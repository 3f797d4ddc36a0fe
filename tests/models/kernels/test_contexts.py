"""The two kernel contexts: their changes are undone, no less exact, and can be switched off individually."""

from __future__ import annotations

import copy
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers.families import make_family
from helpers.ppo import small_trainer
from helpers.recipes import tiny_recipe
from helpers.tiny import make_llama, make_tokenizer
from packaging import version
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations import sdpa_attention

import trl_rlaif
from trl_rlaif import SharedBase, UserError
from trl_rlaif.generation import sample_responses
from trl_rlaif.models.kernels import DEFAULTS, generation_kernels, kernels, training_kernels, used
from trl_rlaif.models.loading import keep_gradients
from trl_rlaif.models.role_models import SharedRoleModels
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.pipeline.work import evaluate, sample
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe.sections import KERNELS
from trl_rlaif.responses import ResponseReader
from trl_rlaif.rl.generation import RolloutGenerator

IDS = torch.tensor([[5, 6, 7, 8, 3], [9, 4, 3, 7, 11]])


class Ops(TorchDispatchMode):
    """Counts dispatched operations."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def _nf4(folder, dtype):
    make_llama(hidden_size=64).save_pretrained(folder)
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = keep_gradients(load(folder, dtype=dtype, quantization_config=config))
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()


def _state(model):
    kinds = [(type(m), m.config._attn_implementation if hasattr(m, "config") else None) for m in model.modules()]
    return kinds, {n: (p.dtype, p.detach().clone()) for n, p in model.named_parameters()}


def _assert_same(before, after):
    assert before[0] == after[0] and before[1].keys() == after[1].keys()
    for name, (dtype, value) in before[1].items():
        assert after[1][name][0] == dtype and torch.equal(after[1][name][1], value), name


@pytest.mark.parametrize("norms", [torch.bfloat16, torch.float32])
def test_adapters_on_4_bit_layers_are_cast_once_and_no_less_exact(tmp_path, norms):
    exact = _nf4(tmp_path, torch.float32)(IDS).logits
    model = _nf4(tmp_path, torch.bfloat16)
    for module in model.modules():
        if "Norm" in type(module).__name__:
            module.to(norms)  # TRL keeps them in float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with Ops() as plain:
            pefts = model(IDS).logits.float()
    with generation_kernels(model):
        assert torch.is_autocast_enabled("cpu")
        with Ops() as fused:
            found = model(IDS).logits.float()
    assert 0 < (found - exact).norm() < 1.1 * (pefts - exact).norm() < 0.2 * exact.norm()
    # Otherwise, each of 14 layers casts A and B.
    assert fused.counts["_to_copy"] <= plain.counts["_to_copy"] - 28
    assert sum(fused.counts.values()) < sum(plain.counts.values()) - 28


def _a_token(draw):
    """The number of dispatches per additional token, by operation."""
    counts = []
    for tokens in (3, 7):
        torch.manual_seed(0)
        with Ops() as ops:
            draw(tokens)
        counts.append(ops.counts)
    return {name: (count - counts[0][name]) / 4 for name, count in counts[1].items() if count != counts[0][name]}


def test_sampling_and_evaluation_generate_as_ppo_does(tmp_path):
    """In NF4, with the adapter cast once for all tokens: shown by the operations dispatched per token."""
    shared, tokenizer, never = SharedBase.around(_nf4(tmp_path, torch.bfloat16)), make_tokenizer(), (10_000,)

    def ppo(tokens):
        args = SimpleNamespace(
            temperature=1.0, generation="transformers", bf16=True, response_length=tokens,
            local_rollout_forward_batch_size=2,
        )  # fmt: skip
        generator = RolloutGenerator(args, None, ResponseReader(tokenizer, never))
        generator._generate(SharedRoleModels(shared), IDS, torch.ones_like(IDS).bool())

    def sampled(tokens):
        with shared.role("policy"):
            sample_responses(
                shared.model, tokenizer, IDS.tolist(), max_new_tokens=tokens, temperature=1.0, stop_ids=never
            )

    def evaluated(tokens):
        section = SimpleNamespace(batch_size=2, num_responses=1, temperature=1.0)
        recipe = SimpleNamespace(evaluate=section, run=SimpleNamespace(seed=1))
        context = SimpleNamespace(recipe=recipe, tokenizer=tokenizer, stop_ids=lambda model: never)
        prompts = [SimpleNamespace(id=str(i)) for i in range(2)]
        evaluate._responses(context, shared, "policy", "policy", prompts, IDS.tolist(), tokens)

    drawn = _a_token(ppo)
    with kernels(fused_lora=False, cast_weights=False):
        plain = _a_token(ppo)
    # 14 layers: PEFT casts A and B, copies, scales and adds in separate steps.
    assert drawn["_to_copy"] <= plain["_to_copy"] - 28 and sum(drawn.values()) <= sum(plain.values()) - 70
    assert _a_token(sampled) == _a_token(evaluated)
    assert _a_token(sampled)["_to_copy"] == drawn["_to_copy"]
    assert sum(_a_token(sampled).values()) <= sum(drawn.values())  # PPO keeps log-probabilities too


def test_nothing_else_generates():
    root = Path(trl_rlaif.__file__).parent
    found = {f.relative_to(root).as_posix() for f in root.rglob("*.py") if ".generate(" in f.read_text("utf-8")}
    # In the vllm modules, vLLM or TRL generates, not a model of ours.
    assert found == {
        "generation.py",
        "rl/rollouts.py",
        "rl/generation.py",
        "rl/vllm.py",
        "rl/vllm_adapter.py",
        "judging/vllm.py",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_casts_where_a_bfloat16_base_has_adapters(dtype, monkeypatch):
    tokenizer, seen = make_tokenizer(), []
    plain = make_llama(len(tokenizer)).to(dtype)
    adapted = SharedBase(copy.deepcopy(plain), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    for model in (plain, adapted.model):
        model.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
        before = _state(model)
        sample_responses(model, tokenizer, [[5, 6, 7]], max_new_tokens=2, temperature=0)
        _assert_same(before, _state(model))
        assert not torch.is_autocast_enabled("cpu")
    assert seen == [False] * 2 + [dtype == torch.bfloat16] * 2


@pytest.mark.parametrize("bf16", [False, True])
def test_training_leaves_a_users_base_as_it_was(tmp_path, bf16):
    model = make_llama(len(make_tokenizer()))
    before = _state(copy.deepcopy(model))
    trainer, seen = small_trainer(tmp_path, model=model, bf16=bf16, use_cpu=True, total_episodes=8), set()
    update = trainer.update

    def watched(*args):
        layer = model.model.layers[0].self_attn.q_proj
        seen.add((layer.base_layer.weight.dtype, type(layer).__name__, model.config._attn_implementation))
        assert "trl_rlaif" not in model.config.to_json_string(), "a saved model would need this package"
        return update(*args)

    trainer.update = watched
    trainer.train()
    assert seen == {
        (torch.bfloat16, "FusedLinear", "trl_rlaif_cpu") if bf16 else (torch.float32, "FusedLinear", "sdpa")
    }
    after = {n.replace("base_layer.", ""): p for n, p in model.named_parameters() if "lora_" not in n}
    assert after.keys() == before[1].keys()
    for name, (dtype, value) in before[1].items():
        assert after[name].dtype == dtype and torch.equal(after[name], value), name
    assert not any(type(m).__name__.startswith(("Fused", "Cast")) for m in model.modules())
    assert model.config._attn_implementation == "sdpa"


def test_generating_in_training_uses_the_models_own_attention():
    model = make_llama()
    with training_kernels(model, bf16=True):
        assert model.config._attn_implementation == "trl_rlaif_cpu"
        with generation_kernels(model):
            assert model.config._attn_implementation == "sdpa"
        assert model.config._attn_implementation == "trl_rlaif_cpu"


@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23"), reason="repeats keys for every token"
)
@pytest.mark.parametrize("kind", ["granite", "gemma3_text", "llama4_text", "qwen3_5_text"])
def test_behind_padding_a_token_repeats_no_keys_and_changes_no_number(kind, monkeypatch):
    """transformers folds query heads that share keys; kernels.md has the speedup."""
    model, repeat, repeated = make_family(kind).double(), sdpa_attention.repeat_kv, []
    monkeypatch.setattr(sdpa_attention, "repeat_kv", lambda x, times: repeated.append(x) or repeat(x, times))
    ids, mask = torch.cat((IDS, IDS.flip(1)), 1), torch.ones(2, 10, dtype=torch.long)
    mask[1, :4] = 0

    def drawn():
        config = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
        config.update(output_logits=True, return_dict_in_generate=True)
        repeated.clear()
        with generation_kernels(model):
            return torch.stack(model.generate(ids, attention_mask=mask, generation_config=config).logits)

    found, prompts = drawn(), len(repeated)
    monkeypatch.setattr(sdpa_attention, "is_torchdynamo_compiling", lambda: True)
    torch.testing.assert_close(found, drawn(), rtol=1e-6, atol=1e-6)  # logits are float32
    assert 0 < prompts == len(repeated) / 6


def test_switches():
    assert used("packing", "cpu") and used("cpu_attention", "cpu") and not used("cpu_attention", "cuda")
    with kernels({"packing": False}, cpu_attention=True):
        assert not used("packing", "cpu") and used("cpu_attention", "cuda")
        with kernels(packing="auto"):
            assert used("packing", "cpu") and used("cpu_attention", "cuda")
    assert used("packing", "cpu") and not used("cpu_attention", "cuda")
    with pytest.raises(ValueError, match="no kernel 'speed'; there are packing"), kernels(speed=True):
        pass


def test_a_recipe_switches_kernels(tmp_path, tiny_model, monkeypatch):
    assert set(KERNELS) == set(DEFAULTS)
    recipe = tiny_recipe(tmp_path, tiny_model, run={"kernels": {"packing": False, "logprob_head": "auto"}})
    assert recipe.run.kernels == {"packing": False, "logprob_head": "auto"}
    for bad in ({"speed": True}, {"packing": "sometimes"}):
        with pytest.raises(UserError, match="kernels"):
            tiny_recipe(tmp_path, tiny_model, run={"kernels": bad})
    seen = []
    results = {"prompts": 1, "pairs": 1, "dropped": {}, "redrawn": 0, "ended": 1.0, "seconds": 0.0}
    monkeypatch.setattr(sample, "run", lambda context: seen.append(used("packing", "cpu")) or results)
    run_recipe(recipe, installed_plugins(), tmp_path / "out", only=("sample",))
    assert seen == [False] and used("packing", "cpu")


def test_every_kernel_can_be_switched_off(tmp_path):
    """None of our layers are left, and the loop still runs."""
    seen = []
    with kernels(dict.fromkeys(DEFAULTS, False)):
        model = make_llama(len(make_tokenizer()))
        trainer = small_trainer(tmp_path, model=model, bf16=True, use_cpu=True, total_episodes=4)
        update = trainer.update
        trainer.update = lambda *args: (seen.extend(map(type, model.modules())), update(*args))[1]
        trainer.train()
    assert seen and not any(kind.__name__.startswith(("Fused", "Cast")) for kind in seen)


def test_only_the_package_itself_knows_its_modules():
    root = Path(trl_rlaif.__file__).parent
    importing = re.compile(r"trl_rlaif\.models\.kernels\.\w+ import|models\.kernels import .*\battention\b")
    inside = root / "models" / "kernels"
    found = [f for f in root.rglob("*.py") if inside not in f.parents and importing.search(f.read_text("utf-8"))]
    assert not found
