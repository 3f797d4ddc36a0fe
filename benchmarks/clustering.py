"""Time and memory of selecting rehearsal pairs among many prompts, and quality of the clusters.

    python benchmarks/clustering.py --output benchmarks/results/clustering.md

Embeddings of a model's hidden size are drawn around one center per kind; every method is measured in its own process,
whose memory with the embeddings alone is reported with its peak. "found" is the adjusted Rand index between the
clusters and the kinds (1: identical).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

WAYS = {
    "MiniBatchKMeans, 32": {"clusters": 32},
    "MiniBatchKMeans, auto": {"clusters": "auto"},
    "KMeans, 32": {"clusters": 32, "method": "kmeans"},
    "Gaussian mixture, 32": {"clusters": 32, "method": "gaussian_mixture"},
}
KINDS = 24


def main() -> None:
    """Measure every method in a child process; print the table and, with ``--output``, write it."""
    args = _arguments()
    if args.way:
        print(json.dumps(_measure(args.way, args.prompts, args.width)))
        return
    lines = [
        f"<!-- python benchmarks/clustering.py --prompts {args.prompts} --width {args.width} -->",
        "",
        f"scikit-learn {version('scikit-learn')}, {os.cpu_count()} cores; {args.prompts:,} prompts of {KINDS} kinds, "
        f"{args.width} numbers each",
        "",
        "| clusters | seconds | peak memory, MiB | of which before | clusters found | found | pairs chosen |",
        "|---|---|---|---|---|---|---|",
    ]
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way, "--prompts", str(args.prompts), "--width", str(args.width)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        lines.append(
            f"| {way} | {found['seconds']:.1f} | {found['peak']:.0f} | {found['before']:.0f} | {found['clusters']} | "
            f"{found['rand']:.2f} | {found['pairs']} |"
        )
        print(lines[-1], flush=True)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=576, help="SmolLM2-135M's")
    parser.add_argument("--way", choices=list(WAYS), help="measure this one alone, in this process")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def _measure(way: str, prompts: int, width: int) -> dict[str, Any]:
    import torch
    from sklearn.metrics import adjusted_rand_score
    from trl_rlaif_rehearsal import SelectiveRehearsal

    from trl_rlaif import Pool

    rng = np.random.default_rng(0)
    kinds = rng.integers(KINDS, size=prompts)
    embeddings = rng.standard_normal((prompts, width), dtype=np.float32)
    embeddings += rng.standard_normal((KINDS, width), dtype=np.float32)[kinds]
    pool = Pool(
        prompts=[f"prompt {i}" for i in range(prompts)],
        responses=["response"] * prompts,
        scores=torch.from_numpy(rng.standard_normal(prompts, dtype=np.float32)),
        categories=[None] * prompts,
        rows=torch.arange(prompts),
        prompt_ids=[[1]] * prompts,
        response_ids=[[1]] * prompts,
        embed=lambda: embeddings,
    )
    SelectiveRehearsal(clusters=2).select(pool.subset(range(100)))  # warm-up: late imports are not measured
    before, began = _peak(), time.perf_counter()
    selection = SelectiveRehearsal(**WAYS[way]).select(pool)
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "peak": _peak(),
        "before": before,
        "clusters": max(selection.clusters) + 1,
        "rand": adjusted_rand_score(kinds, selection.clusters),
        "pairs": len(selection.rehearsal),
    }


def _peak() -> float:
    """Peak memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
