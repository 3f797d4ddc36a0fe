"""Calibrates a judge's probabilities on a few pairs with human labels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logsumexp

from trl_rlaif.errors import UserError
from trl_rlaif.evaluation import agreement, calibration_error, standard_error
from trl_rlaif.evaluation.intervals import cluster_index

# Fewer do not determine a temperature.
MIN_PAIRS = 20
# Cross-validation, repeated with other folds: with 20 pairs, the result depends too much on the split.
FOLDS, REPEATS = 5, 5
# Standard deviations of the priors, both centered at no change. For log(scale): two thirds of judges need a temperature
# of 1/2 to 2, and 95% of 1/4 to 4. For the bias, in nats: being first is rarely worth more than odds of e^2 to 1.
# With 20 pairs they weigh about as much as the data; with hundreds, hardly at all.
SCALE_PRIOR, BIAS_PRIOR = math.log(2), 1.0
_EDGE = 1e-9


@dataclass(frozen=True)
class Calibration:
    """A temperature and a position bias for labels whose two orders are already combined.

    A label's log-odds l of response_1 become scale * l. If only one order was asked, the judge reports l + bias for the
    response shown first, so they become scale * l -+ bias. With ``mean_prob`` both orders are corrected in this way and
    their probabilities averaged as before. In the mean of both orders' log-odds, the bias cancels.

    Args:
        scale: 1 / temperature (Guo et al. 2017), above 0, so that no label is reversed.
        bias: The advantage of being shown first, in nats.
        mean_prob: Both orders are combined by the mean of their probabilities.
    """

    scale: float = 1.0
    bias: float = 0.0
    mean_prob: bool = False

    @classmethod
    def fit(cls, rows: Sequence[dict[str, Any]], human: Sequence[int], *, mean_prob: bool = False) -> Calibration:
        """Penalized maximum likelihood on the human choices, each pair one observation.

        The priors are Gaussian with mean 0: for log(scale) with standard deviation ``SCALE_PRIOR``, for the bias with
        ``BIAS_PRIOR``.

        Args:
            rows: Labels with p, p_12 and p_21 (both orders' may be None).
            human: 1 or 2 for each.
            mean_prob: As in the class.
        """
        logits, first = _observations(rows, mean_prob)
        # Signed as the log-odds of the chosen response, whose probability should be high.
        logits, first = (np.where(np.array(human) == 1, 1, -1)[:, None] * column for column in (logits, first))
        priors = np.array([SCALE_PRIOR, BIAS_PRIOR])

        def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
            scaled = math.exp(parameters[0]) * logits
            each = scaled - parameters[1] * first
            log_p = logsumexp(log_expit(each), axis=1) - math.log(2)
            # Of the log of the mean of both orders' probabilities, with respect to each order's log-odds.
            slopes = np.exp(log_expit(each) + log_expit(-each) - log_p[:, None]) / 2
            gradient = -np.array([(slopes * scaled).sum(), -(slopes * first).sum()])
            return ((parameters / priors) ** 2).sum() / 2 - log_p.sum(), gradient + parameters / priors**2

        # The prior is on log(scale), in which the likelihood is not concave: two optima are possible.
        starts = ([start, 0.0] for start in (-1.0, 0.0, 1.0))
        best = min((minimize(loss, start, jac=True, options={"gtol": 1e-8}) for start in starts), key=lambda f: f.fun)
        return cls(math.exp(best.x[0]), float(best.x[1]), mean_prob)

    def has_bias(self, rows: Sequence[dict[str, Any]]) -> bool:
        """Whether these labels determine the bias: only labels of a single order do.

        In the mean of both orders' log-odds it cancels, and with the mean of their probabilities there are two mirrored
        optima.
        """
        first = _observations(rows, self.mean_prob)[1]
        return bool((first.sum(axis=1) != 0).any())

    def apply(self, row: dict[str, Any]) -> float:
        """The calibrated probability that response_1 is preferred."""
        return float(_joined(*_observations([row], self.mean_prob), self.scale, self.bias)[0])


def check_choices(human: Sequence[int]) -> None:
    """Refuse too few choices.

    Raises:
        UserError: There are fewer than 20 pairs, or one of the two choices occurs less than twice.
    """
    reason = why_too_few(human)
    if reason is not None:
        raise UserError(
            f"{reason}.", fix=f"Give at least {MIN_PAIRS} pairs in label.calibration, two or more for each response."
        )


def why_too_few(human: Sequence[int]) -> str | None:
    """Why these choices, 1 or 2 each, are too few; None if they suffice."""
    counts = Counter(human)
    if len(human) >= MIN_PAIRS and min(counts[1], counts[2]) >= 2:
        return None
    return (
        f"{len(human)} pairs with a person's choice ({counts[1]} for response 1, {counts[2]} for response 2) "
        "are too few to calibrate with"
    )


def cross_validate(
    rows: Sequence[dict[str, Any]],
    human: Sequence[int],
    prompts: Sequence[Hashable] | None = None,
    *,
    mean_prob: bool = False,
    seed: int,
) -> dict[str, Any] | None:
    """Quality of the labels before and after calibration, with each pair calibrated by fits that exclude its prompt.

    Args:
        rows, human, mean_prob: As in ``Calibration.fit``.
        prompts: The prompt of each pair; None: all different.
        seed: Of the folds.

    Returns:
        ``before`` and ``after``: ``log_loss``, in nats per pair, ``ece`` and ``agreement``. ``after`` has means over
        ``REPEATS`` splits into ``FOLDS`` folds; the agreement is that of the first split, since a positive scale
        changes it only through a bias. ``gain``, the decrease of the log-loss, and its ``standard_error`` over the
        prompts. None if there is only one prompt.
    """
    index = np.arange(len(rows)) if prompts is None else cluster_index(prompts, len(rows))
    count = int(index.max()) + 1
    if count < 2:
        return None
    generator, after = np.random.default_rng(seed), []
    for _ in range(REPEATS):
        folds, p = generator.permutation(count)[index] % FOLDS, np.empty(len(rows))
        for fold in np.unique(folds):
            seen, held = (np.flatnonzero(inside).tolist() for inside in (folds != fold, folds == fold))
            fitted = Calibration.fit([rows[i] for i in seen], [human[i] for i in seen], mean_prob=mean_prob)
            p[held] = [fitted.apply(rows[i]) for i in held]
        after.append(p)
    before = [np.array([row["p"] for row in rows])]
    fallen = np.mean(log_losses(before, human), axis=0) - np.mean(log_losses(after, human), axis=0)
    return {
        name: {
            "log_loss": float(np.mean(log_losses(found, human))),
            "ece": float(np.mean([calibration_error(p.tolist(), human) for p in found])),
            "agreement": agreement(found[0].tolist(), human, prompts),
        }
        for name, found in (("before", before), ("after", after))
    } | {
        "gain": float(fallen.mean()),
        "standard_error": standard_error(fallen, index.tolist()),
    }


def log_losses(p: Any, human: Sequence[int]) -> np.ndarray:
    """-log of each label's probability of the human choice, in nats; labels are clipped to 1e-9 from 0 and 1.

    Args:
        p: Probabilities that response_1 is preferred, shape (..., N).
        human: 1 or 2 for each of N.
    """
    p = np.clip(p, _EDGE, 1 - _EDGE)
    return -np.log(np.where(np.array(human) == 1, p, 1 - p))


def _observations(rows: Sequence[dict[str, Any]], mean_prob: bool) -> tuple[np.ndarray, np.ndarray]:
    """(N, 2) log-odds of response_1, and (N, 2): 1 where it is shown first, -1 where second, 0 where not known.

    For a label that is not the mean of two probabilities, both columns hold the combined answer.
    """
    found = []
    for row in rows:
        orders = [(row.get("p_12"), 1), (row.get("p_21"), -1)]
        known = [order for order in orders if order[0] is not None]
        if len(known) == 1 or (len(known) == 2 and mean_prob):
            found.append([known[0], known[-1]])
        else:
            found.append([(row["p"], 0)] * 2)
    p, first = np.moveaxis(np.array(found, dtype=np.float64), 2, 0)
    p = np.clip(p, _EDGE, 1 - _EDGE)
    return np.log(p) - np.log1p(-p), first


def _joined(logits: np.ndarray, first: np.ndarray, scale: float, bias: float) -> np.ndarray:
    return expit(scale * logits - bias * first).mean(axis=1)
