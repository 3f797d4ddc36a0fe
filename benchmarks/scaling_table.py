"""Writes results/scaling.md: the scenarios of `scaling.py`, its quantities, and predictions against measurements.

PYTHONPATH=.:plugins python benchmarks/scaling_table.py --output benchmarks/results/scaling.md
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from scaling import (
    ASSUMED,
    BEST,
    CARD_GIB,
    EPISODES,
    GPUS,
    HOUR,
    LABELS,
    MODELS,
    PROMPT,
    RECIPE,
    RESPONSE,
    REWARD_TOKENS,
    WORST,
    Run,
    breaks,
    measured,
    parameters,
    recorded,
)

TITLE = """# Larger runs, simulated

`python benchmarks/scaling_table.py`; [docs/scaling.md](../../docs/scaling.md) explains it. Each range is from
the best to the worst case. The scenarios are simulated; none was run.
"""

SCENARIOS = f"""## Scenarios

The packaged recipe `{RECIPE}` in NF4 on GPUs like one H100: a pair per label, prompts of {PROMPT} tokens, responses of
{RESPONSE}, the base as its own judge in both orders, one epoch of reward training, and {EPISODES:,} episodes of PPO.
Hours per stage, GB of host memory per machine (of up to 8 GPUs), and USD.
"""
MEMORY = """## Memory of each GPU

The peak that `trl-rlaif memory` predicts, for any number of GPUs: every process holds the whole model.
"""


def memory_gib(model: str, quantization: str) -> float:
    """The peak memory per GPU predicted by ``trl-rlaif memory``."""
    from trl_rlaif.memory import plan_memory
    from trl_rlaif.plugins import installed_plugins
    from trl_rlaif.recipe import parse_recipe

    with tempfile.TemporaryDirectory() as folder:
        MODELS[model].config().save_pretrained(folder)
        changes = [f"model.path={folder}", f"model.quantization={quantization}"]
        recipe = parse_recipe(RECIPE, overrides=changes, registry=installed_plugins().registry)
        return plan_memory(recipe).peak / 2**30


# ---- Predictions against measurements --------------------------------------------------------------------

Validation = tuple[str, str, float, float, float]


def validations() -> Iterator[Validation]:
    """(Quantity, source, best, worst, measured) for configurations other than those behind the prediction."""
    speed, pairs, ppo = (recorded(of) for of in ("gpu_checks.json", "gpu_checks.json", "gpu.json"))
    speed, pairs, ppo = speed["speed"], pairs["pairs"], ppo[0]["ours"]
    four, small, whole = speed["ms a token, 4 rows"] / 1e3, MODELS["1.5B"], MODELS["8B"]
    yield (
        "PPO's generation, 1.5B, 4 x 256 tokens: s", "decoding of 8B alone, by parameters; by layers",
        256 * four * parameters(small) / parameters(whole), 256 * four * small.layers / whole.layers,
        ppo["seconds"]["generation"],
    )  # fmt: skip
    slower = speed["ms a token, 32 rows"] / 1e3 / four
    update = [
        256 * measured()["token of 32 rows"][case] / slower
        + sum(4 * 512 / measured()[name][case] for name in ("forwards", "update"))
        for case in (BEST, WORST)
    ]
    # "The first three took 190 s" (gpu.md); whether this includes loading was not recorded.
    yield ("PPO's update, 8B, 4 x (256 + 256) tokens: s", "the quantities below", update[0], update[1], 190 / 3)
    short, long = (
        next(r for r in recorded("ppo.json") if r.get("dtype") == "bfloat16" and r["response_tokens"] == tokens)[
            "ours"
        ]["seconds"]
        for tokens in (32, 256)
    )
    predicted = short["generation"] * 256 / 32 + (short["total"] - short["generation"]) * (64 + 256) / (64 + 32)
    yield (
        "PPO's update, 135M on 2 cores, 8 x (64 + 256) tokens: s",
        "8 x (64 + 32)",
        predicted,
        predicted,
        long["total"],
    )
    labels = recorded("labeling.json")[0]
    loop = labels["tokens"]["to_compute"] / labels["tokens_per_s_loop"]
    yield (
        "16 packed labels, 135M on 2 cores: s",
        "tokens per second of a loop",
        loop,
        loop,
        labels["seconds"]["b_trl_rlaif"],
    )
    rewards = [pairs[f"pairs, nf4, {of}, packed, fused: pairs a second"] for of in REWARD_TOKENS]
    predicted = rewards[0] * REWARD_TOKENS["256+200"] / REWARD_TOKENS["900+120"]
    yield ("reward training, 8B, 900 + 120 tokens: pairs/s", "256 + 200 tokens", predicted, predicted, rewards[1])
    few, many = recorded("label_store.json")
    for what, key in (("resuming with", "resume: seconds"), ("indexing", "index: seconds")):
        predicted = few[key] * many["pairs"] / few["pairs"]
        yield (f"{what} {many['pairs']:,} labels: s", f"{few['pairs']:,}", predicted, predicted, many[key])
    gib = ppo["predicted_gib"]
    yield ("GPU memory, PPO, 1.5B: GiB", "the memory planner", gib, gib, ppo["gib"]["allocated"])


# ---- Tables ---------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    rows = list(rows)
    yield f"| {' | '.join(head)} |"
    yield f"|{'|'.join('--:' if cell[0].isdigit() else '---' for cell in rows[0])}|"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def _number(value: float) -> str:
    """A number with two significant digits."""
    return f"{float(f'{value:.2g}'):,.10g}"


def _range(best: float, worst: float) -> str:
    return _number(best) if _number(best) == _number(worst) else f"{_number(best)} to {_number(worst)}"


def _scenario(model: str, labels: int, gpus: int, card: float) -> list[str]:
    best, worst = (Run(model, labels, gpus, case) for case in (BEST, WORST))
    hours = [_range(best.seconds[stage] / HOUR, worst.seconds[stage] / HOUR) for stage in best.seconds]
    broken = breaks(model, labels, gpus, card)
    return [
        f"{labels:,}", model, str(gpus), *hours, _range(*(max(run.host_gb.values()) for run in (best, worst))),
        _range(best.cost, worst.cost),
        "; ".join(broken) or "nothing",
    ]  # fmt: skip


def lines() -> Iterator[str]:
    """All lines of the file."""
    cards = {(model, kind): memory_gib(model, kind) for model in ("8B", "70B") for kind in ("nf4", "none")}
    yield from TITLE.splitlines()
    yield from ["", *SCENARIOS.splitlines(), ""]
    head = (
        "labels",
        "model",
        "GPUs",
        "`sample`",
        "`label`",
        "`reward`",
        "`rl`",
        "GB",
        "USD",
        "what breaks, the worst first",
    )
    found = (_scenario(m, n, g, cards[m, "nf4"]) for n, m, g in itertools.product(LABELS, ("8B", "70B"), GPUS))
    yield from _table(head, found)
    yield from [*MEMORY.splitlines(), ""]
    kinds = {"nf4": "NF4", "none": "bfloat16"}
    rows = [
        [model, kinds[kind], f"{gib:.1f}", "yes" if gib < CARD_GIB else "no"] for (model, kind), gib in cards.items()
    ]
    yield from _table(("model", "base", "GiB", f"within {CARD_GIB}"), rows)
    yield "## Predicted and measured\n"
    checked = [[what, of, _range(best, worst), _number(seen)] for what, of, best, worst, seen in validations()]
    yield from _table(("what", "predicted from", "predicted", "measured"), checked)
    for title, named in (("Measured", measured()), ("Assumed", ASSUMED)):
        yield f"## {title}\n"
        rows = [[name, _three(q.best), _three(q.worst), q.unit, q.source] for name, q in named.items()]
        yield from _table((title.lower(), "best", "worst", "unit", "from" if title == "Measured" else "why"), rows)


def _three(value: float) -> str:
    return f"{float(f'{value:.3g}'):,.10g}"


def main() -> None:
    """Write or print the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    text = "\n".join(lines())
    if args.output:
        args.output.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
