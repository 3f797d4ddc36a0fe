"""``preferences/``: what a reward model or DPO learns from, out of a judge's labels or of people's choices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trl_rlaif.errors import UserError
from trl_rlaif.files import write_folder
from trl_rlaif.pipeline import artifacts

if TYPE_CHECKING:
    from trl_rlaif.data import Pair
    from trl_rlaif.pipeline.context import Context

# A person's choice as the probability that response_1 is preferred.
HUMAN_P = {1: 1.0, 2: 0.0}
# Why a pair is left out where chosen is taken as surely better.
TIE = "tie"


def preferences_of_people(context: Context, section: str) -> dict[str, int]:
    """Write ``preferences/`` from the data's human choices, where a recipe has no stage ``label``.

    They are sure: what is learned from them takes every chosen response as the better one. So ties are left out.

    Args:
        section: What learns from them, for the message.

    Returns:
        How many pairs were left out, by reason.

    Raises:
        UserError: No pair has a human choice for one of its responses.
    """
    pairs = context.pairs()
    p = {pair.id: HUMAN_P[pair.human] for pair in pairs if pair.human in HUMAN_P}
    if not p:
        raise UserError(
            "There is no stage label, and no pair says which response a person preferred.",
            where=context.recipe.line((section,)),
            fix="Add a label section, or pairs with human choices.",
        )
    write_preferences(context, pairs, p)
    ties = sum(pair.human == 0 for pair in pairs)
    unknown = len(pairs) - len(p) - ties
    return {reason: count for reason, count in ((TIE, ties), ("no human choice", unknown)) if count}


def write_preferences(
    context: Context, pairs: list[Pair], p: dict[str, float], disagreement: dict[str, float | None] | None = None
) -> None:
    """Write ``preferences/``: TRL's preference format, with ``p``, the probability of ``chosen``.

    Where pairs have a margin, there is TRL's column ``margin``, too.

    Args:
        p: Probability that response_1 is preferred, by pair id; pairs that are not in it are left out.
        disagreement: A jury's, by pair id: a column of that name.
    """
    from datasets import Dataset, Features, Value

    kept = [pair for pair in pairs if pair.id in p]
    dataset = Dataset.from_list([_preference(context, pair, p[pair.id]) for pair in kept])
    if any("margin" in pair.extra for pair in kept if pair.human in HUMAN_P):
        dataset = dataset.add_column("margin", [_margin(pair, p[pair.id]) for pair in kept])
    if disagreement is not None:
        dataset = dataset.add_column("disagreement", [disagreement[pair.id] for pair in kept])
        dataset = dataset.cast_column("disagreement", Value("float64"))
    # A column of None has no type of its own.
    features = Features({**dataset.features, "category": Value("string"), "human": Value("bool")})
    dataset = dataset.cast(features)
    write_folder(context.folder / artifacts.PREFERENCES, lambda folder: dataset.save_to_disk(str(folder)))


def _preference(context: Context, pair: Pair, p: float) -> dict[str, Any]:
    first = p >= 0.5
    chosen, rejected = (pair.response_1, pair.response_2) if first else (pair.response_2, pair.response_1)
    prompt = context.chat(pair.prompt)
    if not isinstance(prompt, str):
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    return {
        "id": pair.id,
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "p": p if first else 1 - p,
        "category": pair.category,
        # Whether a person preferred the chosen one, too; None for a tie or where nobody was asked.
        "human": (pair.human == 1) == first if pair.human in (1, 2) else None,
    }


def _margin(pair: Pair, p: float) -> float:
    """How much better people found their choice, where it is the chosen one; else nothing is known of a margin."""
    agrees = pair.human in HUMAN_P and (pair.human == 1) == (p >= 0.5)
    return float(pair.extra.get("margin") or 0.0) if agrees else 0.0
