"""A judge in vLLM's engine and the same in transformers: python engine_judge.py FOLDER prints JSON.

``differs`` has the parameters with other names or defaults than in the tests' stand-in. ``apart`` has, for the model
without and with an adapter, the largest difference between the two judges' log-probabilities, in nats.
"""

import json
import sys
from pathlib import Path

import torch
from helpers import fake_vllm
from helpers.judges import make_prompt
from helpers.tiny import make_llama, make_tokenizer
from peft import LoraConfig, get_peft_model
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest

from trl_rlaif.judging.local import LocalJudge
from trl_rlaif.judging.question import Thinking
from trl_rlaif.judging.vllm import Engine, VLLMJudge
from trl_rlaif.models.loading import ModelSpec

ADAPTERS = (None, "adapter")
RATINGS = tuple(map(str, range(1, 11)))
PAIRS = [("what is the capital?", "a city", "the lazy dog"), ("a", "b", "c"), ("over the dog?", "the fox " * 9, "no")]


def differs():
    real = fake_vllm.parameters(EngineArgs) | fake_vllm.parameters(LLM)
    calls = [(getattr(LLM, name), getattr(fake_vllm.LLM, name), None) for name in ("generate", "sleep", "wake_up")]
    found = [(LLM, fake_vllm.LLM, real), *calls]
    found += [(SamplingParams, fake_vllm.SamplingParams, None), (LoRARequest, fake_vllm.LoRARequest, None)]
    for name, stand_in, theirs in found:
        theirs = fake_vllm.parameters(name) if theirs is None else theirs
        for parameter, default in fake_vllm.parameters(stand_in).items():
            if parameter not in theirs or theirs[parameter] != default:
                yield f"{name.__name__}: {parameter} = {default}, not {theirs.get(parameter, 'there')}"


def distances(judge, local):
    prompt = judge.prompt
    compared = [[prompt.compare(q, a, b), prompt.compare(q, b, a)] for q, a, b in PAIRS]
    rated = [[prompt.rate(q, response)] for q, *responses in PAIRS for response in responses]
    thought = [[prompt.compare(*pair, think=True)] for pair in PAIRS]
    for groups, candidates, thinking in (
        (compared, ("1", "2"), None),
        (rated, RATINGS, None),
        (thought, ("1", "2"), Thinking(max_tokens=5)),
    ):
        theirs = dict(local.ask(groups, candidates, thinking=thinking))
        for index, answers in judge.ask(groups, candidates, thinking=thinking):
            for mine, other in zip(answers, theirs[index], strict=True):
                assert mine.failed is None and mine.rationales == other.rationales, (mine, other)
                pairs = zip(mine.logprobs[0], other.logprobs[0], strict=True)
                yield max(abs(a - b) for a, b in pairs)


def main():
    folder = Path(sys.argv[1])
    tokenizer, prompt = make_tokenizer(), make_prompt()
    # On a CPU, the engine needs a head size of 32.
    model = make_llama(len(tokenizer), hidden_size=128, length=1024)
    for weights in model.parameters():
        if weights.dim() > 1:
            weights.data.normal_(0, 0.2)  # so that answers differ visibly between questions
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(3)
    adapted = get_peft_model(model, LoraConfig(r=12, target_modules="all-linear", init_lora_weights=False)).eval()
    adapted.save_pretrained(folder / "adapter")
    apart = {}
    for adapter in ADAPTERS:
        place = folder / adapter if adapter else None
        spec = ModelSpec(str(folder / "base"), "float32")
        judge = VLLMJudge(Engine.start(spec, place, enforce_eager=True), tokenizer, prompt, "tiny")
        local = LocalJudge(adapted, tokenizer, prompt, "tiny")
        if adapter is None:
            with adapted.disable_adapter():
                apart["base"] = max(distances(judge, local))
        else:
            apart[adapter] = max(distances(judge, local))
        del judge
    print("found", json.dumps({"differs": list(differs()), "apart": apart}), flush=True)


if __name__ == "__main__":
    main()
