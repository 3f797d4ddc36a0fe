"""Time, memory and cost of larger runs, simulated from measurements on one GPU and one CPU.

`scaling_table.py` writes the scenarios as results/scaling.md.

Every quantity has a best and a worst value. A rate comes from a file in `results/`; if several measurements disagree,
they are its bounds. Unmeasured quantities are assumptions, with ranges. Each scenario is computed twice, with all
quantities at their best and at their worst, so a result's range reflects the uncertainty. No model runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gpu.models import SIZES, Size

RESULTS = Path(__file__).parent / "results"
BEST, WORST = 0, 1
GB, HOUR = 1e9, 3600
# The workload, as in the packaged recipe qlora_24gb: prompts of this many tokens, and responses of full length.
PROMPT, RESPONSE, ROWS, REWARD_PAIRS, EPISODES = 256, 256, 32, 16, 100_000
# Tokens of a judge's question besides the texts, in both orders (pipeline/stage.py), and GPUs per machine.
QUESTION, NODE = 80, 8
RECIPE, RANK = "qlora_24gb", 16
MODELS = {
    "8B": SIZES["8b"],
    "70B": Size("Llama-3-70B", RECIPE, 8192, 28672, 80, 64, 8, 128256, False),
    "1.5B": SIZES["1.5b"],
}
# Tokens of a pair of each setting of benchmarks/gpu/checks.py: the prompt once, and both responses.
REWARD_TOKENS = {"256+200": 256 + 2 * 200, "900+120": 900 + 2 * 120}
# What breaks: a card of 80 GB, seconds until a resumed run computes, and the share of `label` in which GPUs wait.
CARD_GIB, RESUMED, MOST_WAITED = 80, 60, 0.5
LABELS, GPUS = (10_000, 1_000_000, 100_000_000), (1, 8, 64)


@dataclass(frozen=True)
class Quantity:
    """A number with its range: the best and the worst case for time, memory or cost, and its source."""

    best: float
    worst: float
    unit: str
    source: str

    def __getitem__(self, case: int) -> float:
        return (self.best, self.worst)[case]


ASSUMED = {
    "all-reduce within a machine": Quantity(300, 100, "GB/s", "NVLink between 8 GPUs"),
    "all-reduce between machines": Quantity(40, 5, "GB/s per GPU", "InfiniBand at 400 Gbit/s, or Ethernet at 50"),
    "division": Quantity(1.0, 0.8, "share of the time computed", "waiting for the slowest process of each round"),
    "FLOP/s of 70B": Quantity(
        1.25, 0.8, "times those of 8B", "of passes over many tokens; larger products, same kernels"
    ),
    "price": Quantity(2, 6, "USD per GPU-hour", "rented H100; put in your own"),
    "memory of a machine": Quantity(2000, 1000, "GB", "of the host, for 8 GPUs"),
    "patience": Quantity(7, 7, "days", "for the whole run, above which time breaks"),
}


# ---- Measurements ---------------------------------------------------------------------------------------


def _source(file: str, numbers: Mapping[str, float], *keys: str) -> str:
    """``file:line`` of each of these numbers."""
    lines = (RESULTS / file).read_text().splitlines()
    wanted = [f'"{key}": {json.dumps(numbers[key])}' for key in keys]
    return f"{file}:{','.join(str(next(n for n, line in enumerate(lines, 1) if of in line)) for of in wanted)}"


def recorded(file: str) -> Any:
    """The content of a results file."""
    return json.loads((RESULTS / file).read_text())


@cache
def measured() -> dict[str, Quantity]:
    """Rates of 8B in NF4 on one H100, and of the host, each with its file and lines."""
    return _of_gpu() | _of_host()


def _of_gpu() -> dict[str, Quantity]:
    checks = recorded("gpu_checks.json")
    speed, pairs, ppo = checks["speed"], checks["pairs"], recorded("gpu.json")[0]["ours"]["seconds"]
    small, whole = MODELS["1.5B"], MODELS["8B"]
    deeper, larger = whole.layers / small.layers, parameters(whole) / parameters(small)
    rows, four = (speed[f"ms a token, {n} rows"] / 1e3 for n in (32, 4))
    trained = {f"pairs, nf4, {of}, packed, fused: pairs a second": n for of, n in REWARD_TOKENS.items()}
    short, long = (pairs[key] * tokens for key, tokens in trained.items())
    tokens = 4 * (256 + 256)  # of the measured update

    def of_speed(*keys: str) -> str:
        return _source("gpu_checks.json", speed, *keys)

    slower = ppo["generation"] / 256 * deeper * rows / four
    judged = ("pairs a second, plain rows", "pairs a second, packed")
    plain, packed = (speed[key] * of for key, of in zip(judged, (2 * (300 + 250 + 150), 250 + 2 * 150), strict=True))
    load = speed["seconds to load, NF4"]
    generated, passed, learned = (_source("gpu.json", ppo, name) for name in ("generation", "forwards", "update"))
    both = _source("gpu_checks.json", pairs, *trained)
    # A rate of 1.5B is extrapolated to 8B by the number of layers at best, and of parameters at worst.
    ways = "by layers; by parameters"
    return {
        "token of 32 rows": Quantity(rows, slower, "s", f"{of_speed('ms a token, 32 rows')}; {generated} by layers"),
        "judge": Quantity(plain, packed, "tokens/s", of_speed(*judged)),
        "reward": Quantity(short, long, "tokens/s", both),
        "forwards": Quantity(
            tokens / ppo["forwards"] / deeper, tokens / ppo["forwards"] / larger, "tokens/s", f"{passed} {ways}"
        ),
        "update": Quantity(
            short / 2, tokens / ppo["update"] / larger, "tokens/s", f"half of reward; {learned} by parameters"
        ),
        "load": Quantity(load, load, "s", of_speed("seconds to load, NF4")),
    }


def _of_host() -> dict[str, Quantity]:
    few, many = recorded("label_store.json")
    busy, added, peak = "add: processor seconds a label", "add: seconds a label", "stage: peak bytes"
    # Growth of the stage's memory per pair.
    held = (many[peak] - few[peak]) / (many["pairs"] - few["pairs"])
    process, index = many[peak] - held * many["pairs"], many["index: bytes on disk"] / many["pairs"]
    resumed, drawn = many["resume: seconds"] / many["pairs"], few["sample: bytes a pair"]

    def of(record: dict[str, float], *keys: str) -> str:
        return _source("label_store.json", record, *keys)

    peaks = f"{of(few, peak)}; {of(many, peak)}"
    clocks, first = "the processor's; the clock's", "the first process; the others, with an index in memory"
    return {
        "add": Quantity(many[busy], few[added], "s/label", f"{of(many, busy)}; {of(few, added)}: {clocks}"),
        "resume": Quantity(resumed, resumed, "s/label", of(many, "resume: seconds")),
        "process": Quantity(process, process, "bytes", peaks),
        "labeled": Quantity(held, held + index, "bytes/label", f"{peaks}: {first}"),
        "drawn": Quantity(drawn, drawn, "bytes/label", of(few, "sample: bytes a pair")),
    }


# ---- The simulator --------------------------------------------------------------------------------------


def parameters(size: Size) -> int:
    """Number of parameters of a Llama without biases."""
    head = size.hidden // size.heads
    layer = 2 * size.hidden**2 + 2 * size.hidden * size.kv_heads * head + 3 * size.hidden * size.intermediate
    return (1 if size.tied else 2) * size.vocab * size.hidden + size.layers * (layer + 2 * size.hidden) + size.hidden


def adapter_bytes(size: Size) -> int:
    """Bytes of the float32 gradients of LoRA on all linear layers."""
    narrow = size.kv_heads * size.hidden // size.heads
    sums = 2 * 2 * size.hidden + 2 * (size.hidden + narrow) + 3 * (size.hidden + size.intermediate)
    return 4 * RANK * size.layers * sums


def all_reduce(size: int, gpus: int, within: float, between: float) -> float:
    """Seconds of a ring all-reduce: 2 (n - 1) / n of the bytes pass the slowest link (Patarasuk and Yuan 2009)."""
    return 2 * (gpus - 1) / gpus * size / (GB * (within if gpus <= NODE else between))


@dataclass(frozen=True)
class Run:
    """Time by stage, host memory and cost of a run.

    Args:
        model: A key of MODELS.
        labels: Number of pairs drawn and labeled, in both orders, by the policy's own base.
        gpus: Number of GPUs, with a process and the recipe's rows each.
        case: BEST or WORST.
    """

    model: str
    labels: int
    gpus: int
    case: int

    def rate(self, name: str) -> float:
        """A measured or assumed quantity in this case."""
        return (measured() | ASSUMED)[name][self.case]

    @property
    def _larger(self) -> float:
        return parameters(MODELS[self.model]) / parameters(MODELS["8B"])

    @property
    def _token(self) -> float:
        """Seconds of a token of 32 rows: at best as many kernels are waited for as before, at worst all weights are."""
        deeper = MODELS[self.model].layers / MODELS["8B"].layers
        both = (min(deeper, self._larger), max(deeper, self._larger))
        return self.rate("token of 32 rows") * both[self.case]

    def _passes(self, name: str, tokens: int) -> float:
        """Seconds of passes over many tokens."""
        relative = self.rate("FLOP/s of 70B") if self._larger > 1 else 1.0
        return tokens / self.rate(name) * self._larger / relative

    @property
    def _idle(self) -> float:
        return 1 / self.rate("division") if self.gpus > 1 else 1.0

    def _reduce(self, adapters: int) -> float:
        links = (self.rate(f"all-reduce {where}") for where in ("within a machine", "between machines"))
        return all_reduce(adapters * adapter_bytes(MODELS[self.model]), self.gpus, *links)

    @property
    def adding(self) -> float:
        """Seconds in which the first process writes labels one by one while the others wait."""
        return self.labels * self.rate("add")

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each stage; those of rl are for EPISODES episodes."""
        rounds = math.ceil(math.ceil(2 * self.labels / ROWS) / self.gpus)
        question = PROMPT + 4 * RESPONSE + QUESTION
        steps, updates = (math.ceil(n / (of * self.gpus)) for n, of in ((self.labels, REWARD_PAIRS), (EPISODES, ROWS)))
        batch = REWARD_PAIRS * (PROMPT + 2 * RESPONSE)
        learned = sum(self._passes(name, ROWS * (PROMPT + RESPONSE)) for name in ("forwards", "update"))
        load = self.rate("load") * self._larger
        return {
            "sample": load + rounds * RESPONSE * self._token * self._idle,
            "label": load + self._passes("judge", self.labels * question) / self.gpus * self._idle + self.adding,
            "reward": load + steps * (self._passes("reward", batch) + self._reduce(1)),
            "rl": load + updates * (RESPONSE * self._token * self._idle + learned + self._reduce(2)),
        }

    @property
    def host_gb(self) -> dict[str, float]:
        """Host memory of a machine at the end of a stage; each of its processes holds the same amount."""
        held = {"sample": self.rate("drawn"), "label": self.rate("labeled")}
        processes = min(self.gpus, NODE)
        return {of: processes * (self.rate("process") + self.labels * each) / GB for of, each in held.items()}

    @property
    def cost(self) -> float:
        """Cost in USD."""
        return sum(self.seconds.values()) / HOUR * self.gpus * self.rate("price")


def breaks(model: str, labels: int, gpus: int, card_gib: float) -> list[str]:
    """Exceeded limits: first those that stop a run (``card_gib``: memory needed per GPU), then those that delay it."""
    best, worst = (Run(model, labels, gpus, case) for case in (BEST, WORST))
    found: list[str] = []
    if REWARD_PAIRS % gpus or ROWS % gpus:
        found.append("batches do not divide")
    if card_gib > CARD_GIB:
        found.append("GPU memory")
    cases = ((best, ""), (worst, " at worst"))
    full = [
        f"host memory{when} in `{stage}`"
        for run, when in cases
        for stage, gb in run.host_gb.items()
        if gb > run.rate("memory of a machine")
    ]
    found += full[:1]
    slow = [(run.seconds, when) for run, when in cases if sum(run.seconds.values()) > run.rate("patience") * 24 * HOUR]
    found += [f"time{when}, most of it in `{max(of, key=of.__getitem__)}`" for of, when in slow[:1]]
    waited = [run.adding / run.seconds["label"] for run in (best, worst)]
    if max(waited) > MOST_WAITED:
        found.append(f"writing labels ({min(waited):.0%} to {max(waited):.0%} of `label`)")
    if labels * best.rate("resume") > RESUMED:
        found.append("resuming")
    return found
