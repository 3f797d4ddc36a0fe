"""PPOTrainer's base for TRL versions without a PPO trainer, apart from the loop: settings, construction, saving."""

from __future__ import annotations

import dataclasses
from typing import get_type_hints

import pytest
import torch
from datasets import Dataset
from helpers.ppo import small_trainer
from helpers.tiny import make_llama, make_scorer, make_tokenizer
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from trl_rlaif import PPOTrainer, UserError
from trl_rlaif.compat.ppo_config import OwnPPOConfig
from trl_rlaif.compat.ppo_trainer import OwnPPOTrainer, with_adapter

pytestmark = pytest.mark.trl
LORA = LoraConfig(r=4, target_modules="all-linear")


def _config(folder, **options):
    arguments = {
        "per_device_train_batch_size": 4,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return OwnPPOConfig(str(folder), **arguments | options)


def _build(folder, *, model=None, ref_model=None, peft_config=None, callbacks=None, **options):
    tokenizer = make_tokenizer()
    dataset = Dataset.from_dict({"input_ids": [tokenizer(f"what is {i}?")["input_ids"] for i in range(10)]})
    models = [make_scorer(len(tokenizer), seed=seed) for seed in (1, 2)]
    return OwnPPOTrainer(
        _config(folder, **options),
        tokenizer,
        model or make_llama(len(tokenizer)),
        ref_model,
        models[0],
        dataset,
        models[1],
        callbacks=callbacks,
        peft_config=peft_config,
    )


def test_the_settings_are_those_of_trl():
    theirs = pytest.importorskip("trl.experimental.ppo", reason="TRL has none since 1.13", exc_type=ImportError)
    fields = [
        [(f.name, hints[f.name], f.default, f.default_factory) for f in dataclasses.fields(config)]
        for config in (OwnPPOConfig, theirs.PPOConfig)
        if (hints := get_type_hints(config))
    ]
    assert fields[0] == fields[1]


def test_bfloat16_is_the_default_unless_float16_is_asked_for(tmp_path):
    assert OwnPPOConfig(str(tmp_path), use_cpu=True).bf16 is True
    assert OwnPPOConfig(str(tmp_path), use_cpu=True, bf16=False).bf16 is False
    assert OwnPPOConfig(str(tmp_path), use_cpu=True, fp16=True).bf16 is False


def test_batches_and_updates_are_worked_out(tmp_path):
    args = _build(tmp_path, gradient_accumulation_steps=4, num_mini_batches=2, num_train_epochs=2).args
    assert (args.batch_size, args.local_batch_size, args.micro_batch_size) == (16, 16, 4)
    assert (args.mini_batch_size, args.local_mini_batch_size, args.world_size) == (8, 8, 1)
    assert args.total_episodes == 20 and args.num_total_batches == 2  # the second update samples more than asked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_mini_batches": 3}, "4 responses.*num_mini_batches = 3"),
        ({"whiten_rewards": True}, "these have 4"),
        ({"stop_token": "eos", "stop_token_id": 0}, "both set"),
        ({"stop_token": "end"}, "stop_token is 'end'"),
        ({"kl_estimator": "k2"}, "kl_estimator is 'k2'.*k1, k3"),
        ({"peft_config": "lora"}, "peft_config is a str"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        _build(tmp_path, **options)


def test_the_reference_is_another_model(tmp_path):
    model = make_llama(len(make_tokenizer()))
    with pytest.raises(UserError, match="ref_model is the model that is being trained"):
        _build(tmp_path, model=model, ref_model=model)
    reference = _build(tmp_path, model=model).ref_model
    assert not reference.training and not any(p.requires_grad for p in reference.parameters())
    own, copied = model.lm_head.weight, reference.lm_head.weight
    assert torch.equal(own, copied) and own.data_ptr() != copied.data_ptr()
    assert _build(tmp_path, peft_config=LORA).ref_model is None
    with pytest.raises(UserError, match="already has an adapter"):
        _build(
            tmp_path, model=with_adapter(make_llama(len(make_tokenizer())), LORA, _config(tmp_path)), peft_config=LORA
        )


@pytest.mark.parametrize("lora", [False, True])
def test_the_policy_alone_is_saved(tmp_path, lora):
    trainer = _build(tmp_path, peft_config=LORA if lora else None)
    trained = trainer.model
    trainer.save_model(str(tmp_path / "policy"))
    assert trainer.model is trained and trained.policy is trainer.policy_model
    names = {path.name for path in (tmp_path / "policy").iterdir()}
    assert ("adapter_model.safetensors" if lora else "model.safetensors") in names
    base = make_llama(len(make_tokenizer()))
    load = (lambda path: PeftModel.from_pretrained(base, path)) if lora else AutoModelForCausalLM.from_pretrained
    loaded = load(tmp_path / "policy").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in trainer.policy_model.state_dict().items())
    assert len(AutoTokenizer.from_pretrained(tmp_path / "policy")) == len(make_tokenizer())
    assert trainer.policy_model.config.use_cache


def test_the_model_card(tmp_path):
    model = make_llama(len(make_tokenizer()))
    model.config.name_or_path = "somebody/small-model"
    trainer = _build(tmp_path, model=model, peft_config=LORA)
    trainer.create_model_card("my-policy", dataset_name="somebody/prompts", tags="terse")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "somebody/small-model" and card.data.library_name == "peft"
    assert card.data.tags == ["ppo", "terse", "trl-rlaif"] and card.data.datasets == "somebody/prompts"
    assert "# my-policy" in card.text and "`somebody/small-model`" in card.text


def test_callbacks_see_what_is_trained_and_how_many_responses_there_were(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
            seen.append(("begin", model is trainer.model, optimizer is not None, lr_scheduler is not None))

        def on_step_end(self, args, state, control, **kwargs):
            seen.append((state.global_step, state.episode))

        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(sorted({"objective/kl", "episode"} & set(logs)))

    trainer = small_trainer(tmp_path, total_episodes=8, trainer_kwargs={"callbacks": [Watch()]})
    trainer.train()
    logged = ["episode", "objective/kl"]
    assert seen == [("begin", True, True, True), logged, (1, 4), logged, (2, 8)]


def test_nothing_that_transformers_keeps_hides_a_method_of_the_loop(tmp_path):
    trainer = small_trainer(tmp_path)
    trainer.log(trainer.compute_metrics(*_update(trainer)))
    assert not [name for name in vars(trainer) if callable(getattr(PPOTrainer, name, None))]


def _update(trainer):
    trainer.begin(None)
    rollout, scores = trainer.collect()
    return rollout, scores, trainer.update(rollout, *[trainer.compute_rewards(rollout, scores)] * 2)


def test_a_4_bit_policy_keeps_norms_in_float32_and_embeddings_in_bfloat16(tmp_path):
    def types(**options):
        model = make_llama(len(make_tokenizer()))
        model.is_loaded_in_4bit = options.pop("quantized", True)
        model.model.norm.bfloat16()
        model = with_adapter(model, LORA, _config(tmp_path, **options))
        return {name.rsplit("base_model.model.", 1)[-1]: p.dtype for name, p in model.named_parameters()}

    assert types(bf16=True)["model.norm.weight"] == torch.float32
    assert types(bf16=True)["model.embed_tokens.weight"] == types(bf16=True)["lm_head.weight"] == torch.bfloat16
    assert types(bf16=True)["model.layers.0.mlp.up_proj.base_layer.weight"] == torch.float32  # quantized in reality
    for options in ({"bf16": False}, {"bf16": True, "quantized": False}):
        found = types(**options)
        assert found["model.norm.weight"] == torch.bfloat16 and found["model.embed_tokens.weight"] == torch.float32
