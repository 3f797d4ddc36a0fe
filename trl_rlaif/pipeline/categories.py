"""Categories of prompts whose data names none: clusters of their embeddings."""

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
    """Prompts with ``data.clusters`` categories, where the recipe asks for them and no prompt has one of its own.

    The clusters are those of the first prompts that a run asks for, which are its training prompts, and stay in its
    folder; prompts that come later belong to the nearest one.

    Args:
        tokens: Of each prompt.
        base: The model whose hidden states embed them; no adapter takes part.
    """
    wanted = context.recipe.data.clusters
    if wanted is None or any(prompt.category is not None for prompt in prompts):
        return prompts
    from trl_rlaif.clustering import Clusters, cluster
    from trl_rlaif.models.embedding import directions, mean_hidden_states
    from trl_rlaif.models.shared_model import active_adapter

    # The categories of the first round are those of the later ones, whose seeds are others.
    *earlier, path = (run / artifacts.CLUSTERS for run in (*reversed(context.previous), context.folder))
    of = [wanted, context.recipe.run.seed, context.recipe.model.path]
    known = _read(next(filter(Path.exists, earlier), path))  # before another process has computed and written it
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
