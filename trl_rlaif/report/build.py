"""Puts the page together and writes it into the run's folder."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

from trl_rlaif.errors import RunError
from trl_rlaif.report import doubts, findings, wording
from trl_rlaif.report.content import MAX_SAMPLES, Run, read_run, spread
from trl_rlaif.report.figures import label_part, reward_part, rl_part, set_part, sft_part
from trl_rlaif.report.rehearsal_figures import rehearsal_part
from trl_rlaif.report.score_figures import score_part

_HERE = Path(__file__).parent
PREVIEW_CHARACTERS = 700


def write_report(folder: str | Path) -> Path:
    """Build ``report.html`` from a run's folder, whatever stages it holds, and return its path.

    The file is replaced in one step: a kill leaves the old page or the new one. The same folder gives the
    same bytes.

    Raises:
        UserError: ``folder`` is not a run's folder.
        RunError: The page cannot be written there.
    """
    folder = Path(folder)
    page = _render(read_run(folder)).encode("utf-8")
    path = folder / "report.html"
    draft = folder / f".report.html.{os.getpid()}"
    try:
        draft.write_bytes(page)
        os.replace(draft, path)
    except OSError as error:
        raise RunError(
            f"The report cannot be written: {error.strerror or error}.",
            where=str(path),
            fix="Check the folder's permissions and the space left on its disk.",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
    return path


def _render(run: Run) -> str:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE, encoding="utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # The last guard: no text reaches the page with a character that a parser may refuse.
        finalize=lambda value: wording.clean(value) if type(value) is str else value,
    )
    environment.filters.update(
        count=wording.count, percent=wording.percent, score=wording.score, duration=wording.duration
    )
    script = (_HERE / "filter.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = environment.get_template("template.html.jinja")
    return template.render(script=Markup(script), script_hash=digest, **_page(run))


def _page(run: Run) -> dict[str, Any]:
    """Every value that the template shows."""
    sets = findings.set_results(run)
    samples = spread(run.samples, MAX_SAMPLES)
    return {
        "run": run,
        "subtitle": _subtitle(run),
        "summary": findings.summary(run, sets),
        "results": max(len(sets), 1),
        "sets": sets,
        "caveat": doubts.judge_caveat(run),
        "warnings": doubts.warnings(run, sets),
        "stages": findings.stage_rows(run),
        "sft": sft_part(run),
        "labels": label_part(run),
        "reward": reward_part(run),
        "scores": score_part(run),
        "rl": rl_part(run),
        "rehearsal": rehearsal_part(run),
        "held_out": [set_part(run, name) for name in _set_names(run)],
        "samples": samples,
        "sample_sets": sorted({sample.set for sample in samples}),
        "sample_categories": sorted({sample.category for sample in samples}),
        "preview": PREVIEW_CHARACTERS,
        "versions": [
            (wording.label(key), wording.label(value)) for key, value in wording.section(run.recipe, "versions").items()
        ],
        "seed": wording.label(wording.section(run.recipe, "run").get("seed")),
        "command": wording.label(run.recipe.get("command"), 2000),
    }


def _subtitle(run: Run) -> str:
    model = wording.label(wording.section(run.recipe, "model").get("path"), 120)
    return " · ".join(part for part in (model, findings.model_settings(run)) if part)


def _set_names(run: Run) -> list[str]:
    """The evaluated sets in the order of results.json, then others of samples.jsonl; at most 12."""
    named = [wording.label(name) or "held-out" for name in wording.section(run.results, "evaluate", "sets")]
    sampled = [sample.set for sample in run.samples]
    return list(dict.fromkeys(named + sampled))[:12]
