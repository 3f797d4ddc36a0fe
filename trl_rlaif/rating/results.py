"""Results of human votes: the win rate by set, and the agreement with the judge."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from trl_rlaif.data.overlap import prompt_key
from trl_rlaif.errors import UserError
from trl_rlaif.evaluation import agreement, choices, win_rate
from trl_rlaif.pipeline import artifacts
from trl_rlaif.rating.pairs import Comparison, Name, blind_order, of_set, read_comparisons
from trl_rlaif.rating.votes import Standing, VoteFile
from trl_rlaif.report.formatting import count, label, percent


def people_results(run: str | Path, *, rater: str | None = None, only: str | None = None) -> dict[str, Any]:
    """Win rates from the human votes in a run's folder.

    Args:
        run: The run's folder.
        rater: Count only this rater's votes; None: all raters'.
        only: The only set to evaluate; None: all.

    Returns:
        ``sets``: by set ``pairs``, ``rated``, ``equal``, ``votes``, ``raters``; if pairs are rated, also the results
        of ``win_rate`` and ``judge``, the judge's ``agreement`` with people or None (see ``of_votes``).
        ``outdated``: votes on responses that the run no longer has; they do not count.

    Raises:
        UserError: This is not a run with samples, there is no such set, or this rater has no votes.
        RunError: A file of the run was edited by hand and cannot be read.
    """
    comparisons, standing = read_comparisons(run), VoteFile(Path(run) / artifacts.VOTES).standing()
    if rater is not None:
        if rater not in standing:
            raters = ", ".join(label(name) for name in standing)
            raise UserError(
                f"There is no vote by '{label(rater)}'.",
                where="--rater",
                fix=f"There are votes by: {raters}." if raters else "There are no votes yet.",
            )
        standing = {rater: standing[rater]}
    known = {comparison.name for comparison in comparisons}
    by_set = defaultdict(list)
    for comparison in of_set(comparisons, only):
        by_set[comparison.set].append(comparison)
    return {
        "sets": {name: of_votes(of_this, standing) for name, of_this in by_set.items()},
        "outdated": sum(name not in known for votes in standing.values() for name in votes),
    }


def of_votes(comparisons: Sequence[Comparison], standing: Standing, seed: int = 0) -> dict[str, Any]:
    """The results of one set.

    A pair rated by several people is one comparison, decided by the mean of their choices: the interval is over
    pairs, and more raters alone do not narrow it. Equal responses are ties that are not shown; they count up to each
    rater's progress, so in the same proportion as in the set.

    Args:
        comparisons: The set's pairs, at least one.
        standing: The votes, possibly also of other sets.
        seed: Seed of the blinded order.

    Returns:
        See ``people_results``. ``rated`` includes ``equal``, the ties that were not shown.
    """
    names = {c.name for c in comparisons if not c.is_equal}
    chosen: dict[Name, list[float]] = defaultdict(list)
    given = {rater: {n: p for n, p in votes.items() if n in names} for rater, votes in standing.items()}
    for votes in given.values():
        for name, choice in votes.items():
            chosen[name].append(choice)
    passed = {c.name for rater in given or [""] for c in _passed_ties(comparisons, rater, given.get(rater, {}), seed)}
    numbers: dict[str, Any] = {
        "pairs": len(comparisons),
        "rated": len(chosen) + len(passed),
        "equal": len(passed),
        "votes": sum(map(len, given.values())),
        "raters": sum(bool(votes) for votes in given.values()),
    }
    if not numbers["rated"]:
        return numbers
    p = {name: fmean(found) for name, found in chosen.items()} | dict.fromkeys(passed, 0.5)
    in_order = [c for c in comparisons if c.name in p]
    numbers |= win_rate([p[c.name] for c in in_order], [prompt_key(c.messages) for c in in_order])
    judged = [c for c in in_order if c.p_trained is not None and not c.is_equal]
    people, prompts = choices([p[c.name] for c in judged]), [prompt_key(c.messages) for c in judged]
    return numbers | {"judge": agreement([c.p_trained for c in judged], people, prompts)}


def _passed_ties(comparisons: Sequence[Comparison], rater: str, voted: Collection[Name], seed: int) -> list[Comparison]:
    """The pairs with equal responses before the last vote in the rater's order; all, if no pair is open.

    Counting all of them with few votes would pull the win rate to one half, and make its interval too narrow.
    """
    order = blind_order(comparisons, rater, seed)
    reached = max((i for i, c in enumerate(order, 1) if c.name in voted), default=0)
    if all(c.is_equal or c.name in voted for c in order):
        reached = len(order)
    return [c for c in order[:reached] if c.is_equal]


# ---- In words ---------------------------------------------------------------------------------------------


def describe(results: dict[str, Any]) -> str:
    """``people_results`` as readable text."""
    lines = [line for name, numbers in results["sets"].items() for line in _of_set(label(name), numbers)]
    if results["outdated"]:
        votes = "1 vote does" if results["outdated"] == 1 else f"{results['outdated']:,} votes do"
        lines.append(f"{votes} not count: the responses have changed since.")
    return "\n".join(lines)


def _of_set(name: str, numbers: dict[str, Any]) -> list[str]:
    if not numbers["rated"]:
        return [f"{name}: no votes yet on its {count(numbers['pairs'], 'pair')}."]
    unasked = f" ({numbers['equal']:,} with equal responses, unasked)" if numbers["equal"] else ""
    preferred = _share(numbers["win_rate"], numbers["interval"])
    lines = [
        f"{name}: people prefer the trained policy in {preferred}; ties count half.",
        f"  {count(numbers['wins'], 'win')}, {count(numbers['ties'], 'tie')}{unasked}, "
        f"{count(numbers['losses'], 'loss', 'losses')}. {numbers['rated']:,} of {count(numbers['pairs'], 'pair')} "
        f"rated, by {count(numbers['raters'], 'person', 'people')}.",
    ]
    judge = numbers["judge"]
    if judge:
        lines.append(
            f"  The judge chooses as people do in {_share(judge['rate'], judge['interval'])}, "
            f"among the {judge['n']:,} that are no tie for people."
        )
    return lines


def _share(share: float, interval: Sequence[float]) -> str:
    return f"{percent(share)} of pairs (95% interval {percent(interval[0])} to {percent(interval[1])})"
