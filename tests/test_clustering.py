"""Embeddings against a plain loop, and clustering against known clusters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.tiny import make_gpt2, make_llama
from peft import LoraConfig
from sklearn.metrics import adjusted_rand_score, silhouette_score

from trl_rlaif import SharedBase, UserError
from trl_rlaif.clustering import cluster
from trl_rlaif.models.embedding import directions, mean_hidden_states
from trl_rlaif.models.shared_model import backbone

PROMPTS = [[5, 6, 7], [9], [4, 4, 8, 9, 10, 11], [7, 3]]


@pytest.mark.parametrize("tokens", [10**6, 3])
@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_embeddings_are_means_over_tokens(make, tokens):
    model = make()
    with torch.no_grad():
        means = torch.stack(
            [backbone(model)(input_ids=torch.tensor([p])).last_hidden_state[0].double().mean(0) for p in PROMPTS]
        )
    found = mean_hidden_states(model, PROMPTS, batch_tokens=tokens)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, means.numpy(), atol=2e-6)
    centred = means - means.mean(0)
    expected = centred / centred.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(directions(found, found.mean(0)), expected.numpy(), atol=2e-6)


def test_embeddings_of_a_shared_base_are_those_of_the_role():
    shared = SharedBase(make_llama(), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    plain = mean_hidden_states(make_llama(), PROMPTS)
    with shared.role(None):
        np.testing.assert_allclose(mean_hidden_states(shared.peft, PROMPTS), plain, atol=1e-6)
    with shared.role("policy"):
        assert np.abs(mean_hidden_states(shared.peft, PROMPTS) - plain).max() > 1e-2


def _blobs(sizes: list[int], spread: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(len(sizes), 16))
    truth = np.repeat(np.arange(len(sizes)), sizes)
    return centres[truth] + spread * rng.normal(size=(len(truth), 16)), truth


@pytest.mark.parametrize("method", ["kmeans", "minibatch_kmeans", "gaussian_mixture"])
def test_known_clusters_are_found_the_largest_first(method):
    points, truth = _blobs([20, 60, 40])
    found = cluster(points, 3, method=method, seed=1)
    assert adjusted_rand_score(truth, found.labels) == 1
    assert np.bincount(found.labels).tolist() == [60, 40, 20]
    np.testing.assert_allclose(found.centres[0], points[truth == 1].mean(0), atol=0.02)
    assert found.silhouette == pytest.approx(silhouette_score(points, found.labels))
    assert (found.nearest(points) == found.labels).all()


def test_auto_finds_how_many():
    points, truth = _blobs([30] * 6)
    found = cluster(points, "auto")
    assert len(found.centres) == 6 and adjusted_rand_score(truth, found.labels) == 1


def test_the_same_seed_gives_the_same_clusters():
    points, _ = _blobs([50, 50], spread=2.0)
    assert (cluster(points, 4, seed=3).labels == cluster(points, 4, seed=3).labels).all()


def test_one_cluster_few_points_and_too_many_clusters():
    points, _ = _blobs([3, 3])
    assert cluster(points, 1).silhouette is None
    assert len(cluster(points[:1]).centres) == 1
    with pytest.raises(UserError, match="7 clusters of 6 prompts"):
        cluster(points, 7)
