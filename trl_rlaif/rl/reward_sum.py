"""From several rewards to one score: weights, normalization, and responses with a missing reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from trl_rlaif.errors import UserError
from trl_rlaif.rl.reward_functions import MODEL

# Smaller relative differences between rewards are float32 rounding.
_LEAST = 1e-6

Moments = tuple[int, float, float]  # n, mean, sum of squared deviations
_NOTHING: Moments = (0, 0.0, 0.0)


class RewardSum:
    """The weighted sum of the rewards, each normalized first if requested.

    s(x, y) = sum_k w_k z_k(x, y) over the rewards that a response has; as in TRL's GRPOTrainer, the weight of a missing
    one is not redistributed. A reward of weight 0 is only logged: it is not part of the sum. z_k is

    - ``none``: r_k itself.
    - ``std``: r_k / s_k, with s_k the standard deviation of all r_k since the run began, this batch included. It keeps
      the reward's zero, and the scale changes slowly.
    - ``batch``: (r_k - m_k) / s_k, with the mean and standard deviation of the batch.

    Standard deviations divide by n - 1 and are over all processes. A constant reward is left as it is by ``std``, and
    set to 0 by ``batch``.

    Args:
        names: Of the rewards, in the order of the weights.
        weights: w_k; None: 1 each.
        normalization: Of each reward.
        gather: Concatenates the (B,) tensors of all processes, equally long in all.

    Raises:
        UserError: The number of weights differs from that of the rewards, or all are 0.
    """

    def __init__(
        self,
        names: Sequence[str],
        weights: Sequence[float] | None = None,
        normalization: Literal["none", "std", "batch"] = "none",
        gather: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
    ) -> None:
        if weights is not None and len(weights) != len(names):
            raise UserError(
                f"reward_weights has {len(weights)} entries for {len(names)} rewards: {', '.join(names)}.",
                fix="Give one weight for each of them, in this order.",
            )
        if weights is not None and not any(weights):
            raise UserError("Every reward has the weight 0.", fix="Give at least one of them another weight.")
        self.weights, self.normalization, self._gather = weights, normalization, gather
        self._moments: dict[str, Moments] = {}  # since the run began
        self._seen: dict[str, tuple[float, int, Moments]] = {}  # since the metrics were last taken: weight, responses

    def __call__(self, parts: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor], float]:
        """The score of each response.

        Args:
            parts: Raw rewards by name, (B,) float32 each, NaN where one is missing.

        Returns:
            Scores, (B,) float32, NaN where a response has no reward of nonzero weight; the weighted, normalized rewards
            of nonzero weight by name, whose sums they are; and how much one unit of the reward model's score adds to
            the sum.
        """
        first = next(iter(parts.values()))
        weighted, scores, scored = {}, torch.zeros_like(first), torch.zeros_like(first, dtype=torch.bool)
        model_scale = 1.0
        for (name, rewards), weight in zip(parts.items(), self.weights or [1.0] * len(parts), strict=True):
            shift, scale = self._figures(name, rewards, weight)
            if name == MODEL:
                model_scale = weight / scale
            if not weight:  # a transform that combines the parts would take its zeros for scores
                continue
            weighted[name], missing = _mapped(rewards, shift, scale, weight), rewards.isnan()
            scores = scores + weighted[name].masked_fill(missing, 0)
            scored |= ~missing
        return scores.masked_fill(~scored, math.nan), weighted, model_scale

    def _figures(self, name: str, rewards: torch.Tensor, weight: float) -> tuple[float, float]:
        """What is subtracted from a reward, and what it is divided by."""
        every = self._gather(rewards).cpu()  # once: each figure would wait for the GPU
        batch = _moments(every[~every.isnan()])
        _, count, seen = self._seen.get(name, (weight, 0, _NOTHING))
        self._seen[name] = weight, count + len(every), _joined(seen, batch)
        if self.normalization == "none":
            return 0.0, 1.0
        if self.normalization == "batch":
            return batch[1], _deviation(batch) or math.inf
        self._moments[name] = _joined(self._moments.get(name, _NOTHING), batch)
        return 0.0, _deviation(self._moments[name]) or 1.0

    def take_metrics(self) -> dict[str, float]:
        """Statistics of each raw reward over the responses scored since the last call, in all processes.

        ``score/<name>`` is its mean and ``rewards/<name>/std`` its standard deviation over the responses that have it,
        ``rewards/<name>/none`` the fraction of the others, and ``rewards/<name>/weight`` its weight.
        """
        numbers: dict[str, float] = {}
        for name, (weight, count, moments) in self._seen.items():
            if moments[0]:
                numbers |= {f"score/{name}": moments[1], f"rewards/{name}/std": _deviation(moments) or 0.0}
            numbers[f"rewards/{name}/none"] = 1 - moments[0] / count
            numbers[f"rewards/{name}/weight"] = weight
        self._seen = {}
        return numbers

    def state_dict(self) -> dict[str, Any]:
        """The running moments, the same in all processes."""
        return {"moments": dict(self._moments), "seen": dict(self._seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a ``state_dict``."""
        self._moments, self._seen = dict(state["moments"]), dict(state["seen"])


def _mapped(values: torch.Tensor, shift: float, scale: float, weight: float) -> torch.Tensor:
    if (shift, scale) == (0.0, 1.0):
        return values if weight == 1 else weight * values
    return (weight * (values.double() - shift) / scale).float()


def _moments(values: torch.Tensor) -> Moments:
    """n, mean and sum of squared deviations of (n,) values."""
    if not len(values):
        return _NOTHING
    values = values.double()
    return len(values), values.mean().item(), ((values - values.mean()) ** 2).sum().item()


def _joined(one: Moments, two: Moments) -> Moments:
    """The moments of the union of both sets (Chan et al. 1983, eq. 2.1)."""
    (n, mean, squares), (m, other, further) = one, two
    if not n + m:
        return one
    difference = other - mean
    return n + m, mean + difference * m / (n + m), squares + further + difference**2 * n * m / (n + m)


def _deviation(moments: Moments) -> float | None:
    """Standard deviation; None if all values are equal."""
    n, mean, squares = moments
    std = math.sqrt(squares / (n - 1)) if n > 1 else 0.0
    return std if std > _LEAST * abs(mean) else None
