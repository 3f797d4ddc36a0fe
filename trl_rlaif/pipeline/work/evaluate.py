"""The trained policy against the initial policy on held-out prompts: the judges' win rates, and both rewards."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from trl_rlaif.batching import length_batches
from trl_rlaif.data import Prompt
from trl_rlaif.data.overlap import prompt_key
from trl_rlaif.distributed import divided
from trl_rlaif.evaluation import bootstrap_mean, win_rate
from trl_rlaif.evaluation.forgetting import answer_pair, better_half, mean_nll
from trl_rlaif.evaluation.judge_panel import MAIN, ask_judges, check_servers, judged_numbers
from trl_rlaif.files import to_line, write_atomically
from trl_rlaif.generation import sample_responses, seeded
from trl_rlaif.judging.suspicious import count_suspicious
from trl_rlaif.models.role_models import SharedRoleModels
from trl_rlaif.models.shared_model import SharedBase
from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.answers import rewards_of, sources
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.labeler_rewards import SIDES, score_responses
from trl_rlaif.pipeline.results import EvaluateResults
from trl_rlaif.pipeline.stages.evaluate import longest_response
from trl_rlaif.progress import progress_bar
from trl_rlaif.recipe.inputs import warn_of_overlaps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trl_rlaif.types import RehearsalPair

# Minimum number of a category's prompts for its win rate to be meaningful.
FEWEST_FOR_DRIFT = 5


def run(context: Context) -> EvaluateResults:
    """Write ``samples.jsonl``; return win rates and rewards by set."""
    recipe, started = context.recipe, time.monotonic()
    check_servers(context)
    shared = SharedBase(context.load_base(), context.folder / artifacts.POLICY, reference=context.initial)
    if recipe.reward and "reward" in recipe.rl.reward_names:
        shared.add_reward(context.folder / artifacts.REWARD)
    shared.to(shared.model.device).eval()
    rows, found = {}, {}
    for name, source in sources(recipe).items():
        rows[name], found[name] = _answers(context, shared, name, source)
    models = ask_judges(context, shared, rows)
    score_responses(context, shared, rows)
    samples, seed = [row for of_set in rows.values() for row in of_set], recipe.run.seed
    write_atomically(context.folder / artifacts.SAMPLES, "".join(map(to_line, samples)))
    return {
        "judge": models[MAIN],
        "sets": {
            name: judged_numbers(of_set, models, seed) | _numbers(of_set, seed) | found[name]
            for name, of_set in rows.items()
        },
        "agreement": _agreement(context),
        "overlaps": warn_of_overlaps(recipe, "evaluate"),
        "seconds": time.monotonic() - started,
    }


def _agreement(context: Context) -> dict[str, Any]:
    """Agreement with human choices, if the data has them: of the labels, and of the reward model."""
    return {stage: context.folder.results_of(stage).get("agreement") for stage in ("label", "reward")}


def _answers(
    context: Context, shared: SharedBase, name: str, source: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row per prompt: both policies' first responses, and means over all responses.

    Also returns the set's own results: skipped prompts, and the NLL of the initial policy's good answers.
    """
    length, reader = longest_response(context.recipe), context.reader(shared.model)
    prompts, tokens, skipped = context.encoded_prompts(source, length, shared.model, "eval_prompts")
    roles = {"start": shared.reference, "trained": "policy"}
    drawn = {
        side: _responses(context, shared, role, f"{name}: {side}", prompts, tokens, length)
        for side, role in roles.items()
    }
    texts = {
        side: [reader.read(ids, prompt).answer.strip() for (ids, *_), prompt in zip(responses, tokens, strict=True)]
        for side, responses in drawn.items()
    }
    numbers = {side: _of_each_prompt(context, shared, tokens, responses) for side, responses in drawn.items()}
    rows = [
        {
            "set": name,
            "id": prompt.id,
            "prompt": prompt.prompt,
            "category": prompt.category,
            **{side: texts[side][i] for side in roles},
            **{f"{key}_{side}": values[i] for side in roles for key, values in numbers[side].items()},
        }
        for i, prompt in enumerate(prompts)
    ]
    asked, firsts = [prompt.prompt for prompt in prompts], [responses[0] for responses in drawn["start"]]
    start = [answer_pair(*row) for row in zip(asked, texts["start"], tokens, firsts, strict=True)]
    return rows, {"skipped": skipped} | _nlls(context, shared, start, numbers["start"]["reward"])


def _nlls(context: Context, shared: SharedBase, pairs: list[RehearsalPair], rewards: list[Any]) -> dict[str, float]:
    """NLL per token of the initial policy's good answers, under itself and under the trained policy.

    The good answers are the half with the highest rewards; all, without a reward model.
    """
    kept = range(len(pairs)) if None in rewards else better_half(rewards)
    good, size, device = [pairs[i] for i in kept], context.recipe.evaluate.batch_size, shared.model.device
    return {
        f"nll_{side}": mean_nll(SharedRoleModels(shared), part, good, batch_size=size, device=device)
        for side, part in (("start", "reference"), ("trained", "policy"))
    }


def _of_each_prompt(
    context: Context, shared: SharedBase, tokens: list[list[int]], responses: list[list[list[int]]]
) -> dict[str, list[Any]]:
    """Means over each prompt's responses, and the first one's reward (None without a reward model)."""
    reader, many = context.reader(shared.model), len(responses[0])
    rewards: list[Any] = [None] * len(tokens) * many
    if "reward" in shared.heads:
        rewards = rewards_of(
            context, shared, [p for p in tokens for _ in range(many)], [r for rs in responses for r in rs]
        )
    of_prompts = [rewards[i : i + many] for i in range(0, len(rewards), many)]
    return {
        "tokens": [statistics.fmean(len(r) for r in rs) for rs in responses],
        "ended": [
            statistics.fmean(reader.read(r, prompt).ended for r in rs)
            for rs, prompt in zip(responses, tokens, strict=True)
        ],
        "reward": [rs[0] for rs in of_prompts],
        "mean_reward": [None if None in rs else statistics.fmean(rs) for rs in of_prompts],
    }


def _responses(
    context: Context,
    shared: SharedBase,
    role: str | None,
    description: str,
    prompts: list[Prompt],
    tokens: list[list[int]],
    length: int,
) -> list[list[list[int]]]:
    """Token ids of each prompt's responses under a role, with the end token if it was generated."""
    section, stops = context.recipe.evaluate, context.stop_ids(shared.model)
    responses: list[list[list[int]]] = [[]] * len(prompts)
    batch_size = max(1, section.batch_size // section.num_responses)

    def draw(batch: list[int]) -> list[list[list[int]]]:
        with seeded(context.recipe.run.seed, "evaluate", *(prompts[i].id for i in batch)):
            return sample_responses(
                shared.model,
                context.tokenizer,
                [tokens[i] for i in batch],
                num_responses=section.num_responses,
                max_new_tokens=length,
                temperature=section.temperature,
                stop_ids=stops,
                keep_end=True,
            )

    with progress_bar(f"Answering ({description})", len(prompts), unit="prompts") as advance, shared.role(role):
        for batch, drawn in divided(length_batches([len(t) for t in tokens], batch_size), draw):
            for i, of_prompt in zip(batch, drawn, strict=True):
                responses[i] = of_prompt
            advance(len(batch))
    return responses


def _numbers(rows: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    numbers: dict[str, Any] = {"prompts": len(rows)}
    asked = [prompt_key(row["prompt"]) for row in rows]
    for side in ("start", "trained"):
        numbers[f"ended_{side}"] = statistics.fmean(row[f"ended_{side}"] for row in rows)
        numbers[f"tokens_{side}"] = statistics.fmean(row[f"tokens_{side}"] for row in rows)
        numbers[f"suspicious_{side}"] = count_suspicious([row[side]] for row in rows)
        numbers[f"reward_{side}"] = _mean([row[f"mean_reward_{side}"] for row in rows], asked, seed)
    pairs = [(row["mean_reward_start"], row["mean_reward_trained"]) for row in rows]
    gains = [None if start is None else trained - start for start, trained in pairs]
    numbers["reward_gain"] = _mean(gains, asked, seed)
    names = rows[0].get("rewards_start", {})
    numbers |= {"labeler_rewards": {name: _of_labeler(name, rows, seed) for name in names}} if names else {}
    by_category = defaultdict(list)
    for row, gain, key in zip(rows, gains, asked, strict=True):
        if row["category"] is not None and row["p_trained"] is not None:
            by_category[row["category"]].append((row["p_trained"], gain, key))
    numbers["by_category"] = {category: _of_category(found, seed) for category, found in by_category.items()}
    return numbers


def _of_category(found: list[tuple[float, float | None, str]], seed: int) -> dict[str, Any]:
    """The judge's win rate on a category of prompts, and the reward model's gain."""
    preferred, gains, asked = zip(*found, strict=True)
    win, gain = win_rate(preferred, asked), _mean(list(gains), asked, seed)
    # The reward rose, but the judge prefers the initial policy, each by its interval: a sign of reward hacking.
    drift = gain is not None and gain["interval"][0] > 0 and win["interval"][1] < 0.5
    drift = drift and len(found) >= FEWEST_FOR_DRIFT
    return {"win_rate": win["win_rate"], "n": len(found), "reward_gain": gain, "drift": drift}


def _of_labeler(name: str, rows: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """A labeler's mean rewards over the prompts that have both, and the mean gain per prompt."""
    both = [(row["prompt"], *(row[f"rewards_{side}"][name] for side in SIDES)) for row in rows]
    found = [(prompt_key(prompt), start, trained) for prompt, start, trained in both if None not in (start, trained)]
    numbers: dict[str, Any] = {"prompts": len(found), "unscored": len(rows) - len(found)}
    if not found:
        return numbers
    asked, start, trained = map(list, zip(*found, strict=True))
    gains = [after - before for before, after in zip(start, trained, strict=True)]
    means = {"start": start, "trained": trained, "gain": gains}
    return numbers | {key: _mean(values, asked, seed) for key, values in means.items()}


def _mean(values: list[float | None], prompts: Sequence[str], seed: int) -> dict[str, Any] | None:
    """Mean and 95% bootstrap interval over prompts; None if a value is missing."""
    if any(value is None for value in values):
        return None
    return {"mean": statistics.fmean(values), "interval": bootstrap_mean(values, prompts, seed=seed)}
