"""Prompt categories if the data has none: clusters of prompt embeddings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trl_rlaif.distributed import dividing
from trl_rlaif.files import write_atomically
from trl_rlaif.pipeline import artifacts

if TYPE_CHECKING:
    from trl_rlaif.data import Prompt
    from trl_rlaif.pipeline.context import Context


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def categorized(context: Context, prompts: list[Prompt], tokens: Sequence[Sequence[int]], base: Any) -> list[Prompt]:
    """Prompts with ``data.clusters`` categories, if the recipe sets it and no prompt has its own category.

    The clusters are fitted to the first prompts that a run encodes, its training prompts, and stored in its folder;
    later prompts are assigned to the nearest cluster. Later rounds keep the clusters of the first.

    Args:
        tokens: Token ids of each prompt.
        base: The model whose hidden states are the embeddings; adapters are disabled.
    """
    wanted = context.recipe.data.clusters
    if wanted is None or any(prompt.category is not None for prompt in prompts):
        return prompts
    from trl_rlaif.clustering import Clusters, cluster
    from trl_rlaif.models.embedding import directions, mean_hidden_states
    from trl_rlaif.models.shared_model import active_adapter

    # Later rounds, which have other seeds, use the categories of the first round.
    *earlier, path = (run / artifacts.CLUSTERS for run in (*reversed(context.previous), context.folder))
    of = [wanted, context.recipe.run.seed, context.recipe.model.path]
    known = _read(next(filter(Path.exists, earlier), path))  # read before another process may write it
    with active_adapter(base, None), dividing():
        embeddings = mean_hidden_states(base, tokens)
    if known and (known.get("of", of) == of or (earlier and known["of"][::2] == of[::2])):
        centres, mean = np.array(known["centres"]), np.array(known["mean"])
        found = Clusters(np.empty(0), centres, None).nearest(directions(embeddings, mean))
    else:
        mean = embeddings.mean(0)
        fitted = cluster(directions(embeddings, mean), wanted, seed=context.recipe.run.seed)
        write_atomically(path, json.dumps({"of": of, "mean": mean.tolist(), "centres": fitted.centres.tolist()}))
        found = fitted.labels
    return [replace(prompt, category=f"cluster {k + 1}") for prompt, k in zip(prompts, found, strict=True)]
