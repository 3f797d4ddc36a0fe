"""Static caches give the same responses, for every architecture for which transformers supports them."""

from __future__ import annotations

import pytest
import torch
from helpers.families import make_family
from helpers.tiny import make_gpt2, make_llama, make_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache

from trl_rlaif.generation import sample_responses, seeded
from trl_rlaif.models.kernels import generation_kernels, kernels, static_cache
from trl_rlaif.rl.rollouts import generate

PROMPTS = [[5, 9, 4, 7, 8, 6, 3, 5, 9, 4, 7, 8], [11, 12, 13], [21]]
FAMILIES = ("granite", "gemma3_text", "llama4_text", "qwen3_5_text", "mamba2")


@pytest.fixture(params=[make_llama, make_gpt2, *FAMILIES])
def model(request):
    """Models; sliding windows are shorter than the prompts."""
    model = request.param() if callable(request.param) else make_family(request.param)
    config = model.config.get_text_config()
    if getattr(config, "sliding_window", None):
        config.sliding_window = 8
    return model.double()


def _caches(model):
    """A list that collects the type of every cache passed to the model."""
    seen = []
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(type(kwargs.get("past_key_values", kwargs.get("cache_params")))),
        with_kwargs=True,
    )
    return seen


@pytest.mark.parametrize("drawn", [1, 3])
def test_responses_stay_the_same(model, drawn):
    def draw():
        limits = {"max_new_tokens": 12, "temperature": 1.0, "stop_ids": [2], "keep_end": True}
        with seeded(1, "draw"):
            return sample_responses(model, make_tokenizer(), PROMPTS, num_responses=drawn, **limits)

    seen, expected = _caches(model), draw()
    assert set(seen) == {DynamicCache}
    seen.clear()
    with kernels(static_cache=True):
        assert draw() == expected
    assert set(seen) == {StaticCache}


def test_log_probabilities_of_padded_prompts_stay_the_same(model):
    ids, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.bool)
    for row, prompt in enumerate(PROMPTS):
        ids[row, -len(prompt) :], mask[row, -len(prompt) :] = torch.tensor(prompt), True

    def draw():
        with seeded(1, "draw"):
            return generate(model, ids, mask, max_new_tokens=12, temperature=1.0, pad_id=0, stop_id=2)

    expected = draw()
    with kernels(static_cache=True):
        found = draw()
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-6)


def test_keys_and_values_of_one_type_only():
    """A static cache has a single dtype; under autocast, float32 weights give float32 keys and bfloat16 values."""
    model = make_llama()
    with kernels(static_cache=True):
        assert static_cache(model, 9)
        with torch.autocast("cpu", torch.bfloat16):
            assert static_cache(model, 9) == {} and static_cache(model.bfloat16(), 9)
            model.model.norm.float()
            assert static_cache(model, 9) == {}


def test_few_lengths_are_compiled():
    model = make_llama()
    assert static_cache(model, 300) == {}
    with kernels(static_cache=True):
        assert {static_cache(model, n)["max_cache_len"] for n in range(257, 513)} == {512}
        assert static_cache(make_family("mpt"), 300) == {}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_one_graph_with_adapters_too(dtype):
    """As on a GPU, where the graph is then compiled; on a CPU, transformers compiles only if forced to."""
    torch._dynamo.reset()
    model = get_peft_model(
        make_llama(hidden_size=64).to(dtype), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    ).eval()
    graphs: list[object] = []
    compiling = CompileConfig(fullgraph=True, mode=None, backend=lambda graph, _: graphs.append(graph) or graph)
    compiling._compile_all_devices = True

    def draw(length):
        ids, mask = torch.randint(3, 380, (2, length)), torch.ones(2, length, dtype=torch.long)
        mask[0, :3] = 0
        config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
        config.update(output_logits=True, return_dict_in_generate=True)
        with generation_kernels(model):
            cache = static_cache(model, length + 6)
            config.update(**cache, **({"compile_config": compiling} if cache else {}))
            return torch.stack(model.generate(ids, attention_mask=mask, generation_config=config).logits).float()

    for length in (20, 17):
        torch.manual_seed(length)
        expected = draw(length)
        torch.manual_seed(length)
        with kernels(static_cache=True):
            found = draw(length)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.2)
    assert len(graphs) == 1
