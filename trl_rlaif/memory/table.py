"""A plan in plain text."""

from __future__ import annotations

from trl_rlaif.memory.counting import ModelShape
from trl_rlaif.memory.gpus import CARDS, TRAINED, Advice, advise, raises
from trl_rlaif.memory.plan import ALWAYS, CONTEXT_BYTES, MARGIN, MemoryPlan, load_config, plan_memory
from trl_rlaif.recipe import Recipe

_WIDTH = 72
_UNMEASURED = [
    "* not measured on a GPU: counted, and compared with tensors on a CPU; the others were within 10% on one H100",
    "  (benchmarks/results/gpu.md)",
]


def describe(recipe: Recipe, gpu: int | None = None) -> str:
    """Output of ``trl-rlaif memory``: parts, stages, peak and GPUs; for a comparison, of the variant that needs most.

    Args:
        recipe: The recipe.
        gpu: The size of the GPU in GB; None: all common sizes.

    Raises:
        UserError: The model's configuration cannot be read, or does not suit the recipe.
    """
    shape = ModelShape.from_config(load_config(recipe.model.path))
    if recipe.variants:
        name = max(recipe.variants, key=lambda name: plan_memory(recipe.variants[name], shape).peak)
        return f"The variant that needs most: {name}\n\n{describe(recipe.variants[name], gpu)}"
    plan = plan_memory(recipe, shape)
    lines = [f"{recipe.model.path}: {shape.numel / 1e9:.2f} billion parameters, {shape.layers} layers", ""]
    lines += _peak_stage(plan) + [""] + _all_phases(plan) + [""]
    cards = CARDS if gpu is None else (gpu,)
    advice = advise(recipe, shape, plan, cards)
    lines += [_card(of) for of in advice]
    if all(of.fits for of in advice) and (higher := raises(recipe, shape, cards[0])):
        lines += ["", f"A card of {cards[0]} GB has room for each of these by itself:", *(f"  {of}" for of in higher)]
    notes = [*plan.notes, *_checkpointing(recipe)]
    if notes:
        lines += ["", *notes]
    return "\n".join(lines)


def _checkpointing(recipe: Recipe) -> list[str]:
    """A line on the stages whose recipe does not set gradient checkpointing."""
    sections = {name: getattr(recipe, name) for name in TRAINED}
    unset = [name for name, section in sections.items() if section and "gradient_checkpointing" not in section.config]
    if not unset:
        return []
    return [f"Planned with gradient checkpointing in {', '.join(unset)}; a run does without where there is room."]


def _peak_stage(plan: MemoryPlan) -> list[str]:
    """All parts allocated at the peak, and their sum."""
    stage, phase = plan.largest
    lines = [f"{f'At the peak, in {stage}, {phase}':<{_WIDTH}}{'GiB':>8}"]
    parts = [part for part in plan.parts if part.stage == stage and part.when in (ALWAYS, phase)]
    lines += [_line(part.name, part.bytes) for part in parts if not part.paged]
    lines += [
        _line("CUDA context and kernels", CONTEXT_BYTES),
        _line(f"fragmentation, {MARGIN:.0%} of what is allocated", plan.margin),
        _line("peak", plan.peak, indent=""),
    ]
    paged = [_line(part.name, part.bytes) for part in parts if part.paged]
    return lines + (["beside it, in memory that moves to the CPU when room is short", *paged] if paged else [])


def _all_phases(plan: MemoryPlan) -> list[str]:
    """Memory allocated by each phase; a star marks those not confirmed on a GPU."""
    lines = [f"{'Allocated by phase':<{_WIDTH}}{'GiB':>8}"]
    for stage, phase in plan.phases():
        lines.append(_line(f"{stage}, {phase}", plan.predict(phase, stage)) + ("" if stage in plan.measured else " *"))
    return lines + (_UNMEASURED if any(stage not in plan.measured for stage, _ in plan.phases()) else [])


def _card(advice: Advice) -> str:
    start = f"{advice.card:>4} GB  "
    if advice.fits:
        return f"{start}fits"
    if not advice.settings:
        return f"{start}too small, with all settings that were tried"
    return f"{start}fits with " + " ".join(f"--set {setting}" for setting in advice.settings)


def _line(name: str, size: int, *, indent: str = "  ") -> str:
    return f"{indent + name:<{_WIDTH}}{size / 2**30:>8.2f}"
