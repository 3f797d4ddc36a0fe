"""Clusters of embeddings, by scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trl_rlaif.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

Method = Literal["kmeans", "minibatch_kmeans", "gaussian_mixture"]

# The silhouette compares every point with every other one.
SILHOUETTE_POINTS = 2_000
# "auto" tries each number of clusters on at most this many rows, and fits the best one to all rows.
TRIAL_ROWS = 10_000
CANDIDATES = (2, 3, 4, 6, 8, 12, 16, 24, 32)


@dataclass(frozen=True)
class Clusters:
    """A fitted clustering.

    Args:
        labels: (N,) int64, cluster of each row of the fit, 0..c-1, sorted by size, largest first.
        centres: (c, H) float64.
        silhouette: Silhouette of a sample of the rows, -1..1; None for a single cluster.
    """

    labels: np.ndarray
    centres: np.ndarray
    silhouette: float | None

    def nearest(self, embeddings: np.ndarray) -> np.ndarray:
        """(M,) int64, the cluster whose centre is nearest to each row of (M, H)."""
        squares = (self.centres**2).sum(1)
        return (squares - 2 * np.asarray(embeddings, dtype=np.float64) @ self.centres.T).argmin(1)


def cluster(
    embeddings: np.ndarray,
    clusters: int | Literal["auto"] = "auto",
    *,
    method: Method = "kmeans",
    seed: int = 0,
    candidates: Sequence[int] = CANDIDATES,
) -> Clusters:
    """Cluster the rows of a matrix.

    Args:
        embeddings: (N, H) float.
        clusters: Number of clusters; "auto" picks the best silhouette on 10,000 rows (Rousseeuw 1987).
        method: ``minibatch_kmeans`` for many rows; ``gaussian_mixture`` with diagonal covariances.
        seed: The same seed gives the same clusters.
        candidates: Numbers that "auto" tries; those above N - 1 are skipped.

    Raises:
        UserError: More clusters than rows.
    """
    if clusters != "auto":
        if not 1 <= clusters <= len(embeddings):
            raise UserError(f"{clusters} clusters of {len(embeddings)} prompts.", fix="Ask for fewer, or for auto.")
        return _fit(embeddings, clusters, method, seed)
    sample = _sample(embeddings, TRIAL_ROWS, seed)
    fits = {count: _fit(sample, count, method, seed) for count in candidates if count < len(sample)}
    silhouettes = {count: fit.silhouette for count, fit in fits.items() if fit.silhouette is not None}
    best = max(silhouettes, key=silhouettes.__getitem__, default=1)
    return fits[best] if best in fits and sample is embeddings else _fit(embeddings, best, method, seed)


def _sample(embeddings: np.ndarray, size: int, seed: int) -> np.ndarray:
    if len(embeddings) <= size:
        return embeddings
    return embeddings[np.random.default_rng(seed).choice(len(embeddings), size, replace=False)]


def _fit(embeddings: np.ndarray, count: int, method: Method, seed: int) -> Clusters:
    model = _model(count, method, seed)
    found = model.fit_predict(embeddings)
    centres = model.means_ if method == "gaussian_mixture" else model.cluster_centers_
    order = np.argsort(-np.bincount(found, minlength=count), kind="stable")
    return Clusters(np.argsort(order)[found], centres[order].astype(np.float64), _silhouette(embeddings, found, seed))


def _model(count: int, method: Method, seed: int) -> Any:
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.mixture import GaussianMixture

    if method == "gaussian_mixture":
        return GaussianMixture(count, covariance_type="diag", random_state=seed)
    if method == "minibatch_kmeans":
        return MiniBatchKMeans(count, batch_size=4096, n_init=3, random_state=seed)
    return KMeans(count, n_init=4, random_state=seed)


def _silhouette(embeddings: np.ndarray, labels: np.ndarray, seed: int) -> float | None:
    from sklearn.metrics import silhouette_score

    rows = np.arange(len(labels))
    if len(rows) > SILHOUETTE_POINTS:
        rows = np.random.default_rng(seed).choice(rows, SILHOUETTE_POINTS, replace=False)
    if not 1 < len(np.unique(labels[rows])) < len(rows):
        return None
    return float(silhouette_score(embeddings[rows], labels[rows]))
