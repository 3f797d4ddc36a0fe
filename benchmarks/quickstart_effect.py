"""Whether the quickstart improves the policy, by a judge taught with other contrasts and with human choices.

    python benchmarks/quickstart_effect.py PANDALM --seeds 1 2 3 --output benchmarks/results/quickstart_effect.md

PANDALM is a file of pairs with human choices. Those on half of its prompts teach the examiner, as do contrasts of every
kind, from other responses to other prompts than those of the quickstart's judge. The other half measures the examiner's
agreement with humans; all of them, that of the quickstart's own judge, which saw no human choices. The quickstart is
run once per seed; its initial policy and its trained policy then answer unseen prompts, several times each. Each step
is a run in its own folder, so an interrupted measurement resumes.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from trl_rlaif.data import Pair, load_pairs
from trl_rlaif.data.overlap import prompt_key, split_by_group
from trl_rlaif.evaluation import agreement, compare_lengths, position_bias, win_rate
from trl_rlaif.files import read_lines
from trl_rlaif.hardware import processor
from trl_rlaif.labels.store import pair_key
from trl_rlaif.pipeline.context import pair_row
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import packaged_recipes, parse_recipe
from trl_rlaif.teaching import KINDS

DATA = Path(__file__).parents[1] / "recipes" / "data"
PROMPTS, EXAMINERS_PROMPTS = DATA / "quickstart_prompts.jsonl", DATA / "quickstart_eval_prompts.jsonl"
# Answers of each policy per prompt: those to the same prompt are not independent, and count as one group.
ANSWERS = 3
TAUGHT = {"contrasts": list(KINDS), "max_contrasts": 300, "max_length": 200, "learning_rate": 1e-3}
# Responses for contrasts: those to 40 prompts must yield enough of each kind.
SAMPLED = {"num_responses": 8, "keep_pairs": "all", "temperature": 1.0}
# For the steps outside the quickstart: teaching the examiner, and asking both judges about many pairs.
DTYPE = "auto"


def main() -> None:
    """Teach the examiner, run the quickstart, and write a row per seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pandalm", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--set", action="append", default=[], help="overrides of the quickstart")
    parser.add_argument("--runs", type=Path, default=Path("runs/quickstart_effect"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    judged = [pair for pair in load_pairs(str(args.pandalm)).items if pair.human in (1, 2)]
    halves = split_by_group([prompt_key(pair.prompt) for pair in judged], 0.5, seed=0)
    people, rest = (_written(args.runs / f"{name}.jsonl", [judged[i] for i in half])
                    for name, half in zip(("people", "rest"), halves, strict=True))  # fmt: skip
    unseen = _written(args.runs / "all.jsonl", judged), rest
    examiner, lines = None, []
    for seed in args.seeds:
        run = _quickstart(args, seed, f"quickstart-{seed}")
        if not (args.runs / f"unseen-{seed}").exists():
            copy = shutil.copytree(run.path, args.runs / f"copy-{seed}", dirs_exist_ok=True)
            copy.rename(args.runs / f"unseen-{seed}")  # whole, or not there
        evaluate = {"sets": {"unseen": str(_unseen_prompts(args, run))}, "num_responses": 1}
        evaluated = _quickstart(args, seed, f"unseen-{seed}", evaluate)
        own = _labels(args, f"own-{seed}", run / "judge", unseen[0])
        examiner = examiner or _examiner(args, run, people)
        lines += _row(args, seed, _minutes(run), evaluated, own, examiner)
        if args.output:
            args.output.write_text("\n".join([*_head(args, examiner, unseen[1]), *lines]) + "\n", encoding="utf-8")
    print("\n".join([*_head(args, examiner, unseen[1]), *lines]))


def _written(path: Path, pairs: Sequence[Pair]) -> Path:
    rows = [pair_row(replace(pair, extra={})) for pair in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path.resolve()


def _run(recipe: Path, folder: Path, overrides: Sequence[str] = (), only: Sequence[str] = ()) -> RunFolder:
    plugins = installed_plugins()
    parsed = parse_recipe(recipe, overrides=overrides, registry=plugins.registry)
    return run_recipe(parsed, plugins, folder, resume=True, only=only)


def _quickstart(args: argparse.Namespace, seed: int, name: str, evaluate: dict[str, Any] | None = None) -> RunFolder:
    changed = [f"evaluate.{key}={json.dumps(value)}" for key, value in (evaluate or {}).items()]
    return _run(packaged_recipes()["quickstart"], args.runs / name, [f"run.seed={seed}", *args.set, *changed])


def _minutes(run: RunFolder) -> float:
    """Minutes of all its stages, over all calls."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    return sum(stage.get("seconds", 0) for stage in results.values() if isinstance(stage, dict)) / 60


def _unseen_prompts(args: argparse.Namespace, run: RunFolder) -> Path:
    """Prompts of the training file that the run did not train on, each several times."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    unseen = read_lines(PROMPTS)[recipe["data"]["max_prompts"] :]
    rows = [row | {"id": f"{row['id']}-{number}"} for number in range(ANSWERS) for row in unseen]
    path = args.runs / "unseen.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path.resolve()


def _examiner(args: argparse.Namespace, run: RunFolder, people: Path) -> Path:
    """The folder of a judge taught with human choices, and contrasts of other responses to other prompts."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    sections = {
        "model": recipe["model"] | {"dtype": DTYPE},
        "data": {"prompts": str(EXAMINERS_PROMPTS), "instruction": recipe["data"]["instruction"]},
        "sample": recipe["sample"] | SAMPLED,
        "judge": recipe["judge"] | TAUGHT | {"pairs": str(people)},
        "label": {"labeler": recipe["label"]["labeler"], "judge": "taught", "prompt": recipe["label"]["prompt"]},
    }
    path = args.runs / "examiner.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return _run(path, args.runs / "examiner", only=("sample", "judge")) / "judge"


def _labels(args: argparse.Namespace, name: str, judge: Path, pairs: Path) -> list[tuple[Pair, dict[str, Any]]]:
    """Pairs with a taught judge's labels."""
    recipe = yaml.safe_load((args.runs / f"quickstart-{args.seeds[0]}" / "recipe.yaml").read_text(encoding="utf-8"))
    asked = {key: recipe["label"][key] for key in ("labeler", "prompt", "batch_tokens")}
    judge_section = {"path": str(judge.resolve()), "dtype": DTYPE}
    sections = {"model": recipe["model"], "data": {"pairs": str(pairs)}, "label": asked | {"judge": judge_section}}
    path = args.runs / f"{name}.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    rows = {row["pair"]: row for row in read_lines(_run(path, args.runs / name) / "labels.jsonl")}
    judged = [(pair, rows[pair_key(pair)]) for pair in load_pairs(str(pairs)).items]
    return [(pair, row) for pair, row in judged if row["p"] is not None]


def _row(
    args: argparse.Namespace,
    seed: int,
    minutes: float,
    run: RunFolder,
    own: list[tuple[Pair, dict[str, Any]]],
    examiner: Path,
) -> list[str]:
    samples = read_lines(run / "samples.jsonl")
    shown = [
        Pair(row["id"], row["prompt"], row["trained"], row["start"])
        for row in samples if row["trained"] != row["start"] and row["trained"] and row["start"]
    ]  # fmt: skip
    judged = _labels(args, f"examined-{seed}", examiner, _written(args.runs / f"answers-{seed}.jsonl", shown))
    p = {pair.id: row["p"] for pair, row in judged}
    # Equal answers are a tie, and an empty one loses.
    wins = [p.get(row["id"], 0.5 + bool(row["trained"]) / 2 - bool(row["start"]) / 2) for row in samples]
    won = win_rate(wins, [prompt_key(row["prompt"]) for row in samples])
    lengths = compare_lengths(*([len(row[side]) for row in samples] for side in ("trained", "start")))
    by_own = run.results_of("evaluate")["sets"]["unseen"]
    results = run.results_of("judge")["sources"]["all"]["after"]
    return [
        f"| {seed} | {minutes:.1f} | {_share(_agreement(own))} | {_bias(own)} | {_share(results['agreement'])} | "
        f"{_share(won, 'win_rate')} | {_share(by_own, 'win_rate')} | {lengths['ratio']:.2f} | {len(samples)} |"
    ]


def _agreement(known: list[tuple[Pair, dict[str, Any]]]) -> dict[str, Any]:
    pairs = [pair for pair, _ in known]
    human, prompts = [pair.human for pair in pairs], [prompt_key(pair.prompt) for pair in pairs]
    return agreement([row["p"] for _, row in known], human, prompts)


def _bias(known: list[tuple[Pair, dict[str, Any]]]) -> str:
    both = [(row["p_12"], row["p_21"]) for _, row in known if row["p_12"] is not None]
    return _share(position_bias(*map(list, zip(*both, strict=True)))) if both else "none"


def _share(values: dict[str, Any], key: str = "rate") -> str:
    low, high = values["interval"]
    return f"{values[key]:.0%} ({low:.0%} to {high:.0%})"


def _head(args: argparse.Namespace, examiner: Path | None, rest: Path) -> list[str]:
    seeds, more = " ".join(map(str, args.seeds)), "".join(f" --set {text}" for text in args.set)
    command = f"python benchmarks/quickstart_effect.py {args.pandalm.name} --seeds {seeds}{more}"
    agrees = _share(_agreement(_labels(args, "examiner-people", examiner, rest)))
    return [
        f"<!-- {command} -->",
        "",
        f"{processor()}. The examiner agrees with people on {agrees} of the pairs that it was not taught.",
        "",
        "| seed | minutes | judge agrees with people | its position bias | right on held-out contrasts | "
        "win rate by the examiner | by its own judge | length, start 1 | answers |",
        "|---|---|---|---|---|---|---|---|---|",
    ]


if __name__ == "__main__":
    main()
