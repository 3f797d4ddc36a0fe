"""``generation: vllm``: TRL's own class, with a fake engine that samples from the weights it is given."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import torch
from datasets import Dataset
from helpers.ppo import numbers, small_trainer
from helpers.recipes import write_recipe
from helpers.tiny import make_gpt2, make_llama, make_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import GRPOConfig
from trl.generation import vllm_generation

from trl_rlaif import PPOConfig, RunError, SharedBase, UserError
from trl_rlaif.compat import vllm_engine
from trl_rlaif.models.kernels.fused_lora import fuse_lora
from trl_rlaif.models.kernels.precision import CastLinear, cast_frozen_weights
from trl_rlaif.models.loading import ModelSpec, load_model
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import parse_recipe
from trl_rlaif.rl import vllm
from trl_rlaif.rl.rollouts import generate, response_lengths
from trl_rlaif.rl.vllm import MergedPolicy

pytestmark = pytest.mark.trl

IDS = torch.tensor([[5, 6, 7, 8, 3], [9, 4, 3, 7, 11]])
PROMPTS = [f"what is the {'quick ' * i}fox?" for i in range(8)]
SETTINGS = [f.name for f in PPOConfig.__dataclass_fields__.values() if f.name.startswith("vllm_")]


class Engine:
    """The parts of ``vllm.LLM`` that TRL calls: it loads a checkpoint, and then accepts new weights."""

    def __init__(self, model, **options):
        self.options, self.pushes, self.calls, self.events = options, [], [], []
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.packed = options.get("enforce_eager", False)
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=self, reload_weights=self.reload))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=runner))
        self._coming = {}

    def reload(self, weights):
        self.packed = False
        self.load_weights(weights)
        self.packed = True

    def load_weights(self, weights):
        assert not self.packed, "the parameters are packed: they can only be made again"
        for name, weight in weights:
            self._coming[name] = weight.clone()

    def reset_prefix_cache(self):
        self.model.load_state_dict(self._coming, strict=True)
        self.pushes.append(self._coming)
        self._coming = {}
        self.events.append("push")

    def sleep(self, level):
        self.events.append(f"sleep {level}")

    def wake_up(self, tags):
        self.events.append(f"wake {tags[0]}")

    def generate(self, prompts, sampling_params, use_tqdm):
        prompts = [prompt["prompt_token_ids"] for prompt in prompts]
        rows = self.sample(prompts, vars(sampling_params))
        outputs = [[SimpleNamespace(token_ids=row, logprobs=None)] for row in rows]
        return [SimpleNamespace(prompt_token_ids=ids, outputs=out) for ids, out in zip(prompts, outputs, strict=True)]

    def sample(self, prompts, options):
        self.calls.append((prompts, options))
        self.events.append("sample")
        # vLLM takes a prompt as it is, and returns a response only up to its stop token.
        sampling = {"max_new_tokens": options["max_tokens"], "temperature": max(options["temperature"], 1e-7)}
        rows = [torch.tensor([prompt]) for prompt in prompts]
        sampling |= {"pad_id": 0, "stop_id": options["stop_token_ids"]}
        drawn = [generate(self.model, row, torch.ones_like(row), **sampling)[0] for row in rows]
        return [row[0].tolist() for row in drawn]


class Server(Engine):
    """The same engine behind TRL's client."""

    def init_communicator(self, device):
        self.events.append("connect")

    def update_named_params(self, metadata, weights):
        weights = list(weights)
        assert metadata == [(n, str(w.dtype).removeprefix("torch."), list(w.shape)) for n, w in weights]
        self.load_weights(weights)

    def generate(self, prompts, features, generation_kwargs, **options):
        rows = self.sample(prompts, options | generation_kwargs)
        return {"prompt_ids": prompts, "completion_ids": rows, "logprobs": None}


@pytest.fixture
def folder(tmp_path):
    # bitsandbytes quantizes in blocks of 64: a narrower layer cannot be computed on a CPU.
    make_llama(len(make_tokenizer()), hidden_size=64).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def engines(monkeypatch, folder):
    """The engines started, in order. In TRL's class, only vLLM itself is replaced."""
    started = []

    def start(kind, **fixed):
        return lambda **options: started.append(kind(**fixed, **options)) or started[-1]

    monkeypatch.setattr(vllm_engine, "_on_cpu", lambda: True)
    for module in (vllm, vllm_generation):
        monkeypatch.setattr(module, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "LLM", start(Engine), raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
    monkeypatch.setattr(vllm_generation, "VLLMClient", start(Server, model=folder))
    # TRL sets RANK etc. for vLLM; anything started after the test would run as one of several processes.
    monkeypatch.setattr(vllm_generation, "os", SimpleNamespace(environ={}))
    monkeypatch.setattr(vllm_generation, "ensure_master_addr_port", lambda: None)
    return started


def _lora(**options):
    # Randomly initialized, so that every adapter changes the output.
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | options)


def _trainer(folder, quantization="none", **options):
    model = load_model(ModelSpec(str(folder), "float32", quantization))
    dataset = Dataset.from_dict({"prompt": PROMPTS})
    kwargs = {"model": model, "dataset": dataset, "temperature": 1.0, "trainer_kwargs": {"peft_config": _lora()}}
    return small_trainer(folder.parent, generation="vllm", **kwargs | options)


def _batch(trainer):
    return next(iter(trainer.dataloader))


# ---- The weights --------------------------------------------------------------------------------------


def _shared(kind, folder):
    """Policy and value on one base, both random, prepared as in the training loop."""
    torch.manual_seed(1)
    spec = ModelSpec(str(folder), "float32", "nf4" if kind == "nf4" else "none")
    shared = SharedBase(make_gpt2() if kind == "gpt2" else load_model(spec), _lora(fan_in_fan_out=kind == "gpt2"))
    shared.add_value()
    fuse_lora(shared.peft)
    if kind == "held":
        cast_frozen_weights(shared.model)
        assert sum(isinstance(module, CastLinear) for module in shared.modules()) == 15
    return shared.eval()


def _expected(shared):
    """The merged policy's parameters by name, in float64."""
    expected = {}
    for name, module in shared.model.named_modules():
        for part, parameter in [] if "lora_" in name else module.named_parameters(recurse=False):
            if type(parameter).__name__ == "Params4bit":
                parameter = vllm.dequantize_bnb_weight(parameter)
            expected[f"{name}.{part}".replace(".base_layer", "")] = parameter.detach().double()
    for name, module in shared.model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = (getattr(module, part)["policy"].weight.detach().double() for part in ("lora_A", "lora_B"))
            delta = b @ a * module.scaling["policy"]
            expected[f"{name}.weight"] = expected[f"{name}.weight"] + (delta.T if module.fan_in_fan_out else delta)
    tied = shared.model.config.tie_word_embeddings
    return {name: weight for name, weight in expected.items() if not (tied and name == "lm_head.weight")}


def _everything(module):
    """Copies of every tensor of a model, and of bitsandbytes' state for its 4-bit weights."""
    tensors = {n: t.detach().clone() for n, t in [*module.named_parameters(), *module.named_buffers()]}
    for name, parameter in module.named_parameters():
        state = getattr(parameter, "quant_state", None)
        parts = {} if state is None else state.as_dict()
        tensors |= {f"{name} {k}": v.clone() for k, v in parts.items() if isinstance(v, torch.Tensor)}
    return tensors


def _assert_same_bits(found, before):
    assert found.keys() == before.keys()
    assert not [name for name in before if found[name].dtype != before[name].dtype]
    assert not [name for name in before if not torch.equal(found[name], before[name])]


@pytest.mark.parametrize("kind", ["plain", "held", "nf4", "gpt2"])
def test_the_policy_is_merged_beside_the_model(kind, folder):
    shared = _shared(kind, folder)
    expected, before, kinds = _expected(shared), _everything(shared), [type(m) for m in shared.modules()]
    assert (kind == "nf4") == any(" " in name for name in before)
    with shared.role("policy"):
        view = MergedPolicy(shared.model)
        found = dict(view.named_parameters())
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        held = kind == "held" and "norm" not in name and "embed" not in name
        assert weight.dtype == (torch.bfloat16 if held else torch.float32)
        tolerance = {"rtol": 2**-8, "atol": 1e-6} if held else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(weight.double(), expected[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")
    _assert_same_bits(_everything(shared), before)
    assert [type(module) for module in shared.modules()] == kinds
    assert list(view.modules()) == [view]  # nothing for TRL to merge, or to make vLLM quantize


def test_the_names_and_the_weights_are_those_of_pefts_merge(folder):
    shared = _shared("plain", folder)
    with shared.role("policy"):
        found = dict(MergedPolicy(shared.model).named_parameters())
    merged = copy.deepcopy(shared.peft).merge_and_unload(adapter_names=["policy"])
    torch.testing.assert_close(found, dict(merged.named_parameters()), rtol=1e-6, atol=1e-6)
    with shared.role("value"):
        other = dict(MergedPolicy(shared.model).named_parameters())
    assert (other["model.layers.0.mlp.up_proj.weight"] - merged.model.layers[0].mlp.up_proj.weight).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_engine_samples_from_the_policy_and_the_model_stays(quantization, engines, folder):
    trainer = _trainer(folder, quantization)
    before = _everything(trainer.shared)
    rollout = trainer.sample(_batch(trainer))
    _assert_same_bits(_everything(trainer.shared), before)
    [engine] = engines
    assert engine.options["quantization"] is None
    with trainer.shared.role("policy"):
        expected = trainer.shared.model(IDS).logits
    torch.testing.assert_close(engine.model(IDS).logits, expected, rtol=1e-3, atol=1e-3)
    assert rollout.logprobs.sum() < 0 and (rollout.logprobs - rollout.ref_logprobs).abs().max() > 0.01


def test_weights_are_given_once_and_again_when_they_changed(engines, folder):
    trainer = _trainer(folder)
    for _ in range(2):
        trainer.sample(_batch(trainer))
    assert engines[0].events == ["push", "sample", "sample"]
    trainer.train()
    assert engines[0].events[3:] == ["sample", "push", "sample", "push", "sample"]
    weights = {n: p for n, p in trainer.shared.named_parameters() if ".policy." in n}
    weights[next(iter(weights))].data.mul_(1.5)  # as loading a checkpoint does, unseen by autograd
    trainer.sample(_batch(trainer))
    assert engines[0].events[8:] == ["push", "sample"] and len(engines) == 1


def test_an_engine_that_sleeps_is_given_the_policy_every_time(engines, folder):
    trainer = _trainer(folder, vllm_enable_sleep_mode=True)
    for _ in range(2):
        trainer.sample(_batch(trainer))
    draw = ["wake weights", "push", "wake kv_cache", "sample", "sleep 2"]
    assert engines[0].events == ["sleep 2", *draw, *draw]
    first, second = engines[0].pushes
    _assert_same_bits(second, first)


@pytest.mark.parametrize("cpu", [True, False])
def test_on_a_cpu_the_engine_has_the_policys_type_and_compiles_nothing(cpu, engines, folder, monkeypatch):
    monkeypatch.setattr(vllm_engine, "_on_cpu", lambda: cpu)
    _trainer(folder).train()
    found = {name: engines[0].options.get(name) for name in ("dtype", "enforce_eager")}
    assert found == ({"dtype": "float32", "enforce_eager": True} if cpu else {"dtype": None, "enforce_eager": None})


# ---- Requests to vLLM ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "stops"),
    [({}, [2]), ({"stop_token": None, "stop_token_id": 7}, [7]), ({"stop_token": None}, [])],
)
def test_the_whole_distribution_is_sampled(stop, stops, engines, folder):
    trainer = _trainer(folder, temperature=0.7, **stop)
    batch = _batch(trainer)
    rollout = trainer.sample(batch)
    [(prompts, options)] = engines[0].calls
    assert prompts == [r[m.bool()].tolist() for r, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert len({len(prompt) for prompt in prompts}) > 1  # so there was padding to leave out
    assert options == {
        "n": 1, "temperature": 0.7 + 1e-7, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
        "max_tokens": 8, "logprobs": None, "ignore_eos": True, "stop_token_ids": stops,
    }  # fmt: skip
    lengths, ended = response_lengths(rollout.response_ids, stop_ids=stops, pad_id=0)
    assert rollout.lengths.equal(lengths) and rollout.ended.equal(ended)


@pytest.mark.parametrize(("temperature", "asked"), [(0.0, 0.0), (0.005, 0.0), (0.01, 0.01 + 1e-7)])
def test_what_vllm_would_raise_to_a_hundredth_is_greedy(temperature, asked, engines, folder):
    trainer = _trainer(folder, temperature=temperature)
    trainer.sample(_batch(trainer))
    assert engines[0].calls[0][1]["temperature"] == asked


def test_the_settings_of_a_colocated_engine_are_handed_on(engines, folder):
    options = {"vllm_gpu_memory_utilization": 0.4, "vllm_max_model_length": 48, "vllm_enable_sleep_mode": True}
    trainer = _trainer(folder, **options)
    trainer.sample(_batch(trainer))
    expected = {"gpu_memory_utilization": 0.4, "max_model_len": 48, "enable_sleep_mode": True, "max_num_seqs": 4}
    assert expected.items() <= engines[0].options.items()
    assert engines[0].options["tensor_parallel_size"] == 1


def test_every_setting_reaches_trls_class(monkeypatch, engines, folder):
    given = {}
    monkeypatch.setattr(vllm_generation, "VLLMGeneration", lambda *a, **options: given.update(options))
    values = {
        "vllm_mode": "server", "vllm_server_base_url": "http://there:1", "vllm_server_host": "there",
        "vllm_server_port": 2, "vllm_server_timeout": 3.0, "vllm_group_port": 4, "vllm_gpu_memory_utilization": 0.5,
        "vllm_tensor_parallel_size": 6, "vllm_max_model_length": 70, "vllm_enable_sleep_mode": True,
    }  # fmt: skip
    assert values.keys() == set(SETTINGS) - {"vllm_sync"}
    trainer = _trainer(folder, **values)
    trainer.generator._vllm._start(trainer.shared.model)
    assert {name.removeprefix("vllm_"): value for name, value in values.items()}.items() <= given.items()


def test_the_defaults_are_those_of_grpo():
    ours, theirs = PPOConfig.__dataclass_fields__, GRPOConfig.__dataclass_fields__
    shared = [name for name in SETTINGS if name != "vllm_sync"]
    assert {n: ours[n].default for n in shared} == {n: theirs[n].default for n in shared}


def test_a_server_is_given_weights_and_prompts(engines, folder):
    options = {"vllm_mode": "server", "vllm_server_host": "there", "vllm_server_port": 2}
    trainer = _trainer(folder, **options)
    trainer.train()
    [server] = engines
    assert server.options == {"base_url": "http://there:2", "group_port": 51216, "connection_timeout": 240.0}
    assert server.events == ["connect", *["push", "sample"] * 3]
    assert server.calls[0][1]["stop_token_ids"] == [2] and server.calls[0][1]["top_k"] == 0


@pytest.mark.parametrize(
    ("fault", "expected", "message"),
    [
        (requests.ConnectionError("refused"), RunError, "does not answer: refused.*Start it again"),
        (NotImplementedError("NCCL needs a GPU"), UserError, "NCCL needs a GPU Set vllm_mode: colocate"),
    ],
)
def test_a_server_that_cannot_be_used_is_a_message(fault, expected, message, engines, folder, monkeypatch):
    def connect(self, device):
        raise fault

    monkeypatch.setattr(Server, "init_communicator", connect)
    trainer = _trainer(folder, vllm_mode="server")
    with pytest.raises(expected, match=message):
        trainer.train()


def test_a_server_that_is_killed_stops_the_run(engines, folder, monkeypatch):
    trainer = _trainer(folder, vllm_mode="server")
    trainer.sample(_batch(trainer))

    def generate(self, **options):
        raise requests.ConnectionError("reset by peer")

    monkeypatch.setattr(Server, "generate", generate)
    with pytest.raises(RunError, match="does not answer: reset by peer"):
        trainer.train()


# ---- The loop -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["adapter", "trunk"])
def test_the_old_logprobs_are_the_trained_models_own(value, engines, folder):
    trainer = _trainer(folder, value=value)
    trainer.train()
    logged = numbers(trainer)
    assert len(logged) == 3 and all(np.isfinite(list(entry.values())).all() for entry in logged)
    for entry in logged:  # one epoch of one minibatch: the trained policy is the one that sampled
        assert entry["val/ratio"] == pytest.approx(1, abs=1e-5) and entry["policy/approxkl_avg"] < 1e-9
        assert entry["objective/entropy"] > 1


def test_bf16_takes_the_old_logprobs_as_the_step_does(engines, folder):
    trainer = _trainer(folder, bf16=True, use_cpu=True)
    trainer.train()
    assert [entry["val/ratio"] for entry in numbers(trainer)] == pytest.approx([1, 1, 1], abs=1e-4)
    assert engines[0].pushes[0]["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_short_responses_are_padded(engines, folder, monkeypatch):
    trainer = _trainer(folder)
    given = [[5, 2], [6, 7, 8, 9, 10], [2], [4, 4, 2]]
    monkeypatch.setattr(Engine, "sample", lambda self, prompts, options: given)
    rollout = trainer.sample(_batch(trainer))
    assert rollout.response_ids.tolist() == [[5, 2, 0, 0, 0], [6, 7, 8, 9, 10], [2, 0, 0, 0, 0], [4, 4, 2, 0, 0]]
    assert rollout.lengths.tolist() == [2, 5, 1, 3] and rollout.ended.tolist() == [True, False, True, True]
    assert (rollout.logprobs != 0).sum(1).tolist() == [2, 5, 1, 3]


def test_separate_models_are_handed_over_too(engines, folder):
    value = make_llama(len(make_tokenizer()))
    value.score = torch.nn.Linear(32, 1, bias=False)
    kwargs = {"peft_config": _lora(), "value_model": value}
    trainer = _trainer(folder, trainer_kwargs=kwargs)
    trainer.train()
    merged = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model).policy).merge_and_unload()
    trainer.sample(_batch(trainer))
    torch.testing.assert_close(engines[0].pushes[-1], dict(merged.named_parameters()), rtol=1e-5, atol=1e-6)


# ---- Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "plain LoRA"),
        ({"lora_bias": True}, "plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "plain LoRA"),
        ({"target_modules": ["lm_head"]}, "lm_head has an adapter, and shares its weights"),
    ],
)
def test_what_cannot_be_merged_beside_the_model_is_refused(options, message):
    model = make_llama()
    if options.get("target_modules") == ["lm_head"]:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    with pytest.raises(UserError, match=message):
        MergedPolicy(get_peft_model(model, _lora(**options)).get_base_model())


def test_a_missing_vllm_is_a_users_error(folder, monkeypatch):
    monkeypatch.setattr(vllm, "is_vllm_available", lambda: False)
    with pytest.raises(UserError, match=r"pip install 'trl-rlaif\[vllm\]'"):
        _trainer(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation": "vlm"}, "transformers, vllm"),
        ({"vllm_mode": "serve"}, "colocate, server"),
        ({"vllm_gpu_memory_utilization": 1.5}, "it must be above 0 and at most 1"),
        ({"vllm_tensor_parallel_size": 0}, "vllm_tensor_parallel_size is 0"),
        ({"vllm_max_model_length": 53}, "prompt and response need 54 tokens"),
        ({"vllm_max_model_length": 99, "max_prompt_length": 50}, "prompt and response need 103 tokens"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        PPOConfig(str(tmp_path), bf16=False, **options)


def test_prompts_without_room_for_the_response_are_left_out(engines, folder):
    every = _trainer(folder).train_dataset["input_ids"]
    longest = max(map(len, every))
    kept = _trainer(folder, vllm_max_model_length=longest + 7).train_dataset["input_ids"]
    assert kept == [ids for ids in every if len(ids) < longest] and 0 < len(kept) < len(every)


def test_recipes_take_it(folder, tmp_path):
    path = write_recipe(tmp_path, str(folder), rl={"generation": "vllm", "vllm_gpu_memory_utilization": 0.4})
    config = parse_recipe(path, registry=installed_plugins().registry).rl.config
    assert config["generation"] == "vllm" and config["vllm_gpu_memory_utilization"] == 0.4
