"""Recommendations for GPUs that are too small."""

from __future__ import annotations

import pytest
from helpers.recipes import write_recipe
from transformers import LlamaConfig

from trl_rlaif.memory import CARDS, ModelShape, advise, capacity, plan_memory
from trl_rlaif.memory.gpus import raises
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import parse_recipe

MODEL = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, tie_word_embeddings=False, max_position_embeddings=8192, dtype="bfloat16",
)  # fmt: skip
LARGE = {
    "per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "response_length": 512,
    "gradient_checkpointing": False, "rewards": ["os:getcwd"], "max_prompt_length": 512,
}  # fmt: skip


@pytest.fixture(scope="module")
def shape():
    return ModelShape.from_config(MODEL)


@pytest.fixture
def parse(tmp_path, tiny_model):
    """Parse a recipe with only the stage rl, in bfloat16."""
    others = dict.fromkeys(("sample", "label", "reward", "evaluate", "report"))
    path = write_recipe(tmp_path, tiny_model, rl=LARGE, model={"dtype": "bfloat16"}, **others)

    def parse(*overrides):
        return parse_recipe(path, overrides=overrides, registry=installed_plugins().registry)

    return parse


def _fits(recipe, shape, card):
    return plan_memory(recipe, shape).peak <= capacity(card)


def test_every_card_is_judged_and_what_is_recommended_fits(parse, shape):
    recipe = parse()
    advice = advise(recipe, shape, plan_memory(recipe, shape))
    assert [a.card for a in advice] == list(CARDS)
    for a in advice:
        assert not a.fits and a.settings
        assert _fits(parse(*a.settings), shape, a.card)
        for left_out in a.settings:
            if "accumulation" not in left_out:  # it offsets a smaller batch and saves nothing itself
                assert not _fits(parse(*(s for s in a.settings if s != left_out)), shape, a.card), left_out


def test_the_cheapest_change_comes_first(parse, shape):
    recipe = parse()
    advice = {a.card: a for a in advise(recipe, shape, plan_memory(recipe, shape))}
    checkpointing = "rl.gradient_checkpointing=true"
    assert advice[80].settings == advice[48].settings == (checkpointing,)
    assert advice[24].settings[:2] == (checkpointing, "rl.per_device_train_batch_size=8")
    assert "model.quantization=nf4" not in advice[24].settings
    assert any("local_rollout_forward_batch_size" in s for s in advice[12].settings)
    # No setting that changes what the policy learns is needed.
    assert not any("response_length" in s for a in advice.values() for s in a.settings)


def test_paged_states_are_advised_where_they_matter(parse, shape):
    recipe = parse("model.lora.r=128")
    advice = {a.card: a.settings for a in advise(recipe, shape, plan_memory(recipe, shape))}
    assert all("rl.optim=paged_adamw_8bit" in advice[card] for card in (16, 24))


def test_some_cards_are_too_small_whatever_is_set(parse, shape):
    recipe = parse("model.lora.r=512")
    advice = {a.card: a for a in advise(recipe, shape, plan_memory(recipe, shape))}
    assert not advice[8].fits and not advice[8].settings


def test_the_batch_stays_as_large(parse, shape):
    recipe = parse()
    for a in advise(recipe, shape, plan_memory(recipe, shape)):
        changed = dict(s.split("=") for s in a.settings)
        rows = int(changed.get("rl.per_device_train_batch_size", 16))
        assert rows * int(changed.get("rl.gradient_accumulation_steps", 2)) == 32


def test_a_card_that_holds_the_plan_needs_no_advice(parse, shape):
    recipe = parse("rl.gradient_checkpointing=true", "model.quantization=nf4")
    advice = {a.card: a for a in advise(recipe, shape, plan_memory(recipe, shape))}
    assert advice[80].fits and advice[80].settings == ()
    assert not advice[8].fits


def test_a_card_is_a_little_smaller_than_its_name():
    assert 0.95 * 24 * 2**30 < capacity(24) < 24 * 2**30


def test_what_could_be_raised_fits_too(parse, shape):
    written = ("rl.gradient_checkpointing=true", "model.quantization=nf4", "rl.response_length=64")
    assert _fits(parse(*written), shape, 16)
    found = {card: raises(parse(*written), shape, card) for card in (16, 80)}
    assert "--set rl.per_device_train_batch_size=32 --set rl.gradient_accumulation_steps=1" in found[80]
    assert "--set model.quantization=none" in found[80] and "--set model.quantization=none" not in found[16]
    for card, raised in found.items():
        for changes in raised:
            assert _fits(parse(*written, *changes.replace("--set ", "").split()), shape, card)
