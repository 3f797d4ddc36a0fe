"""The pools that selectors see, how their choices are combined, and stratified batches."""

from __future__ import annotations

import json
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from helpers.ppo import small_trainer
from helpers.rewards import length_penalty
from trl_rlaif_regulator import DistributionRegulator, Whiten

from trl_rlaif import DataSelector, Pool, RewardTransform, Selection, UserError
from trl_rlaif.models.shared_model import active_adapter, backbone
from trl_rlaif.rl.selection import StratifiedSampler, select


def make_pool(scores, *, rows=None, embeddings=None):
    """A pool with numbered prompts and responses."""
    count = len(scores)
    rows = list(range(count)) if rows is None else rows
    return Pool(
        prompts=[f"p{row}" for row in rows],
        responses=[f"r{i}" for i in range(count)],
        scores=torch.tensor(scores, dtype=torch.float32),
        categories=[None] * count,
        rows=torch.tensor(rows),
        prompt_ids=[[row + 3] for row in rows],
        response_ids=[[i + 3, 2] for i in range(count)],
        embed=lambda: np.eye(count) if embeddings is None else embeddings,
    )


class Rows(DataSelector):
    def __init__(self, *rows, strata=None):
        super().__init__()
        self.rows, self.strata = rows, strata

    def select(self, pool):
        return Selection(self.rows, self.strata)


class BestOfEach(DataSelector):
    num_responses = 3

    def select(self, pool):
        best = {}
        for i, row in enumerate(pool.rows.tolist()):
            if row not in best or pool.scores[i] > pool.scores[best[row]]:
                best[row] = i
        return Selection(rehearsal=[pool.pair(i, why="best") for i in best.values()])


def test_selectors_choose_one_after_the_other_from_what_is_left():
    pool = make_pool([0.0, 5.0, 1.0, 2.0, 3.0, 4.0], rows=[10, 10, 11, 11, 12, 12])
    found = select([Rows(0, 4), BestOfEach(), Rows(2)], pool)
    assert found.rows == [12]
    assert [(pair.prompt, pair.response, pair.score) for pair in found.rehearsal] == [
        ("p10", "r1", 5.0),
        ("p12", "r5", 4.0),
    ]
    assert select([BestOfEach()], pool).rows is None  # everything


def test_strata_follow_their_prompts():
    found = select([Rows(3, 0, 2, strata=["x", "y", "x"]), Rows(1, 1, 0)], make_pool([0.0] * 4))
    assert (found.rows, found.strata) == ([2, 2, 0], [0, 0, 1])


@pytest.mark.parametrize("rows", [(), (4,), (-1,)])
def test_an_index_that_is_not_there_is_refused(rows):
    with pytest.raises(UserError, match="The data selector Rows chose"):
        select([Rows(*rows)], make_pool([0.0] * 4))


@pytest.mark.parametrize("sizes", [(40, 20, 4), (7, 7)])
def test_every_stretch_of_a_stratified_pass_holds_the_labels_in_like_shares(sizes):
    strata = [label for label, size in enumerate(sizes) for _ in range(size)]
    sampler, total = StratifiedSampler(strata), sum(sizes)
    first, second = list(sampler), list(sampler)
    assert sorted(first) == sorted(second) == list(range(total)) and first != second
    for start in range(0, total - total // 4 + 1):
        counts = Counter(strata[i] for i in first[start : start + total // 4])
        for label, size in enumerate(sizes):
            assert abs(counts[label] - size / total * (total // 4)) <= 2


class Halving(RewardTransform):
    """A transform with a state that changes with every batch."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def transform(self, scores, batch):
        self.seen += len(scores)
        return scores / 2

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class Watching(DataSelector):
    num_responses = 2

    def select(self, pool):
        self.pool = pool
        self.embeddings = pool.embeddings
        pairs = [pool.pair(i, why="odd", cluster=i % 2) for i in range(len(pool)) if i % 2]
        return Selection(rehearsal=pairs, clusters=[i % 2 for i in range(len(pool))])


def test_a_pool_holds_what_was_sampled_and_scored(tmp_path):
    transform, selector = Halving(), Watching()
    trainer = small_trainer(
        tmp_path, trainer_kwargs={"reward_transforms": [transform], "data_selectors": [selector]}, total_episodes=4
    )
    trainer.train()
    pool, tokenizer = selector.pool, trainer.processing_class
    assert pool.rows.tolist() == [i // 2 for i in range(20)] and transform.seen == 4  # only in the update
    assert pool.prompts == [trainer.selection.pool.prompts[i // 2]["prompt"] for i in range(20)]
    assert tokenizer.batch_decode(pool.response_ids, skip_special_tokens=True) == pool.responses
    assert pool.prompt_ids == [trainer.selection.pool.prompts[i // 2]["input_ids"] for i in range(20)]
    assert len(set(pool.responses)) > 10 and set(pool.columns) == {"answer", "category"}
    halves = [score / 2 for score in length_penalty(pool.prompts, pool.responses, pool.response_ids)]
    assert pool.scores.tolist() == pytest.approx(halves, rel=1e-6)
    model = trainer.shared.model
    with torch.no_grad(), active_adapter(model, None):
        hidden = backbone(model)(torch.tensor([pool.prompt_ids[5]])).last_hidden_state[0]
    np.testing.assert_allclose(selector.embeddings[5], hidden.mean(0).numpy(), atol=1e-5)
    np.testing.assert_array_equal(selector.embeddings[4], selector.embeddings[5])
    lines = [json.loads(line) for line in (tmp_path / "rehearsal.jsonl").read_text().splitlines()]
    assert [line["response"] for line in lines] == pool.responses[1::2]
    assert set(lines[0]) == {"prompt", "response", "score", "cluster", "why"}
    points = [json.loads(line) for line in (tmp_path / "selection_map.jsonl").read_text().splitlines()]
    assert len(points) == 10 and all(point["chosen"] for point in points)


def _by_kind(prompts, completions, completion_ids, category, **columns):
    """Categories with different means and spreads; every response has its own score."""
    own = [zlib.crc32(str(ids).encode()) % 997 / 100 for ids in completion_ids]
    return [9 + 4 * x if kind == "a" else 0.3 * x - 2 for x, kind in zip(own, category, strict=True)]


@pytest.mark.parametrize("pads", [True, False])
@pytest.mark.parametrize(
    ("transform", "options"),
    [
        (DistributionRegulator(prior=0, bound=1e6), {}),
        (Whiten(), {}),
        (None, {"whiten_scores": True}),
        (None, {"reward_normalization": "batch"}),
    ],
)
def test_a_pool_is_transformed_at_once_and_by_its_own_figures(tmp_path, transform, options, pads):
    """Five batches form the pool; running statistics neither affect it nor are affected by it."""
    kwargs = {"reward_funcs": [_by_kind], "reward_transforms": [] if transform is None else [transform]}
    options = {"per_device_train_batch_size": 4, "total_episodes": 4, **options}
    selector = Watching()
    trainer = small_trainer(tmp_path, trainer_kwargs=kwargs | {"data_selectors": [selector]}, **options)
    trainer.generator.pads = pads
    if isinstance(transform, DistributionRegulator):
        transform.running.add([("a", 70.0), ("a", 71.0), ("b", 70.0), ("b", -70.0)] * 99)
        transform.batches = 3
        before = str(transform.state_dict())
    chosen = trainer.selection.choose(trainer.state.global_step)
    pool, found = selector.pool, selector.pool.scores.numpy()
    raw = np.array(_by_kind(pool.prompts, pool.responses, pool.response_ids, pool.categories))
    kinds = np.array(pool.categories)
    if not isinstance(transform, DistributionRegulator):
        free = len(raw) - 1 if "reward_normalization" in options else len(raw)
        np.testing.assert_allclose(found, (raw - raw.mean()) / raw.std() * (free / len(raw)) ** 0.5, atol=1e-4)
        return
    assert str(transform.state_dict()) == before and len(chosen.rehearsal) == 10
    spreads = {found[kinds == kind].std() for kind in "ab"}
    assert max(spreads) == pytest.approx(min(spreads), rel=1e-4)
    for kind in "ab":
        mine = raw[kinds == kind]
        expected = (mine - mine.mean()) / mine.std(ddof=1)  # in units of the scores' own spread, at most 1
        np.testing.assert_allclose(found[kinds == kind], expected, atol=1e-4)


def test_a_pools_entropies_are_minus_the_mean_log_probability_of_the_response(tmp_path):
    trainer = small_trainer(tmp_path, selection_prompts=3)
    pool = trainer.selection.pool.draw(2)
    assert len(set(pool.rows.tolist())) == 3 and len(pool) == 6
    model = trainer.shared.model
    for i in range(6):
        ids = torch.tensor([pool.prompt_ids[i] + pool.response_ids[i]])
        with torch.no_grad(), trainer.shared.role("policy"):
            logs = (model(ids).logits[0] / trainer.args.temperature).log_softmax(-1)[len(pool.prompt_ids[i]) - 1 : -1]
        mean = logs.gather(1, torch.tensor(pool.response_ids[i])[:, None]).mean().item()
        assert pool.entropies[i].item() == pytest.approx(-mean, abs=1e-4)
