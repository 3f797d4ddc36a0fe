"""Selective rehearsal and the choice of prompts, on pools with known clusters."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from trl_rlaif_rehearsal.criteria import worth
from trl_rlaif_rehearsal.grouping import ClusterOptions, kinds_of
from trl_rlaif_rehearsal.prompts import PromptSelection
from trl_rlaif_rehearsal.selective import SelectiveRehearsal

from trl_rlaif import Pool, UserError

KINDS, EACH, WIDTH = 4, 15, 24


def _pool(scores=None, *, repeats=1, seed=0, **more):
    """Prompts of four kinds around four distant centers, each ``repeats`` times; row i // repeats has kind row % 4."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(KINDS, WIDTH)) * 5
    prompts = KINDS * EACH
    embeddings = np.repeat(centres[np.arange(prompts) % KINDS] + rng.normal(size=(prompts, WIDTH)), repeats, axis=0)
    count = prompts * repeats
    rows = np.arange(count) // repeats
    return Pool(
        prompts=[f"prompt {row}" for row in rows],
        responses=[f"response {i}" for i in range(count)],
        scores=torch.tensor(rng.normal(size=count) if scores is None else scores, dtype=torch.float32),
        categories=[f"kind {row % KINDS}" for row in rows],
        rows=torch.tensor(rows),
        prompt_ids=[[3, int(row)] for row in rows],
        response_ids=[[4] * (1 + i % 7) for i in range(count)],
        entropies=torch.tensor(rng.random(count), dtype=torch.float32),
        embed=lambda: embeddings.astype(np.float32),
        **more,
    )


@pytest.mark.parametrize("method", ["auto", "kmeans", "minibatch_kmeans", "gaussian_mixture"])
def test_the_clusters_are_the_kinds(method):
    pool = _pool(repeats=2)
    labels = kinds_of(pool, ClusterOptions(method=method)).labels
    assert adjusted_rand_score(pool.rows.numpy() % KINDS, labels) == 1


def test_of_every_cluster_the_best_pairs_are_taken():
    pool = _pool(repeats=3)
    found = SelectiveRehearsal(per_cluster=5, num_responses=3, clusters=KINDS, duplicates=1.0).select(pool)
    assert found.prompts is None and len(found.rehearsal) == KINDS * 5
    kinds = pool.rows.numpy() % KINDS
    by_kind = {kind: [] for kind in range(KINDS)}
    for pair in found.rehearsal:
        i = pool.responses.index(pair.response)
        assert pair.prompt == pool.prompts[i] and pair.score == pytest.approx(pool.scores[i].item())
        assert pair.cluster == found.clusters[i] and "of 45 in cluster" in pair.why
        by_kind[kinds[i]].append(i)
    for kind, chosen in by_kind.items():
        best = {}  # a prompt is taken once, with its best response
        for i in np.flatnonzero(kinds == kind):
            row = int(pool.rows[i])
            best[row] = max(best.get(row, i), i, key=lambda j: pool.scores[j].item())
        expected = sorted(best.values(), key=lambda j: -pool.scores[j].item())[:5]
        assert chosen == expected


def test_near_duplicates_and_empty_responses_are_left_out():
    pool = _pool()
    scores = pool.scores.numpy()
    first = int(np.argmax(scores))
    twin = next(i for i in range(KINDS * EACH) if i % KINDS == first % KINDS and i != first)
    embeddings = pool.embeddings.copy()
    embeddings[twin] = embeddings[first] + 1e-3
    scores[twin] = scores[first] - 1e-4  # would come second
    third = int(np.argsort(-np.where(np.arange(60) % KINDS == first % KINDS, scores, -9))[2])
    pool.response_ids[third] = []
    pool = replace(pool, embed=lambda: embeddings)
    chosen = {pair.prompt for pair in SelectiveRehearsal(per_cluster=4, clusters=KINDS).select(pool).rehearsal}
    assert pool.prompts[first] in chosen and not chosen & {pool.prompts[twin], pool.prompts[third]}
    kept = SelectiveRehearsal(per_cluster=4, clusters=KINDS, duplicates=1.0).select(pool).rehearsal
    assert pool.prompts[twin] in {pair.prompt for pair in kept}


def test_criteria():
    pool = _pool(columns={"human": [i % 5 for i in range(60)]})
    np.testing.assert_array_equal(worth(pool, "advantage"), pool.scores.double().numpy())
    np.testing.assert_array_equal(worth(pool, "entropy"), -pool.entropies.double().numpy())
    np.testing.assert_array_equal(worth(pool, "length"), [1 + i % 7 for i in range(60)])
    np.testing.assert_array_equal(worth(pool, "human"), [i % 5 for i in range(60)])
    length, score = np.array([1 + i % 7 for i in range(60)]), pool.scores.double().numpy()
    mixed = 2 * (score - score.mean()) / score.std() - 0.5 * (length - length.mean()) / length.std()
    np.testing.assert_allclose(worth(pool, {"advantage": 2.0, "length": -0.5}), mixed, rtol=1e-12)
    assert len(set(worth(pool, "random"))) == 60


def test_people_must_have_judged_for_the_criterion_human():
    with pytest.raises(UserError, match="needs a column 'human'"):
        SelectiveRehearsal(criterion="human", clusters=2).select(_pool())


@pytest.mark.parametrize("options", [{"clusters": 0}, {"criterion": {"advantage": 0}}, {"criterion": "beauty"}])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError):
        SelectiveRehearsal(**options)


def test_an_embedding_model_by_name(monkeypatch):
    seen = []

    class Model:
        def __init__(self, name):
            seen.append(name)

        def encode(self, texts, show_progress_bar):
            return np.eye(2)[[int(text.split()[1]) % 2 for text in texts]]

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Model))
    pool = _pool()
    labels = kinds_of(pool, ClusterOptions(embedding="some/model", clusters=2)).labels
    assert seen == ["some/model"] and adjusted_rand_score(pool.rows.numpy() % 2, labels) == 1


def test_an_embedding_model_without_its_package_is_a_users_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match="needs sentence-transformers"):
        kinds_of(_pool(), ClusterOptions(embedding="some/model"))


def _scored(*of_prompts):
    """Four responses per prompt, the first prompts with these scores; all other scores differ."""
    scores = np.random.default_rng(1).normal(size=(60, 4))
    for row, known in enumerate(of_prompts):
        scores[row] = known
    return _pool(scores.ravel(), repeats=4)


def test_prompts_with_nothing_to_learn_are_left_out():
    pool = _scored([1, 1, 1, 1], [0, 0, 0, 1], [2, 2, 2, 2])
    chosen = PromptSelection().select(pool)
    assert [int(pool.rows[i]) for i in chosen.prompts] == [1, *range(3, 60)]
    assert len(PromptSelection(min_spread=None).select(pool).prompts) == 60
    with pytest.raises(UserError, match="nothing to learn"):
        PromptSelection().select(_pool(np.ones(240), repeats=4))


@pytest.mark.parametrize("share", [0.0, 0.4, 0.6, 0.8])
def test_hard_prompts_are_drawn_more_often(share):
    pool = _scored()
    means = pool.scores.reshape(60, 4).mean(1)
    rows = [int(pool.rows[i]) for i in PromptSelection(hard=share).select(pool).prompts]
    hard = set(means.argsort()[:30].tolist())
    assert set(rows) == set(range(60))
    assert sum(row in hard for row in rows) / len(rows) == pytest.approx(max(share, 0.5), abs=0.01)


@pytest.mark.parametrize("stratify", ["category", "cluster"])
def test_strata_are_the_prompts_kinds(stratify):
    pool = _scored()
    chosen = PromptSelection(stratify=stratify, clusters=KINDS, hard=0.7).select(pool)
    kinds = [int(pool.rows[i]) % KINDS for i in chosen.prompts]
    assert adjusted_rand_score(kinds, [str(label) for label in chosen.strata]) == 1
