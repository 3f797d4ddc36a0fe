"""A recipe's memory plan: its parts, phases and peak, the packaged recipes' predictions, and the command."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from helpers.recipes import write_recipe
from transformers import LlamaConfig, Qwen2Config

from trl_rlaif import PPOConfig, cli
from trl_rlaif.compat.ppo_trainer import work_out_batches
from trl_rlaif.errors import UserError
from trl_rlaif.memory import CONTEXT_BYTES, MARGIN, ModelShape, advise, plan_memory
from trl_rlaif.memory.settings import rl_batch
from trl_rlaif.memory.table import _all_phases
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import packaged_recipes, parse_recipe

QWEN = {"dtype": "bfloat16", "max_position_embeddings": 32768}
QWEN_05B = Qwen2Config(
    vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
    num_key_value_heads=2, tie_word_embeddings=True, **QWEN,
)  # fmt: skip
QWEN_15B = Qwen2Config(
    vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
    num_key_value_heads=2, tie_word_embeddings=True, **QWEN,
)  # fmt: skip
QWEN_3B = Qwen2Config(
    vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
    num_key_value_heads=2, tie_word_embeddings=True, **QWEN,
)  # fmt: skip
QWEN_7B = Qwen2Config(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, tie_word_embeddings=False, **QWEN,
)  # fmt: skip
LLAMA_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, tie_word_embeddings=False, max_position_embeddings=131072, dtype="bfloat16",
)  # fmt: skip


@pytest.fixture
def parse(tmp_path, tiny_model):
    """Parse the tiny recipe with overrides."""

    def parse(*overrides, **sections):
        path = write_recipe(tmp_path, tiny_model, **sections)
        return parse_recipe(path, overrides=overrides, registry=installed_plugins().registry)

    return parse


def _parts(plan, stage="rl", when="always"):
    return {part.name: part.bytes for part in plan.parts if (part.stage, part.when) == (stage, when)}


def _matching(plan, text, **where):
    return sum(size for name, size in _parts(plan, **where).items() if text in name)


@pytest.mark.parametrize(
    ("name", "config", "billions"),
    [
        ("advantage", QWEN_15B, 1.54),
        ("selective_rehearsal", QWEN_15B, 1.54),
        ("qlora_8gb", QWEN_05B, 0.49),
        ("qlora_12gb", QWEN_3B, 3.09),
        ("qlora_24gb", QWEN_7B, 7.62),
    ],
)
def test_the_packaged_recipes_say_what_they_need(name, config, billions):
    recipe = parse_recipe(name, registry=installed_plugins().registry)
    text = packaged_recipes()[name].read_text(encoding="utf-8")
    shape = ModelShape.from_config(config)
    plan = plan_memory(recipe, shape)
    said = float(re.search(r"predicts a peak of ([\d.]+) GiB", text)[1])
    assert shape.numel / 1e9 == pytest.approx(billions, abs=0.005)
    assert said == round(plan.peak / 2**30, 2)
    assert not plan.notes  # nothing had to be assumed
    card = int(re.search(r"a GPU with (\d+) GB", text)[1])
    assert {a.card: a.fits for a in advise(recipe, shape, plan)}[card]


def test_what_an_8b_llama_needs_more_is_what_the_largest_recipe_says():
    recipe = parse_recipe("qlora_24gb", registry=installed_plugins().registry)
    more = plan_memory(recipe, LLAMA_8B).peak - plan_memory(recipe, QWEN_7B).peak
    said = re.search(r"8B Llama needs ([\d.]+) GiB more", packaged_recipes()["qlora_24gb"].read_text(encoding="utf-8"))
    assert float(said[1]) == round(more / 2**30, 1)


def test_an_8b_policy_with_all_roles_stays_under_12_gb():
    """Batch 4 x (256 + 256), the size that the project promises."""
    keys = ["per_device_train_batch_size=4", "gradient_accumulation_steps=1", "max_prompt_length=256"]
    overrides = [f"rl.{key}" for key in keys]
    plan = plan_memory(parse_recipe("qlora_24gb", overrides=overrides, registry=installed_plugins().registry), LLAMA_8B)
    assert _parts(plan, when="update: layers").keys() >= {"hidden states, one a layer, 4 x 512 tokens"}
    assert max(plan.predict(phase) for stage, phase in plan.phases() if stage == "rl") < 11 * 2**30


def test_micro_batch_tokens_make_an_update_as_small_as_that_many_rows(parse):
    keys = ["rl.max_prompt_length=24", "rl.response_length=8"]
    whole, split, two = (
        plan_memory(parse(*keys, *more))
        for more in (
            ["rl.per_device_train_batch_size=8"],
            ["rl.per_device_train_batch_size=8", "rl.micro_batch_tokens=70"],
            ["rl.per_device_train_batch_size=2", "rl.gradient_accumulation_steps=4"],
        )
    )
    assert split.predict("update") == two.predict("update") < whole.predict("update")
    assert split.predict("scoring") == whole.predict("scoring")


def test_the_peak_is_the_largest_phase_with_margin_and_context(parse):
    plan = plan_memory(parse())
    phases = {at: plan.predict(at[1], at[0]) for at in plan.phases()}
    assert {stage for stage, _ in phases} == {"sample", "label", "reward", "rl", "evaluate"}
    assert plan.allocated == max(phases.values()) == phases[plan.largest]
    assert plan.peak == plan.allocated + int(MARGIN * plan.allocated) + CONTEXT_BYTES
    always, head = sum(_parts(plan).values()), sum(_parts(plan, when="update: output head").values())
    assert plan.predict("update: output head") == always + head
    assert plan.predict("update") == max(plan.predict("update: layers"), plan.predict("update: output head"))
    with pytest.raises(KeyError):
        plan.predict("update", "sft")


def test_every_role_is_counted(parse):
    alone = plan_memory(parse("rl.rewards=['os:getcwd']"))
    with_reward = plan_memory(parse())
    assert _matching(with_reward, "reward adapter") > _matching(alone, "reward adapter") == 0
    assert any("os:getcwd" in note for note in alone.notes)
    with_start = plan_memory(parse(sft={"data": "train.jsonl"}))
    one = _matching(with_reward, "reward adapter")
    assert _matching(with_start, "reference adapter") == one and _matching(with_reward, "reference adapter") == 0
    # Policy and value adapters and a value head of 32 weights: weights, two AdamW states, and gradients in the update.
    trained = 2 * one + 4 * 32
    assert _matching(with_reward, "policy and value") == 3 * trained
    for phase in ("update: layers", "update: output head"):
        assert _matching(with_reward, "policy and value", when=phase) == trained


def test_evaluation_generates_as_ppo_does(parse):
    """Under autocast with fused adapters; sampling has no adapter, unless there is one from SFT."""
    rows = ["rl.per_device_train_batch_size=4", "evaluate.batch_size=4", "sample.batch_size=4"]
    rows += ["evaluate.num_responses=1", "rl.max_prompt_length=64", "model.dtype=bfloat16"]

    def prompts(stage, *overrides, **sections):
        plan = plan_memory(parse(*rows, "model.quantization=nf4", *overrides, **sections))
        return _parts(plan, stage=stage, when="generation: prompts")["activations of the prompts"]

    assert prompts("evaluate") == prompts("rl") > prompts("sample")
    assert prompts("sample", sft={"data": "train.jsonl"}) == prompts("rl")


def test_what_is_planned_as_ppo_is_said(parse):
    notes = {name: " ".join(plan_memory(parse(f"rl.algorithm={name}")).notes) for name in ("ppo", "grpo")}
    assert "grpo is planned as PPO" in notes["grpo"] and "planned as PPO" not in notes["ppo"]


def test_a_value_head_on_the_policys_trunk_needs_no_adapter(parse, monkeypatch):
    one = _matching(plan_memory(parse()), "reward adapter")
    recipe = parse()
    recipe.rl.config["value"] = "trunk"
    assert _matching(plan_memory(recipe), "policy adapter and value head") == 3 * (one + 4 * 32)


def test_settings_change_what_they_should(parse):
    def predicted(phase, *overrides):
        return plan_memory(parse(*overrides)).predict(phase)

    layers = "update: layers"
    assert predicted(layers, "rl.gradient_checkpointing=false") > predicted(layers)
    assert predicted(layers, "rl.per_device_train_batch_size=8") > predicted(layers)
    large = "model.lora.r=256"  # bitsandbytes keeps the states of small tensors in 32 bits
    assert predicted(layers, large, "rl.optim=adamw_8bit") < predicted(layers, large)
    assert predicted(layers, "model.quantization=nf4") < predicted(layers)
    assert predicted("generation", "rl.local_rollout_forward_batch_size=1") < predicted("generation")
    # More accumulation only means a larger batch of prompts.
    more = "rl.gradient_accumulation_steps=8"
    assert predicted("generation", more) > predicted("generation") and predicted(layers, more) == predicted(layers)


@pytest.mark.parametrize(("rows", "steps", "minibatches"), [(4, 1, 1), (4, 4, 1), (4, 4, 2), (8, 1, 4), (4, 3, 6)])
def test_batches_are_the_trainers(parse, tmp_path, rows, steps, minibatches):
    sizes = {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": steps,
        "num_mini_batches": minibatches,
    }
    args = PPOConfig(str(tmp_path), use_cpu=True, report_to=[], **sizes)
    work_out_batches(args, 1, 64)
    recipe = parse("rl.max_prompt_length=24", *(f"rl.{key}={value}" for key, value in sizes.items()))
    assert rl_batch(recipe) == args.local_batch_size
    # As PPOUpdate splits a minibatch.
    largest = max(map(len, torch.arange(args.local_mini_batch_size).split(args.per_device_train_batch_size)))
    parts = _parts(plan_memory(recipe), when="update: layers")
    assert f"activations of all layers, {largest} x 32 tokens" in parts or (
        f"hidden states, one a layer, {largest} x 32 tokens" in parts
    )


@pytest.mark.parametrize(
    ("overrides", "confirmed"),
    [
        ([], True),
        (["rl.value=trunk"], False),
        (["rl.algorithm=grpo"], False),
        (["model.quantization=none"], False),
        (["rl.gradient_checkpointing=false"], False),
    ],
)
def test_what_no_gpu_has_confirmed_is_marked(overrides, confirmed):
    recipe = parse_recipe("qlora_12gb", overrides=overrides, registry=installed_plugins().registry)
    plan = plan_memory(recipe, QWEN_15B)
    assert plan.measured == ({"rl"} if confirmed else frozenset())
    marked = [line for line in _all_phases(plan) if line.endswith(" *")]
    assert any("reward, update" in line for line in marked)
    assert any("rl, update" in line for line in marked) != confirmed
    assert any(line.startswith("* not measured") for line in _all_phases(plan))


def test_paged_states_do_not_count_towards_the_peak(parse):
    big = ["model.lora.r=4096", "rl.optim=paged_adamw_8bit"]
    plan = plan_memory(parse(*big))
    paged = sum(part.bytes for part in plan.parts if part.paged)
    resident = plan_memory(parse(big[0], "rl.optim=adamw_8bit"))
    assert paged > 0 and plan.predict("update") == resident.predict("update") - paged


def test_the_prompt_length_is_assumed_aloud(parse):
    assert any("512 tokens" in note for note in plan_memory(parse()).notes)
    told = plan_memory(parse("rl.max_prompt_length=100"))
    assert not told.notes
    assert any("4 x 108 tokens" in name for name in _parts(told, when="update: layers"))


def test_a_judge_of_its_own_is_counted(parse, tiny_model):
    direct = {"rewards": ["direct"]}
    same = plan_memory(parse(rl=direct, reward=None, label={"labeler": "direct"}, evaluate=None))
    section = {"labeler": "direct", "judge": {"path": tiny_model, "dtype": "float32"}}
    other = plan_memory(parse(rl=direct, reward=None, label=section, evaluate=None))
    weights = _matching(same, "base: weights")
    assert _matching(other, "judge: weights") == weights and _matching(same, "judge: weights") == 0
    assert ("rl", "judging") in same.phases()
    assert _matching(other, "judge: weights", stage="label") == weights
    assert _matching(other, "base: weights", stage="label") == 0


def test_a_judge_in_vllm_is_not_counted_and_its_share_is_named(parse, tiny_model):
    judge = {"backend": "vllm", "path": tiny_model, "gpu_memory_utilization": 0.55}
    plan = plan_memory(parse("rl.max_prompt_length=24", label={"judge": judge}))
    assert plan.notes == ("A judge in vLLM takes 55% of the GPU (gpu_memory_utilization), and is not counted.",)
    assert _matching(plan, "judge: weights") == 0


def test_evaluates_judges_that_are_not_counted_are_named(parse, tiny_model):
    own = {"judge": {"path": tiny_model}}
    evaluate = {"judges": {"a": own, "b": {"judge": "same"}, "c": own}}
    notes = plan_memory(parse("rl.max_prompt_length=24", evaluate=evaluate)).notes
    assert notes == ("Models of their own among evaluate.judges (a, c) are not counted.",)
    assert not plan_memory(parse("rl.max_prompt_length=24", evaluate={"judges": {"b": {"judge": "same"}}})).notes


def test_a_model_that_is_not_there_is_an_error(parse):
    with pytest.raises(UserError, match="config.json is enough"):
        plan_memory(parse("model.path=no/such-model"))


def test_config_json_is_enough(parse, tmp_path):
    LLAMA_8B.save_pretrained(tmp_path / "bare")
    plan = plan_memory(parse(f"model.path={tmp_path / 'bare'}", "model.quantization=nf4"))
    assert 3.3 < _matching(plan, "base: weights") / 2**30 < 3.4


def _command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["trl-rlaif", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


def test_the_command_prints_parts_phases_and_cards(monkeypatch, capsys, tmp_path, tiny_model):
    path = str(write_recipe(tmp_path, tiny_model))
    assert _command(monkeypatch, "memory", path, "--set", "rl.max_prompt_length=64") == 0
    lines = capsys.readouterr().out.splitlines()
    plan = plan_memory(parse_recipe(path, overrides=["rl.max_prompt_length=64"], registry=installed_plugins().registry))
    assert f"At the peak, in {plan.largest[0]}, {plan.largest[1]}" in "\n".join(lines)
    assert f"{plan.peak / 2**30:.2f}" == next(line for line in lines if line.startswith("peak")).split()[-1]
    assert [line.split()[0] for line in lines if " GB  " in line] == ["8", "12", "16", "24", "48", "80"]
    assert _command(monkeypatch, "memory", path, "--set", "model.path=no/such-model") == 2
