"""check_reward_transform passes transforms that keep the contract, and reports each violation."""

from __future__ import annotations

import pytest
import torch
from trl_rlaif_advantage import AdvantageModel
from trl_rlaif_regulator import DistributionRegulator, Ensemble, Whiten

from trl_rlaif import RewardTransform, UserError
from trl_rlaif.testing import check_reward_transform, make_scored_batch


class Centred(RewardTransform):
    """Keeps the contract, with a state and a loss; each broken transform changes one thing."""

    def __init__(self, **options):
        super().__init__(**options)
        self.means = []

    def transform(self, scores, batch):
        self.means.append(scores.mean().item())
        return scores - sum(self.means) / len(self.means)

    def loss(self, scores):
        difference = scores.chosen - scores.rejected
        return -torch.nn.functional.logsigmoid(difference).mean()

    def metrics(self):
        return {"centred/mean": self.means[-1]} if self.means else {}

    def state_dict(self):
        return {"means": list(self.means)}

    def load_state_dict(self, state):
        self.means = list(state["means"])


class Noisy(Centred):
    """Random, but reproducible with a seed."""

    def transform(self, scores, batch):
        return super().transform(scores, batch) + torch.randn(len(scores))


class NeedsKL(Centred):
    """Without declaring it."""

    def transform(self, scores, batch):
        return scores - batch.kl


class SaysSo(NeedsKL):
    needs_kl = True


@pytest.mark.parametrize(
    "transform",
    [
        RewardTransform,
        Centred,
        Noisy,
        SaysSo,
        AdvantageModel(adapt="variance"),
        DistributionRegulator(warm_up=0),
        Ensemble,
        Whiten,
    ],
)
def test_good_transforms_pass(transform):
    check_reward_transform(transform)


def test_with_batches_of_ones_own():
    seen = []

    class Looks(RewardTransform):
        def transform(self, scores, batch):
            seen.append(len(scores))
            return scores

    check_reward_transform(Looks(), batches=[make_scored_batch(17, seed=s) for s in range(2)])
    assert 17 in seen


class Mean(Centred):
    def transform(self, scores, batch):
        return scores.mean()


class AsList(Centred):
    def transform(self, scores, batch):
        return scores.tolist()


class Double(Centred):
    def transform(self, scores, batch):
        return scores.double()


class InPlace(Centred):
    def transform(self, scores, batch):
        return scores.sub_(1)


class Tidies(Centred):
    def transform(self, scores, batch):
        batch.columns.pop("category", None)
        return scores


class Unguarded(Centred):
    def transform(self, scores, batch):
        return (scores - scores.mean()) / scores.std()


class NeedsCategories(Centred):
    def transform(self, scores, batch):
        return scores + torch.tensor([{"a": 0.0, "b": 1.0}[c] for c in batch.categories])


class NeedsExpected(Centred):
    """Without declaring it."""

    def transform(self, scores, batch):
        return scores - batch.expected


class PoolInHalves(Centred):
    def transform_pool(self, scores, batch):
        return scores[: len(scores) // 2]


class Shared(Centred):
    """All instances share one state."""

    means: list = []  # noqa: RUF012

    def __init__(self, **options):
        RewardTransform.__init__(self, **options)


class OwnDice(Centred):
    generator = torch.Generator()

    def transform(self, scores, batch):
        return scores + torch.randn(len(scores), generator=self.generator)


class LogsTensors(Centred):
    def metrics(self):
        return {"mean": torch.tensor(1.0)}


class LossByRow(Centred):
    def loss(self, scores):
        return scores.chosen - scores.rejected


class Detached(Centred):
    def loss(self, scores):
        return (scores.chosen - scores.rejected).detach().mean()


class OneSided(Centred):
    def loss(self, scores):
        return scores.chosen.mean()


class LogOfNothing(Centred):
    def loss(self, scores):
        return (scores.p * scores.p.log() + scores.chosen - scores.rejected).mean()


class NeedsTwo(Centred):
    def loss(self, scores):
        return (scores.chosen - scores.rejected).mean() / scores.chosen.std()


class Rounds(Centred):
    def loss(self, scores):
        scores.p.round_()
        return super().loss(scores)


class Forgets(Centred):
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Alive(Centred):
    def state_dict(self):
        return {"means": self.means}


class Borrows(Centred):
    def load_state_dict(self, state):
        self.means = state["means"]


class Adds(Centred):
    def load_state_dict(self, state):
        self.means += state["means"]


class Figures:
    def __init__(self, means):
        self.means = list(means)

    def __eq__(self, other):
        return self.means == other.means


class OwnObjects(Centred):
    def state_dict(self):
        return {"figures": Figures(self.means)}


BROKEN = [
    (Mean, "returns the shape () for (6,)", "one score a response"),
    (AsList, "returns a list", "Return a tensor"),
    (Double, "returns torch.float64", ".float()"),
    (InPlace, "changes its inputs", "Compute new tensors"),
    (Tidies, "changes its inputs", "Compute new tensors"),
    (Unguarded, "transform() on a batch of one returns scores that are not finite", "Guard divisions"),
    (NeedsCategories, "transform() on a batch without categories raises KeyError", "UserError"),
    (NeedsExpected, "transform() on an ordinary batch raises TypeError", "Make it cope"),
    (NeedsKL, "reads the batch's kl, which RLOO and GRPO do not compute", "Set needs_kl = True"),
    (PoolInHalves, "transform_pool() on a pool returns the shape (3,) for (6,)", "one score a response"),
    (Shared, "two instances give other scores", "share nothing"),
    (OwnDice, "two instances give other scores", "seeded by an option"),
    (LogsTensors, "metrics() after an ordinary batch holds 'mean'", "plain numbers"),
    (LossByRow, "loss() on comparisons gives shape (6,)", "scalar"),
    (Detached, "gives the scores no finite gradient", "without detach()"),
    (OneSided, "gives the scores no finite gradient", "scores.rejected"),
    (LogOfNothing, "loss() on comparisons whose labels are sure gives tensor(nan", "finite scalar"),
    (NeedsTwo, "loss() on a single comparison gives tensor(nan", "finite scalar"),
    (Rounds, "loss() on comparisons changes its inputs", "Compute new tensors"),
    (Forgets, "a fresh instance with its state gives other results", "everything that it remembers"),
    (Alive, "changes as training goes on", "Return copies"),
    (Borrows, "continues from the state that was loaded", "Copy the values"),
    (Adds, "loading a state does not take it back", "Replace"),
    (OwnObjects, "cannot be saved and loaded", "no objects of your own"),
]


@pytest.mark.parametrize(("transform", "what", "fix"), BROKEN, ids=[broken[0].__name__ for broken in BROKEN])
def test_what_is_broken_is_named(transform, what, fix):
    with pytest.raises(AssertionError) as caught:
        check_reward_transform(transform)
    message = str(caught.value)
    assert message.startswith(f"{transform.__name__}: ") and what in message and fix in message


def test_a_ragged_batch_may_be_refused_in_words():
    class Strict(Centred):
        def transform(self, scores, batch):
            if None in batch.categories:
                raise UserError("It needs a category.", fix="Set data.category.")
            return scores

    check_reward_transform(Strict)


def test_the_callers_generators_stay_where_they_were():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    check_reward_transform(Noisy)
    assert torch.rand(2).tolist() == expected.tolist()
