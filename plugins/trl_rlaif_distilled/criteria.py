"""Pairs compared by several criteria: weighted log-odds, and vetoes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from trl_rlaif import Answer, CriteriaOptions, CriterionLabel, Label, weighted_logit, with_veto, yes
from trl_rlaif_distilled.debias import Debias, Order, Preference, combine, mean_preference, sigmoid, unread

Read = dict[Order, list[Preference]]


def label_by_criteria(
    id: str,
    options: CriteriaOptions,
    debias: Debias,
    compared: Mapping[Order, Sequence[Answer]],
    checked: Sequence[Sequence[Answer]],
    judge: str,
) -> Label:
    """The label of a pair.

    Args:
        id: ID of the pair.
        options: Contain the criteria.
        debias: How the two orders are combined, for each criterion and overall.
        compared: By order, the answers "1" or "2" to each criterion with a weight.
        checked: For each response, the answers "Yes" or "No" to each veto; empty without vetoes.
        judge: The judge's name.

    Returns:
        ``p`` from the weighted means of the criteria's log-odds in each order; if a veto holds for only one response,
        it decides. ``p_12`` and ``p_21`` likewise for each order.
    """
    answers = [answer for of in (*compared.values(), *checked) for answer in of]
    rationales: dict[str, Any] = {
        f"rationale_{order}": [text for answer in of for text in answer.rationales] or None
        for order, of in compared.items()
    }
    held = [yes(of) for of in checked] or [[], []]
    failed = next((answer.failed for answer in answers if answer.failed), None)
    failed = failed or next((reason for reason in held if isinstance(reason, str)), None)
    failed = failed or unread([answer for of in compared.values() for answer in of])
    if failed:
        return Label(id, judge=judge, skipped=failed, **rationales)
    read: Read = {order: [mean_preference(order, a.logprobs) for a in of] for order, of in compared.items()}
    weights = [of.weight for of in options.weighed.values()]
    logits = {order: weighted_logit([one.logit for one in of], weights) for order, of in read.items()}
    holds_1, holds_2 = (math.prod(map(float, of)) for of in held)
    numbers: dict[str, Any] = {f"p_{o}": with_veto(sigmoid(logit), holds_1, holds_2) for o, logit in logits.items()}
    numbers |= {f"mass_{o}": math.fsum(one.mass for one in of) / len(of) for o, of in read.items()}
    bounds = {f"bound_{o}": max(answer.bound for answer in of) for o, of in compared.items()}
    numbers |= {name: bound for name, bound in bounds.items() if bound}
    return Label(
        id,
        p=with_veto(combine([*logits.values()], debias), holds_1, holds_2),
        judge=judge,
        voted=any(answer.voted for answer in answers) or None,
        criteria=_by_criterion(options, debias, read, held),
        **numbers,
        **rationales,
    )


def _by_criterion(options: CriteriaOptions, debias: Debias, read: Read, held: Sequence[Any]) -> list[CriterionLabel]:
    found = []
    for i, (name, of) in enumerate(options.weighed.items()):
        p = combine([preferences[i].logit for preferences in read.values()], debias)
        orders: dict[str, Any] = {f"p_{order}": preferences[i].p for order, preferences in read.items()}
        found.append(CriterionLabel(name, of.weight, p=p, **orders))
    for name, first, second in zip(options.vetoes, *held, strict=True):
        found.append(CriterionLabel(name, 0.0, score_1=first, score_2=second, veto=True))
    return found
