"""A record of `gpu.py` as plain text."""

from __future__ import annotations

from typing import Any

_PHASES = ("generation", "forwards", "update", "total")
_MEMORY = ("allocated", "reserved", "on_card", "resident")
# Our phases, and their names in the memory plan.
_PLANNED = {"generation": "generation", "forwards": "scoring", "update": "update"}


def describe(record: dict[str, Any]) -> list[str]:
    """Lines for a reader: seconds and GiB of each side, their ratio, and the prediction."""
    setting, machine = record["setting"], record["machine"]
    sides = [side for side in record if side == "ours" or side.startswith("stock-")]
    memory = [name for name in _MEMORY if any(name in record[side]["gib"] for side in sides)]
    where = machine.get("gpu") or f"{machine['cores']} cores"
    card = f", as a card of {setting['card_gb']} GB" if setting["card_gb"] else ""
    padded = ", prompts padded" if setting.get("padded") else ""
    lines = [
        "",
        f"{setting['size']} (like {setting['like']}), {setting['recipe']}, batch {setting['batch']} x "
        f"({setting['prompt_tokens']} + {setting['response_tokens']}) tokens{padded}, {where}{card}",
        _row("", [*(f"{phase}, s" for phase in _PHASES), *(f"{name}, GiB" for name in memory)]),
    ]
    for side in sides:
        found = record[side]
        cells = [found.get("seconds", {}).get(phase) for phase in _PHASES]
        lines.append(_row(side, [*cells, *(found["gib"].get(name) for name in memory)]) + _ended(found))
    for side, ratio in record["ratio"].items():
        seconds = [None, None, None, ratio["seconds"]]
        lines.append(_row(f"{side} / ours", [*seconds, *(ratio.get(name) for name in memory)]))
    return lines + _ablated(record.get("ours", {})) + _predicted(record.get("ours", {}))


def _ablated(ours: dict[str, Any]) -> list[str]:
    lines = []
    for update in ours.get("ablation", [])[1:]:
        peaks = update["gib_by_phase"]
        phases = " ".join(
            f"{phase} {peaks[phase]:.2f}" for phase in ("generation", "forwards", "update") if phase in peaks
        )
        name = f"  without {update['without']}" if update["without"] else "  with all"
        lines.append(f"{name:<34}" + "".join(f"{update['seconds'].get(p, 0):9.2f}" for p in _PHASES) + f"  {phases}")
    return lines


def _ended(found: dict[str, Any]) -> str:
    if "error" not in found:
        return ""
    return f"  {found['error']} after {len(found.get('updates', []))} updates"


def _predicted(ours: dict[str, Any]) -> list[str]:
    if "predicted_gib" not in ours:
        return []
    lines = [f"Predicted to be allocated: {ours['predicted_gib']:.2f} GiB"]
    if "measured_over_predicted" in ours:
        ratio = ours["measured_over_predicted"]
        verdict = "within 10%" if abs(ratio - 1) <= 0.1 else "not within 10%"
        lines[0] += f"; measured / predicted: {ratio:.3f} ({verdict})"
    for phase, planned in _PLANNED.items():
        parts = [size for name, size in ours["predicted_gib_by_phase"].items() if name.startswith(planned)]
        measured = ours.get("gib_by_phase", {}).get(phase)
        if measured is not None and parts:
            lines.append(f"  {phase:<12}{measured:8.2f} measured{max(parts):8.2f} predicted")
    return lines


def _row(name: str, cells: list[Any]) -> str:
    texts = (cell if isinstance(cell, str) else "" if cell is None else f"{cell:.2f}" for cell in cells)
    return f"{name:<18}" + "".join(f"{text:>16}" for text in texts)
