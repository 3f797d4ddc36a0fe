"""The report's first table: a row for each stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trl_rlaif.recipe.sections import STAGES
from trl_rlaif.report.formatting import count, label, number, percent, reasons, section
from trl_rlaif.report.run_data import Run

_OPTIONAL = ("sft", "judge")


@dataclass(frozen=True)
class StageRow:
    """A row in the table of stages."""

    name: str
    state: str
    did: str
    skipped: str
    seconds: float | None


def stage_rows(run: Run) -> list[StageRow]:
    """A row for each stage; optional stages only if the recipe has them or they left output."""
    rows = []
    for stage in STAGES[:-1]:  # without the report itself
        result = section(run.results, stage)
        started = _evidence(run, stage)
        if stage in _OPTIONAL and not (result or started or stage in run.recipe):
            continue
        state = "done" if result else ("ran" if stage == "sft" else "not finished") if started else "not run"
        did = _did(stage, result) if result else started
        if stage == "sample" and state == "not run" and section(run.recipe, "data").get("pairs"):
            did = "pairs from data.pairs"
        skipped = reasons(result.get("dropped" if stage == "sample" else "skipped"))
        did = ", ".join(filter(None, (did, _asked(section(result, "usage")))))
        rows.append(StageRow(stage, state, did, skipped, number(result.get("seconds"))))
    return rows


def _evidence(run: Run, stage: str) -> str:
    """Output in the folder of a stage without final results."""
    if stage == "label" and run.labels.total:
        return count(run.labels.total, "label") + " written"
    if stage == "sample" and run.pairs and not section(run.recipe, "data").get("pairs"):
        return count(run.pairs, "pair") + " written"
    if stage == "evaluate" and run.samples:
        return count(len(run.samples), "sample") + " written"
    steps = {step for points in run.series.get(stage, {}).values() for step, _ in points}
    return count(len(steps), "step") + " logged" if steps else ""


def _asked(usage: dict[str, Any]) -> str:
    """Token usage of judges on servers."""
    tokens, cost = [number(usage.get(key)) for key in ("input_tokens", "output_tokens")], number(usage.get("cost"))
    if None in tokens:
        return ""
    return f"{count(sum(tokens), 'token')} (judges on servers)" + ("" if cost is None else f", cost {cost:.4g}")


def _did(stage: str, result: dict[str, Any]) -> str:
    def amount(key: str, one: str) -> str:
        return count(number(result.get(key)), one)

    if stage == "sample":
        redrawn = number(result.get("redrawn"))
        again = f"{count(redrawn)} redrawn" if redrawn else ""
        share = number(result.get("ended"))
        ended = f"{percent(share)} of the responses ended with a stop token" if share is not None else ""
        parts = [amount("prompts", "prompt"), amount("pairs", "pair"), again, ended]
    elif stage == "judge":
        held_out, used = number(result.get("held_out")), result.get("used") is True
        parts = [amount("taught", "pair"), f"{count(held_out)} held out" if held_out is not None else ""]
        parts.append("" if used else "adapter not used")
    elif stage == "label":
        confidence = number(result.get("mean_confidence"))
        labeled, pairs = number(result.get("labeled")), number(result.get("pairs"))
        known = labeled is not None and pairs is not None
        parts = [
            f"{count(labeled)} of {count(pairs, 'pair')}" if known else count(labeled, "pair"),
            f"mean confidence {percent(confidence)}" if confidence is not None else "",
        ]
    elif stage == "reward":
        held_out = number(result.get("eval_pairs"))
        parts = [amount("train_pairs", "pair"), f"{count(held_out)} held out" if held_out is not None else ""]
    elif stage == "rl":
        parts = [amount("updates", "update"), amount("episodes", "response")]
    elif stage == "evaluate":
        sets = section(result, "sets")
        parts = [
            f"{label(name, 30)}: {count(number(section(values).get('prompts')), 'prompt')}"
            for name, values in list(sets.items())[:8]
        ]
    else:
        parts = []
    return ", ".join(part for part in parts if part)
