"""The simulator of larger runs against computations by hand, and its table as quoted in the docs."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scaling():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        for name in [name for name in sys.modules if name.partition(".")[0] in ("gpu", "scaling", "scaling_table")]:
            patch.delitem(sys.modules, name)
        yield importlib.import_module("scaling")
        for name in [name for name in sys.modules if name.partition(".")[0] in ("gpu", "scaling", "scaling_table")]:
            del sys.modules[name]


@pytest.fixture
def rates(scaling, monkeypatch):
    """Round rates, as (best, worst)."""
    known = {
        "token of 32 rows": (0.1, 0.2), "judge": (20_000, 10_000), "reward": (8000, 4000), "forwards": (4000, 2000),
        "update": (1000, 500), "load": (5, 5), "add": (0.002, 0.004), "resume": (1e-4, 1e-4), "process": (1e9, 1e9),
        "labeled": (500, 600), "drawn": (4000, 4000),
    }  # fmt: skip
    assert known.keys() == scaling.measured().keys()
    quantities = {name: scaling.Quantity(*both, "", "") for name, both in known.items()}
    monkeypatch.setattr(scaling, "measured", lambda: quantities)
    return quantities


def test_a_scenario_by_hand(scaling, rates):
    """8B on 8 GPUs: 1,000 labels are 2,000 responses, 63 batches of 32, in 8 rounds of 256 tokens."""
    best = scaling.Run("8B", 1000, 8, scaling.BEST).seconds
    assert best["sample"] == pytest.approx(5 + 8 * 256 * 0.1)
    assert best["label"] == pytest.approx(5 + 1000 * (256 + 4 * 256 + 80) / 20_000 / 8 + 1000 * 0.002)
    # LoRA of rank 16 on an 8B Llama has 41,943,040 parameters; 14/8 of their gradients are sent at 300 GB/s.
    reduce = 14 / 8 * 4 * 41_943_040 / 300e9
    assert best["reward"] == pytest.approx(5 + 8 * (16 * 768 / 8000 + reduce))
    rows = 32 * 512
    assert best["rl"] == pytest.approx(5 + 391 * (256 * 0.1 + rows / 4000 + rows / 1000 + 2 * reduce))


def test_the_worst_case_waits_and_pays_more(scaling, rates):
    worst = scaling.Run("8B", 1000, 64, scaling.WORST)
    assert worst.seconds["sample"] == pytest.approx(5 + 256 * 0.2 / 0.8)
    reduce = 126 / 64 * 4 * 41_943_040 / 5e9
    assert worst.seconds["reward"] == pytest.approx(5 + 16 * 768 / 4000 + reduce)
    assert worst.cost == pytest.approx(sum(worst.seconds.values()) / 3600 * 64 * 6)
    # One process writes the labels of all 64.
    assert worst.seconds["label"] == pytest.approx(5 + 1000 * 1360 / 10_000 / 64 / 0.8 + 4)


def test_one_gpu_waits_for_nobody(scaling, rates):
    assert scaling.all_reduce(10**9, 1, 100, 5) == 0
    assert scaling.Run("8B", 16, 1, scaling.WORST).seconds["sample"] == pytest.approx(5 + 256 * 0.2)


def test_a_larger_model_is_slower_by_its_layers_or_its_parameters(scaling, rates):
    """Published counts: Llama-3-8B has 8,030,261,248 parameters, Llama-3-70B 70,553,706,496."""
    whole, larger = (scaling.parameters(scaling.MODELS[name]) for name in ("8B", "70B"))
    assert (whole, larger) == (8_030_261_248, 70_553_706_496)
    runs = [scaling.Run("70B", 16, 1, case).seconds["sample"] - 5 * larger / whole for case in (0, 1)]
    assert runs == pytest.approx([256 * 0.1 * 80 / 32, 256 * 0.2 * larger / whole])


def test_what_breaks_comes_in_order(scaling, rates):
    assert scaling.breaks("8B", 1000, 1, 10.0) == []
    # 1 GB per process and 4,000 bytes per drawn pair: 40 GB with 8 processes for 1M pairs, 3,208 GB for 100M.
    held = [scaling.Run("8B", 10**6, gpus, scaling.BEST).host_gb for gpus in (1, 8, 64)]
    assert [of["sample"] for of in held] == pytest.approx([5, 40, 40])
    assert [of["label"] for of in held] == pytest.approx([1.5, 12, 12])
    assert scaling.breaks("8B", 10**6, 8, 81.0) == ["GPU memory", "resuming"]
    found = scaling.breaks("70B", 10**8, 64, 10.0)
    assert found[:3] == ["batches do not divide", "host memory in `sample`", "time, most of it in `sample`"]
    # 8 processes with 1 GB and 600 bytes per label: 1,208 GB, on a machine with 1,000 GB at worst.
    rates["drawn"] = scaling.Quantity(1, 1, "", "")
    assert scaling.breaks("8B", 25 * 10**7, 8, 10.0)[0] == "host memory at worst in `label`"
    # Loading, the work of 64 GPUs, and that of one process: 5 + 106 + 200 s at best, 5 + 266 + 400 s at worst.
    assert scaling.breaks("8B", 10**5, 64, 10.0) == ["batches do not divide", "writing labels (60% to 64% of `label`)"]


def test_rates_are_where_they_say(scaling):
    """The line named as the source of ``load`` has its number; no rate is better at worst than at best."""
    for name, quantity in scaling.measured().items():
        slower_is_more = quantity.unit.startswith(("s", "bytes"))
        assert (quantity.best <= quantity.worst) if slower_is_more else (quantity.best >= quantity.worst), name
    load = scaling.measured()["load"]
    file, line = load.source.split(":")
    assert str(load.best) in (scaling.RESULTS / file).read_text().splitlines()[int(line) - 1]


def test_the_page_quotes_the_table(scaling):
    """Every row of numbers in docs/scaling.md is in results/scaling.md."""
    written = (scaling.RESULTS / "scaling.md").read_text().splitlines()
    quoted = [line for line in (ROOT / "docs" / "scaling.md").read_text().splitlines() if line.startswith("| 1")]
    assert len(quoted) == 18 and set(quoted) <= set(written)


def test_the_file_is_what_the_script_writes(scaling, monkeypatch):
    """Except for the memory planner's numbers, which have their own tests."""
    table = importlib.import_module("scaling_table")
    monkeypatch.setattr(table, "memory_gib", lambda model, kind: 50.0)
    text = (scaling.RESULTS / "scaling.md").read_text()
    fresh = "\n".join(table.lines())
    assert _without_memory(fresh) == _without_memory(text)


def _without_memory(text):
    return [line for line in text.splitlines() if "| NF4 |" not in line and "| bfloat16 |" not in line]
