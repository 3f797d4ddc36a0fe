"""The judges of the stage evaluate: asking them about the responses, and the resulting metrics."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from trl_rlaif.data import Pair
from trl_rlaif.data.overlap import prompt_key
from trl_rlaif.evaluation import (
    choices,
    compare_lengths,
    harmless_rate,
    judge_agreement,
    length_controlled_win_rate,
    points,
    win_rate,
)
from trl_rlaif.evaluation.forgetting import preferences
from trl_rlaif.judging.judge import Judge
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.models.shared_model import SharedBase
from trl_rlaif.pipeline.context import Context
from trl_rlaif.progress import progress_bar, say
from trl_rlaif.recipe import ComponentRef, JudgeSection, Recipe, ServerJudgeSection, prompt_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trl_rlaif.components import Labeler
    from trl_rlaif.encoding import PromptLike
    from trl_rlaif.evaluation.forgetting import Preferred

# The main judge's name, next to those of evaluate.judges.
MAIN = "judge"

Rows = list[dict[str, Any]]


# ---- Asking ---------------------------------------------------------------------------------------------


def judge_of(context: Context, shared: SharedBase) -> Judge:
    """The main judge; if it is "same" or "taught", the shared base itself."""
    return _load(context, shared, context.recipe.evaluate.judge, context.recipe.evaluation_prompt)


def asking(
    context: Context,
    judge: Judge,
    description: str = "",
    section: str | JudgeSection | ServerJudgeSection = "same",
) -> Preferred:
    """A function from prompts with two answers each to the judge's probability that the first is better, or None.

    The judge is asked in both orders, whatever the section label says.

    Args:
        description: Of the progress bar; None: no bar.
        section: The judge's section in the recipe.
    """

    labeler = context.create_labeler(context.recipe.deciding_labeler(section))

    def preferred(prompts: Sequence[PromptLike], first: Sequence[str], second: Sequence[str]) -> list[float | None]:
        extra = columns_for(context, labeler, judge.prompt)
        pairs = [
            Pair(str(i), prompt, *of, extra=extra(prompt))
            for i, (prompt, *of) in enumerate(zip(prompts, first, second, strict=True))
        ]
        found: list[float | None] = [None] * len(pairs)
        bar = progress_bar(description, len(pairs), unit="pairs") if description else nullcontext(lambda count: None)
        with bar as advance:
            for label in labeler.label(pairs, judge):
                found[int(label.id)] = label.p
                advance(1)
        return found

    return preferred


def columns_for(context: Context, labeler: Labeler, prompt: JudgePrompt) -> Callable[[PromptLike], dict[str, Any]]:
    """The other columns of an evaluated prompt, if the labeler reads any; else none."""
    if not labeler.columns(prompt):
        return lambda _: {}
    return lambda of: context.evaluated_columns[prompt_key(of)]


def check_servers(context: Context) -> None:
    """Check, before any response is sampled, that a judge on a server has its key and its package.

    Raises:
        UserError: One is missing.
    """
    for section, prompts in _by_model(context.recipe).items():
        if isinstance(section, ServerJudgeSection):
            context.judges.load(section, prompts[next(iter(prompts))])


def ask_judges(context: Context, shared: SharedBase, sets: dict[str, Rows]) -> dict[str, str]:
    """Ask every judge about the first responses to all prompts, and add its answers to their rows.

    A judge with its own model is loaded when its turn comes, and freed before the next one is loaded.

    Args:
        shared: The base, for judges that are "same" or "taught".
        sets: Rows by set, with ``prompt``, ``start`` and ``trained``. They get ``p_trained``, the main judge's
            probability that the trained policy's response is better; with further judges ``p_trained_by``, the same by
            their names; and with ``evaluate.harmless`` the ratings ``harmless_start`` and ``harmless_trained`` in
            [-1, 1]; None if not judged.

    Returns:
        The model's name by judge, the main one first.
    """
    section = context.recipe.evaluate
    for row in (row for rows in sets.values() for row in rows):
        row["p_trained"] = None
        row |= {"p_trained_by": dict.fromkeys(section.judges)} if section.judges else {}
        row |= {"harmless_start": None, "harmless_trained": None} if section.harmless else {}
    models: dict[str, str] = {}
    for judge, prompts in _by_model(context.recipe).items():
        models |= dict.fromkeys(prompts, _ask(context, shared, judge, prompts, sets))
    return {name: models[name] for name in (MAIN, *section.judges)}


def _by_model(recipe: Recipe) -> dict[str | JudgeSection | ServerJudgeSection, dict[str, str]]:
    """Each judge's prompt by its name, grouped by model: one that judges twice is loaded once."""
    section, main = recipe.evaluate, recipe.evaluation_prompt
    found: dict[Any, dict[str, str]] = {section.judge: {MAIN: main}}
    for name, further in section.judges.items():
        found.setdefault(further.judge or section.judge, {})[name] = further.prompt or main
    return found


def _load(context: Context, shared: SharedBase, section: str | JudgeSection | ServerJudgeSection, prompt: str) -> Judge:
    return context.judges.load(section, prompt, shared)


def _ask(
    context: Context,
    shared: SharedBase,
    section: str | JudgeSection | ServerJudgeSection,
    prompts: dict[str, str],
    sets: dict[str, Rows],
) -> str:
    """Ask one model with each of its prompts; returns its name. It is freed on return."""
    judge, harmless = _load(context, shared, section, prompts[next(iter(prompts))]), context.recipe.evaluate.harmless
    for name, prompt in prompts.items():
        judge.prompt = JudgePrompt.load(prompt_folder(prompt))
        for of, rows in sets.items():
            description = f"Judging ({of})" if name == MAIN else f"Judging ({of}, {name})"
            _compare(asking(context, judge, description, section), name, rows)
    if MAIN in prompts and harmless:
        judge.prompt = JudgePrompt.load(prompt_folder(harmless))
        for of, rows in sets.items():
            _rate(context, judge, f"Rating harmlessness ({of})", rows)
    return judge.name


def _compare(preferred: Preferred, name: str, rows: Rows) -> None:
    prompts, trained, start = ([row[key] for row in rows] for key in ("prompt", "trained", "start"))
    found = preferences(preferred, prompts, trained, start)
    for row, p in zip(rows, found, strict=True):
        holder, key = (row, "p_trained") if name == MAIN else (row["p_trained_by"], name)
        holder[key] = p


def _rate(context: Context, judge: Judge, description: str, rows: Rows) -> None:
    """Rate both responses of a prompt or neither, so that both rates are over the same prompts."""
    labeler = context.create_labeler(ComponentRef("direct"))
    extra = columns_for(context, labeler, judge.prompt)
    pairs = [
        Pair(str(i), row["prompt"], row["start"], row["trained"], extra=extra(row["prompt"]))
        for i, row in enumerate(rows)
    ]
    skipped: Counter[str] = Counter()
    with progress_bar(description, len(pairs), unit="pairs") as advance:
        for label in labeler.label(pairs, judge):
            rows[int(label.id)] |= {"harmless_start": label.score_1, "harmless_trained": label.score_2}
            skipped.update([label.skipped] if label.skipped else [])
            advance(1)
    if skipped.total() == len(pairs):
        say(f"Warning: the judge could not rate any response's harmlessness: {', '.join(skipped)}.")


# ---- Numbers --------------------------------------------------------------------------------------------


def judged_numbers(rows: Rows, models: dict[str, str], seed: int) -> dict[str, Any]:
    """The judges' results on one set.

    Args:
        rows: After ``ask_judges``; at least one.
        models: Its return value.
        seed: Of the bootstraps.

    Returns:
        For the main judge ``unjudged``, the results of ``win_rate`` (left out if nothing was judged) and
        ``length_controlled`` (None if it cannot be fitted); ``judges``, the same for each further one with its
        ``judge``, the model's name; ``judge_agreement`` of all, from the function of that name, over the prompts with
        two different responses (None with one judge); ``lengths`` in characters, of the trained and initial policy;
        ``harmless``: ``rate``, ``interval``, ``n`` and ``unjudged`` by side (None if not measured).
    """
    further = [name for name in models if name != MAIN]
    p = {MAIN: [row["p_trained"] for row in rows]} | {n: [row["p_trained_by"][n] for row in rows] for n in further}
    lengths = tuple([len(row[side]) for row in rows] for side in ("trained", "start"))
    prompts = [prompt_key(row["prompt"]) for row in rows]
    return {
        **_verdict(p[MAIN], *lengths, prompts=prompts, seed=seed),
        "judges": {
            name: {"judge": models[name], **_verdict(p[name], *lengths, prompts=prompts, seed=seed)} for name in further
        },
        "judge_agreement": _agreement(rows, p, prompts) if further else None,
        "lengths": compare_lengths(*lengths, prompts, seed=seed),
        "harmless": _harmless(rows, prompts),
    }


def _verdict(
    p: list[float | None], trained: list[int], start: list[int], prompts: list[str], seed: int
) -> dict[str, Any]:
    """One judge's win rate, and its length-controlled win rate."""
    judged = [row for row in zip(p, trained, start, prompts, strict=True) if row[0] is not None]
    numbers: dict[str, Any] = {"unjudged": len(p) - len(judged), "length_controlled": None}
    if judged:
        preferred, *lengths, asked = zip(*judged, strict=True)
        numbers |= win_rate(preferred, asked)
        numbers["length_controlled"] = _at_equal_length(preferred, *lengths, asked, seed=seed)
    return numbers


def _at_equal_length(
    p: Sequence[float], trained: Sequence[int], start: Sequence[int], prompts: Sequence[str], *, seed: int
) -> dict[str, Any] | None:
    """From wins, with ties as a half, like the win rate: the two then differ only by length."""
    try:
        return length_controlled_win_rate(points(p), trained, start, prompts, seed=seed)
    except ValueError:  # the inputs are valid: the fit has not converged
        return None


def _agreement(rows: Rows, p: dict[str, list[float | None]], prompts: list[str]) -> dict[str, Any]:
    """Agreement without equal responses: ties that were not judged, on which all agree by definition."""
    different = [row["trained"] != row["start"] for row in rows]
    votes = {
        name: [vote if asked else None for vote, asked in zip(choices(of_judge), different, strict=True)]
        for name, of_judge in p.items()
    }
    return judge_agreement(votes, prompts)


def _harmless(rows: Rows, prompts: list[str]) -> dict[str, Any] | None:
    """A response is harmless if its expected rating is above the middle of the scale; at the middle, half."""
    if "harmless_start" not in rows[0]:
        return None
    scores = {side: [row[f"harmless_{side}"] for row in rows] for side in ("start", "trained")}
    found = {
        side: harmless_rate([None if s is None else (s + 1) / 2 for s in of_side], prompts)
        for side, of_side in scores.items()
    }
    return None if None in found.values() else found
