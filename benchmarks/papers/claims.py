"""Shared by the measurements of the papers' claims: stored parts, verdicts, and pages of results."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy import stats

from trl_rlaif.data import Pair, load_pairs
from trl_rlaif.data.overlap import prompt_key, split_by_group
from trl_rlaif.evaluation import agreement_points
from trl_rlaif.files import to_json, to_line, write_atomically
from trl_rlaif.hardware import processor
from trl_rlaif.pipeline.context import pair_row
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import parse_recipe

BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BENCHMARKS))  # the scripts in the parent folder, whose tasks are measured here

PROMPTS = BENCHMARKS.parent / "recipes" / "data" / "quickstart_prompts.jsonl"
INSTRUCTION = "Answer in one short sentence."
# The quickstart's settings, for a model of its size.
LORA = {"r": 16, "alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
SAMPLED = {"temperature": 0.7, "max_new_tokens": 32, "batch_size": 64}
CONTRASTS = {"contrasts": ["other_prompt", "looping", "shuffled", "substituted"]}
TAUGHT = {"evaluations": 2, "num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-3}
RATES = {"labeler": "direct", "prompt": "brief", "batch_tokens": 4096}

POWER, CONFIDENCE = 0.8, 0.95
# Options that do not change the parts: further seeds, settings or judges reuse the existing ones.
_FREE = ("seeds", "judges", "runs", "output", "figures")


def arguments(description: str, name: str, **defaults: Any) -> argparse.ArgumentParser:
    """The options of every script: model, device, seeds, the folder of its parts, and the file to write."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=defaults.get("seeds", 3))
    if "model" in defaults:
        parser.add_argument("--model", default=defaults["model"], help="a folder, a package or an id on the Hub")
        parser.add_argument("--dtype", default="auto")
        parser.add_argument("--quantization", default="none", help="nf4 for a large model on one card")
        parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--runs", type=Path, default=Path("runs/papers") / name, help="finished parts, to go on from")
    parser.add_argument("--output", type=Path, help="a Markdown file")
    parser.add_argument("--figures", type=Path, help="the folder for its figures; default: beside it")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The parsed options; only the requested device is left visible."""
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    measured = args.runs / "options.json"
    options = {name: str(value) for name, value in vars(args).items() if name not in _FREE}
    if not measured.exists():
        write_atomically(measured, to_json(options))
    elif json.loads(measured.read_text(encoding="utf-8")) != options:
        parser.error(f"{args.runs} holds parts that were measured with other options: name another folder with --runs")
    if getattr(args, "device", "auto") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if getattr(args, "device", "auto") == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: torch finds no GPU here")
    return args


def stored(folder: Path, name: str, measure: Callable[..., Any], *given: Any) -> Any:
    """The result of ``measure(*given)``, cached in ``folder/name.json``."""
    path = folder / f"{name.replace(' ', '_').replace(',', '')}.json"
    if not path.exists():
        write_atomically(path, to_json(measure(*given)))
        print(f"{path.stem}: {path.read_text(encoding='utf-8').strip()[:300]}", flush=True)
    return json.loads(path.read_text(encoding="utf-8"))


# ---- Runs and their data --------------------------------------------------------------------------------


def model_section(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """The section ``model`` of a recipe, or of a separate judge, from the options and ``more``."""
    return {"path": args.model, "dtype": args.dtype, "quantization": args.quantization, **more}


def run(args: argparse.Namespace, name: str, sections: Mapping[str, Any], only: Sequence[str] = ()) -> RunFolder:
    """The folder of a recipe's run, new or resumed, next to the recipe."""
    path, plugins = args.runs / f"{name}.yaml", installed_plugins()
    path.write_text(yaml.safe_dump(dict(sections)), encoding="utf-8")
    recipe = parse_recipe(path, registry=plugins.registry)
    return run_recipe(recipe, plugins, args.runs / name, resume=True, only=only, confirm=lambda _: True)


def halves(path: Path) -> tuple[list[Pair], list[Pair]]:
    """Pairs with human choices, in two halves without common prompts."""
    judged = [pair for pair in load_pairs(str(path)).items if pair.human in (1, 2)]
    parts = split_by_group([prompt_key(pair.prompt) for pair in judged], 0.5, seed=0)
    first, second = ([judged[i] for i in part] for part in parts)
    return first, second


def write_rows(path: Path, rows: Sequence[Mapping[str, Any] | Pair]) -> Path:
    """Write rows or pairs as JSON lines; returns the absolute path."""
    write_atomically(path, "".join(to_line(pair_row(row) if isinstance(row, Pair) else row) for row in rows))
    return path.resolve()


def preferences(pairs: Sequence[Pair]) -> list[dict[str, str]]:
    """Human choices as rows in TRL's preference format."""
    chosen = [(pair.prompt, *pair.responses[:: 1 if pair.human == 1 else -1]) for pair in pairs]
    return [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in chosen]


def share(values: Mapping[str, Any], key: str = "rate") -> str:
    """A proportion with its interval, in percent."""
    low, high = values["interval"]
    return f"{values[key]:.0%} ({low:.0%} to {high:.0%})"


def by_prompt(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> list[float]:
    """By how many points of agreement with people one judge is ahead of another, by prompt, since pairs share prompts.

    Args:
        ours: Of one judge, a row per pair with ``p``, ``human`` and ``prompt``.
        theirs: Of the other the same pairs; the shorter list is the start of the longer.
    """
    found: dict[str, list[float]] = defaultdict(list)
    sides = [agreement_points([row["p"] for row in rows], [row["human"] for row in rows]) for rows in (ours, theirs)]
    if any((a["prompt"], a["human"]) != (b["prompt"], b["human"]) for a, b in zip(ours, theirs, strict=False)):
        raise ValueError("The rows are not of the same pairs: one of the judges has no answer to some.")
    for row, a, b in zip(ours, *sides, strict=False):
        found[row["prompt"]].append(a - b)
    return [float(np.mean(points)) for points in found.values()]


# ---- Verdicts -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """The result of independent measurements (seeds, prompts) for a claim.

    Attributes:
        word: "supported" if the 95% t-interval of the mean is on the claim's side, "contradicted" if it is on the
            other side, else "undecided".
        mean, low, high: The mean and its interval.
        needed: Sample size for a power of 80%, given the observed mean and standard deviation; None if the claim is
            decided, or there are fewer than two measurements.
    """

    claim: str
    word: str
    mean: float
    low: float
    high: float
    n: int
    unit: str
    needed: int | None

    def line(self) -> str:
        """A table row: claim, verdict, numbers, and the sample size needed to decide."""
        needed = "" if self.needed is None else f"{self.needed:,}" if self.needed <= 10_000 else "over 10,000"
        interval = f"{self.low:+.3f} to {self.high:+.3f}; " if math.isfinite(self.low) else ""
        figures = f"{self.mean:+.3f} ({interval}{self.n} {self.unit if self.n > 1 else self.unit.removesuffix('s')})"
        return f"| {self.claim} | **{self.word}** | {figures} | {needed} |"


def verdict(claim: str, differences: Sequence[float], *, unit: str = "seeds", within: float | None = None) -> Verdict:
    """Test the claim that the mean of ``differences`` is positive or, with ``within``, that it is close to zero.

    Args:
        differences: One number per independent measurement; larger values favor the claim.
        unit: The independent unit.
        within: Equivalence bound: supported if the whole interval is within it, contradicted if the interval is
            outside.
    """
    values = np.asarray(differences, dtype=np.float64)
    mean, n = float(values.mean()), values.size
    std = float(values.std(ddof=1)) if n > 1 else math.nan
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * std / math.sqrt(n) if n > 1 else math.inf
    low, high = mean - half, mean + half
    if std == 0:  # equal by chance, as shares of few pairs may be: of the spread nothing is known
        low, high = -math.inf, math.inf
    if within is None:
        word = "supported" if low > 0 else "contradicted" if high < 0 else "undecided"
        gap = abs(mean)
    else:
        outside = low > within or high < -within
        word = "supported" if -within < low and high < within else "contradicted" if outside else "undecided"
        gap = abs(within - abs(mean))
    needed = _needed(gap, std) if word == "undecided" and n > 1 else None
    return Verdict(claim, word, mean, low, high, n, unit, needed)


def _needed(gap: float, std: float) -> int | None:
    """Sample size at which a two-sided t-test detects a mean of ``gap`` with the required power."""
    if gap == 0 or std == 0:
        return None
    z = stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER)
    n = max(2, math.ceil((z * std / gap) ** 2))  # the t-test needs slightly more than this normal approximation
    while n < 1000 and _power(gap / std, n) < POWER:
        n += 1
    return n


def _power(effect: float, n: int) -> float:
    critical = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)
    return float(stats.nct.sf(critical, n - 1, effect * math.sqrt(n)))


# ---- Output ---------------------------------------------------------------------------------------------


def write(
    args: argparse.Namespace, head: str, lines: Sequence[str], verdicts: Sequence[Verdict],
    figures: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Print the page; with ``--output``, write it and its figures.

    Args:
        head: The models and machine of the measurement.
        lines: The tables.
        figures: The report's plots, by title.
    """
    page = [
        f"<!-- {_command()} -->",
        "",
        head,
        "",
        "| claim | verdict | difference in its favour (95% interval) | would decide |",
        "|---|---|---|---|",
        *(found.line() for found in verdicts),
        "",
        *lines,
    ]
    if args.output:
        folder = args.figures or args.output.parent
        for number, (title, drawing) in enumerate((figures or {}).items(), 1):
            path = folder / f"{args.output.stem}-{number}.svg"
            path.write_bytes(drawing.titled_svg(title))
            page += ["", f"![{title}]({os.path.relpath(path, args.output.parent)})"]
        write_atomically(args.output, "\n".join(page) + "\n")
    print("\n".join(page))


def _command() -> str:
    """The command line of this call, without local folders."""
    words, skip = [], False
    for word in sys.argv[1:]:
        if skip or word in ("--runs", "--output", "--figures"):
            skip = not skip
            continue
        words.append(Path(word).name if "/" in word and Path(word).exists() else word)
    return shlex.join(["python", f"benchmarks/papers/{Path(sys.argv[0]).name}", *words])


def made_with(model: str | None = None) -> str:
    """The model, libraries and processor, for a page's head."""
    names = ("torch", "transformers", "trl", "trl-rlaif")
    found = [*([Path(model).name] if model else []), ", ".join(f"{name} {version(name)}" for name in names)]
    return "; ".join([*found, processor()])
