"""Every packaged recipe in one, two and three processes: differences between the artifacts.

    python benchmarks/processes.py --output benchmarks/results/processes.md

The recipes are made tiny (tests/helpers/packaged.py), with batches of twelve rows and a single step per trainer, so
that the rows fill the batches. All artifacts are compared, without times (tests/helpers/comparing.py). If ``rl`` draws
responses, the policies differ: then the stages before it are compared, and ``evaluate`` is repeated by several
processes in a copy of the single-process run.
The exit code is 1 if artifacts differ by more than --tolerance, or a run fails.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

os.environ["OMP_NUM_THREADS"] = "1"  # the rounding of matrix products depends on it
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from helpers import killing, packaged  # noqa: E402  (the tests' helpers are no package)
from helpers.comparing import differences  # noqa: E402

from trl_rlaif.pipeline.stages import STAGES  # noqa: E402
from trl_rlaif.recipe import packaged_recipes  # noqa: E402

COUNTS = (2, 3)
_ROWS = 12
_SMALL = {"per_device_train_batch_size": _ROWS, "max_steps": 1, "total_episodes": _ROWS, "num_generations": 2}
_STEP = {"max_steps": 1, "per_device_train_batch_size": _ROWS}
_DRAWING = {"total_episodes": _ROWS, "response_length": 4, "per_device_train_batch_size": _ROWS}
_DATA = {"prompts": 20, "pairs": 20, "data": _ROWS}
# Artifacts made before rl draws responses, and thus independent of them.
_BEFORE_RL = {name for stage in STAGES.values() if stage.prepares for name in (*stage.outputs, *stage.companions)}


def main() -> int:
    """Run, compare, write; returns the exit code."""
    args = _arguments()
    names = args.recipes or list(packaged_recipes())
    rows: list[str] = []
    worst = 0.0
    with tempfile.TemporaryDirectory(prefix="processes-") as scratch:
        model = packaged.save_model(Path(scratch) / "model")
        for name in names:
            folder = Path(scratch) / name
            folder.mkdir()
            try:
                found = {count: _compared(packaged_recipes()[name], model, folder, count) for count in (1, *COUNTS)}
            except RuntimeError as error:
                print(error, file=sys.stderr)
                worst = math.inf
                rows.append(f"| {name} | failed | |")
            else:
                worst = max([worst, *(by for of in found.values() for by in of.values())])
                rows.append(_row(name, {count: found[count] for count in COUNTS}))
            print(rows[-1], flush=True)
            if args.output:
                args.output.write_text(_table(rows, worst), encoding="utf-8")
    return 1 if worst > args.tolerance else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="names of packaged recipes; without any, all")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of a number, relative to it where it is above 1")
    parser.add_argument("--output", type=Path, help="the table, in Markdown")
    return parser.parse_args()


def _compared(recipe: Path, model: str, folder: Path, count: int) -> dict[str, float]:
    """Run a recipe in ``count`` processes; differences by artifact from the single-process run, which comes first."""
    written = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    draws = "rl" in written and written["rl"].get("algorithm") != "dpo"
    options = [word for text in _overrides(recipe, written, model, folder) for word in ("--set", text)]
    one, out = folder / "1", folder / str(count)
    _run(recipe, out, count, options)
    if count == 1:
        return {}
    found = differences(one, out)
    if draws:
        found = {name: by for name, by in found.items() if _is_before_rl(name, written)}
    if draws and "evaluate" in written and "compare" not in written:
        again = folder / f"{count}-evaluate"
        shutil.copytree(one, again)
        _run(recipe, again, count, [*options, "--only", "evaluate"])
        found |= {name: by for name, by in differences(one, again).items() if name == "samples.jsonl"}
    return found


def _overrides(recipe: Path, written: Mapping[str, Any], model: str, folder: Path) -> Iterator[str]:
    dpo = (written.get("rl") or {}).get("algorithm") == "dpo"
    # The first step of a warmup changes nothing, and bfloat16, used with a 4-bit base, would hide a wrongly split
    # batch.
    judge, model_section = _STEP | {"warmup_steps": 0}, {"dtype": "float32", "quantization": "none"}
    bounds = {
        "model": model_section, "sft": _STEP, "reward": _STEP, "judge": judge, "rl": _STEP if dpo else _DRAWING
    }  # fmt: skip
    small, data = packaged.SMALL | _SMALL, packaged.DATA | _DATA
    yield from packaged.tiny_overrides(recipe, model, folder, small=small, bounds=bounds, data=data)


def _is_before_rl(name: str, written: Mapping[str, Any]) -> bool:
    """Whether an artifact was made before the policy first drew responses for training."""
    parts = name.split("/")
    if "compare" in written or "rounds" in written:
        kind, which, *parts = parts if len(parts) > 2 else ["", "", *parts]
        if kind != "variants" and (kind, which) != ("rounds", "1"):
            return False
    return parts[0] in _BEFORE_RL


def _run(recipe: Path, out: Path, count: int, options: list[str]) -> None:
    code = killing.run(recipe, out, processes=count, options=options)
    if code:
        log = Path(f"{out}.log").read_text(encoding="utf-8")
        raise RuntimeError(f"{recipe.stem} in {count} processes: exit code {code}\n{log[-4000:]}")


def _row(name: str, found: Mapping[int, Mapping[str, float]]) -> str:
    cells = []
    for of_count in found.values():
        artefact, largest = max(of_count.items(), key=lambda one: one[1], default=("", 0.0))
        said = f", {largest:.1e} ({artefact})" if largest else ""
        cells.append(f"{sum(by == 0 for by in of_count.values())} of {len(of_count)}{said}")
    return f"| {name} | {' | '.join(cells)} |"


def _table(rows: list[str], worst: float) -> str:
    said = "nothing but numbers differs" if math.isfinite(worst) else "more than numbers differs"
    return "\n".join([
        "# One, two and three processes", "",
        "`python benchmarks/processes.py`, on a CPU with one thread per process.", "",
        f"{len(rows)} of {len(packaged_recipes())} packaged recipes. "
        f"The largest difference of a number is {worst:.1e}; {said}.", "",
        "Of all artefacts that were compared, those of which every byte is that of one process; and the largest "
        "difference, relative to the number where that is above 1:", "",
        "| recipe | two processes | three processes |", "|---|---|---|", *rows, "",
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
