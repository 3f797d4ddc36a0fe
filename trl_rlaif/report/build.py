"""Assembles the report and writes it to the run's folder."""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_rlaif.pipeline import artifacts
from trl_rlaif.recipe.variants import KEY as COMPARE
from trl_rlaif.report import formatting, summary, warnings
from trl_rlaif.report.experiments import comparison_page
from trl_rlaif.report.figures import reward_part, rl_part, set_part, sft_part
from trl_rlaif.report.files import write_page, write_plots
from trl_rlaif.report.judge_figures import judge_part, judged_sets
from trl_rlaif.report.label_figures import label_part
from trl_rlaif.report.markdown import markdown
from trl_rlaif.report.no_learning import signs_of_no_learning
from trl_rlaif.report.parsing import spread
from trl_rlaif.report.rehearsal_figures import rehearsal_part
from trl_rlaif.report.round_figures import rounds_part
from trl_rlaif.report.run_data import MAX_SAMPLES, Run, read_run
from trl_rlaif.report.runs import runs_page
from trl_rlaif.report.sampled import sampler_part
from trl_rlaif.report.score_figures import score_part
from trl_rlaif.report.stage_rows import stage_rows
from trl_rlaif.report.teaching_figures import teaching_part

if TYPE_CHECKING:
    import jinja2

    from trl_rlaif.experiments.runs import Comparison

_HERE = Path(__file__).parent
_RUN, _COMPARISON, _RUNS = "run.html.jinja", "experiments.html.jinja", "runs.html.jinja"


def write_report(folder: str | Path) -> Path:
    """Build ``report.html`` from a run's or a comparison's folder, complete or not, and return its path.

    ``report.md``, next to it, is a summary; the folder ``report`` gets every plot of the page as SVG and PNG. The page
    and the folder are each replaced atomically: a kill leaves the old or the new one. The same run gives the same
    bytes.

    Raises:
        UserError: ``folder`` is not a run's folder.
        RunError: The page or the plots cannot be written.
    """
    folder = Path(folder)
    run, path = read_run(folder), folder / artifacts.REPORT
    compared = COMPARE in run.recipe
    page = comparison_page(run, folder) if compared else run_page(run)
    write_page(path, render(page, _COMPARISON if compared else _RUN))
    write_page(folder / artifacts.SUMMARY, markdown(page))
    write_plots(folder / artifacts.PLOTS, page)
    return path


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the page that compares several runs, as one self-contained file.

    Raises:
        RunError: It cannot be written.
    """
    write_page(path, render(runs_page(comparison), _RUNS))


def render(page: dict[str, Any], name: str = _RUN) -> str:
    """The HTML of a page: the template ``name``, filled with the values of ``page``."""
    from markupsafe import Markup

    script = (_HERE / "filter.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _environment().get_template(name).render(script=Markup(script), script_hash=digest, **page)


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE, encoding="utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # The last guard: no text on the page contains a character that a parser may reject.
        finalize=lambda value: formatting.clean(value) if type(value) is str else value,
    )
    environment.filters.update(
        count=formatting.count, percent=formatting.percent, score=formatting.score, duration=formatting.duration,
        preferred=formatting.preferred,
    )  # fmt: skip
    return environment


def run_page(run: Run) -> dict[str, Any]:
    """All values of the template."""
    sets, judged = summary.set_results(run), judged_sets(run)
    samples = spread(run.samples, MAX_SAMPLES)
    return {
        **summary.page_head(run),
        "summary": summary.summary(run, sets),
        "results": max(len(sets), 1),
        "sets": sets,
        "caveat": warnings.judge_caveat(run),
        "no_learning": signs_of_no_learning(run),
        "warnings": warnings.warnings(run, sets, judged),
        "stages": stage_rows(run),
        "sft": sft_part(run),
        "rounds": rounds_part(run),
        "teaching": teaching_part(run),
        "labels": label_part(run),
        "reward": reward_part(run),
        "scores": score_part(run),
        "rl": rl_part(run),
        "rehearsal": rehearsal_part(run),
        "judges": judge_part(judged),
        "held_out": [set_part(run, name) for name in _set_names(run)],
        "sampler": sampler_part(run.recipe, run.results, run.sampled, len(run.labels.confidences), run.labels.second),
        "samples": samples,
        "sample_sets": sorted({sample.set for sample in samples}),
        "sample_categories": sorted({sample.category for sample in samples}),
    }


def _set_names(run: Run) -> list[str]:
    """The evaluated sets in the order of results.json, then others from samples.jsonl; at most 12."""
    named = [formatting.label(name) or "held-out" for name in formatting.section(run.results, "evaluate", "sets")]
    sampled = [sample.set for sample in run.samples]
    return list(dict.fromkeys(named + sampled))[:12]
