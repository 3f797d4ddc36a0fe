"""Clusters prompts by their embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from trl_rlaif import Options, Pool, UserError, as_text

# Above this number, MiniBatchKMeans finds clusters as good as those of KMeans, which is much slower.
MANY_PROMPTS = 10_000


class ClusterOptions(Options):
    """How prompts are embedded and clustered."""

    clusters: int | Literal["auto"] = Field("auto", description="Number of prompt clusters; auto: by silhouette.")
    method: Literal["auto", "kmeans", "minibatch_kmeans", "gaussian_mixture"] = Field(
        "auto", description="Clustering method; auto: kmeans, or minibatch_kmeans above 10,000 prompts."
    )
    embedding: str = Field(
        "model",
        min_length=1,
        description="model: hidden states of the frozen base; otherwise the name of a sentence-transformers model.",
    )


@dataclass(frozen=True)
class Kinds:
    """The clusters of a pool.

    Args:
        labels: (N,) int64, the cluster of each row, the largest one 0.
        directions: (N, H) float32, embeddings minus their mean, normalized to unit length.
    """

    labels: np.ndarray
    directions: np.ndarray


def kinds_of(pool: Pool, options: ClusterOptions) -> Kinds:
    """Cluster a pool's prompts; a prompt with several responses counts once.

    Raises:
        UserError: More clusters than prompts, or sentence-transformers or its model is not available.
    """
    from trl_rlaif import cluster, directions  # imports scikit-learn, which checking a recipe does not need

    rows = pool.rows.numpy()
    _, first, place = np.unique(rows, return_index=True, return_inverse=True)
    if options.embedding == "model":
        embeddings = pool.embeddings[first]
    else:
        embeddings = _sentence_embeddings(options.embedding, [as_text(pool.prompts[i]) for i in first])
    unit = directions(embeddings, embeddings.mean(0))
    method = options.method
    if method == "auto":
        method = "minibatch_kmeans" if len(first) > MANY_PROMPTS else "kmeans"
    found = cluster(unit, options.clusters, method=method, seed=pool.seed)
    return Kinds(found.labels[place], unit[place])


def _sentence_embeddings(name: str, texts: list[str]) -> np.ndarray:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError(
            f"The embedding '{name}' needs sentence-transformers.",
            fix="Install it with pip install trl-rlaif[embed], or write embedding: model.",
        ) from None
    try:
        model = SentenceTransformer(name)
    except Exception as error:  # anything raised by the Hub, the file system or the model's own code
        raise UserError(f"The embedding model '{name}' cannot be loaded: {error}") from error
    return np.asarray(model.encode(texts, show_progress_bar=False), dtype=np.float32)
