"""Pairwise judging of the responses of all variants and the initial policy to the held-out prompts."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from trl_rlaif import distributed
from trl_rlaif.data import Pair
from trl_rlaif.data.overlap import prompt_key
from trl_rlaif.errors import RunError
from trl_rlaif.evaluation import all_against_all, bootstrap_mean, length_controlled_win_rate, points
from trl_rlaif.evaluation.judge_panel import columns_for
from trl_rlaif.files import read_lines
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.labels import LabelStore
from trl_rlaif.labels.store import pair_key
from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.label_tasks import LabelTask, label_key
from trl_rlaif.pipeline.results import CompareResults
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.usage import counted, usage_numbers
from trl_rlaif.plugins import Plugins
from trl_rlaif.progress import progress_bar
from trl_rlaif.recipe import Recipe, prompt_folder
from trl_rlaif.recipe.parsing import WHO_WINS
from trl_rlaif.recipe.variants import KEY, START

Answers = dict[str, list[dict[str, Any]]]
"""Rows of one set by contestant, each with ``id``, ``prompt``, ``category``, ``text``, ``tokens`` and ``ended``."""


def play(recipe: Recipe, plugins: Plugins, folder: RunFolder, runs: Mapping[str, RunFolder]) -> CompareResults:
    """Have the judge of ``evaluate`` compare every two contestants on every prompt, in both orders.

    The labeler options in the section label do not apply.

    Judgments are stored in ``labels.jsonl`` as they arrive: a run that was killed asks only for the missing ones, and
    identical pairs of responses are judged once.

    Returns:
        ``judge``; ``usage`` if it is on a server; and ``sets``: for each evaluated set, the number of ``prompts``, the
        tables of ``all_against_all``, and under ``contestants`` each one's mean length, fraction of responses that
        ended, and length-controlled win rate over the initial policy (None for the initial policy itself).
    """
    sets = read_answers(runs)
    context = Context(recipe, folder, plugins)
    section = recipe.evaluate
    task = LabelTask("compare", WHO_WINS, section.judge, recipe.evaluation_prompt)
    with counted(context, KEY):
        judged = _judge(context, task, {pair.id: pair for answers in sets.values() for pair in _pairs(answers)})
    found = {name: _numbers(answers, judged, recipe.run.seed) for name, answers in sets.items()}
    return {"judge": label_key(context, task).judge, "sets": found, **usage_numbers(context, KEY)}


def read_answers(runs: Mapping[str, RunFolder]) -> dict[str, Answers]:
    """The responses of every contestant on each set, the initial policy first.

    Raises:
        RunError: Two variants answered different prompts.
    """
    sets: dict[str, Answers] = {}
    for index, (name, run) in enumerate(runs.items()):
        for row in read_lines(run / artifacts.SAMPLES):
            answers = sets.setdefault(row["set"], {})
            sides = {START: "start", name: "trained"} if index == 0 else {name: "trained"}
            for contestant, side in sides.items():
                answers.setdefault(contestant, []).append(
                    {key: row[key] for key in ("id", "prompt", "category")}
                    | {"text": row[side], "tokens": row[f"tokens_{side}"], "ended": row[f"ended_{side}"]}
                )
    for name, answers in sets.items():
        asked = {contestant: [row["id"] for row in rows] for contestant, rows in answers.items()}
        if len(answers) != len(runs) + 1 or any(ids != asked[START] for ids in asked.values()):
            raise RunError(f"The variants did not answer the same prompts of the set '{name}'.")
    return sets


def _pairs(answers: Answers) -> list[Pair]:
    """Pairs of any two contestants' different responses to each prompt, with ids derived from their content."""
    pairs = []
    for first, second in itertools.combinations(answers, 2):
        for one, other in zip(answers[first], answers[second], strict=True):
            if one["text"] != other["text"]:
                pairs.append(_pair(one, other))
    return pairs


def _pair(one: dict[str, Any], other: dict[str, Any]) -> Pair:
    pair = Pair("", one["prompt"], one["text"], other["text"], one["category"])
    return replace(pair, id=pair_key(pair))


def _judge(context: Context, task: LabelTask, pairs: dict[str, Pair]) -> dict[str, float | None]:
    """Probability that response_1 is preferred, by the pair's key; None if it could not be judged."""
    setup = label_key(context, task)
    labeler = context.create_labeler(task.labeler)
    extra = columns_for(context, labeler, JudgePrompt.load(prompt_folder(task.prompt)))
    pairs = {key: replace(pair, extra=extra(pair.prompt)) for key, pair in pairs.items()}
    with LabelStore(context.folder / artifacts.LABELS, context.folder.state / artifacts.LABEL_INDEX) as store:
        known = store.find(setup, pairs.values())
        # Pairs that could not be judged are retried: a server may be back.
        done = {key for key, row in known.items() if row["p"] is not None}
        distributed.wait()  # until all processes have read the stored labels
        if len(done) < len(pairs):
            judge = context.judges.load(task.judge, task.prompt)
            with progress_bar("Judging the variants", len(pairs), len(done)) as advance:
                for label in labeler.label(list(pairs.values()), judge, done):
                    store.add(setup, pairs[label.id], label)
                    advance(1)
            store.wait()
        return {key: row["p"] for key, row in store.find(setup, pairs.values()).items()}


def _numbers(answers: Answers, judged: Mapping[str, float | None], seed: int) -> dict[str, Any]:
    def preferred(first: str, second: str) -> list[float | None]:
        rows = zip(answers[first], answers[second], strict=True)
        return [0.5 if a["text"] == b["text"] else judged.get(_pair(a, b).id) for a, b in rows]

    names = list(answers)
    p = {pair: preferred(*pair) for pair in itertools.combinations(names, 2)}
    over_start = {name: [None if x is None else 1 - x for x in p[START, name]] for name in names if name != START}
    return {
        "prompts": len(answers[START]),
        **all_against_all(names, p, [prompt_key(row["prompt"]) for row in answers[START]]),
        "contestants": {name: _contestant(answers, name, over_start.get(name), seed) for name in names},
    }


def _contestant(answers: Answers, name: str, over_start: list[float | None] | None, seed: int) -> dict[str, Any]:
    rows, controlled = answers[name], None
    tokens, prompts = [row["tokens"] for row in rows], [prompt_key(row["prompt"]) for row in rows]
    if over_start is not None:
        kept = [
            (points([x])[0], len(mine["text"]), len(theirs["text"]), prompt)
            for x, mine, theirs, prompt in zip(over_start, rows, answers[START], prompts, strict=True)
            if x is not None
        ]
        controlled = length_controlled_win_rate(*map(list, zip(*kept, strict=True)), seed=seed) if kept else None
    return {
        "tokens": {"mean": statistics.fmean(tokens), "interval": bootstrap_mean(tokens, prompts, seed=seed)},
        "ended": statistics.fmean(row["ended"] for row in rows),
        "length_controlled": controlled,
    }
