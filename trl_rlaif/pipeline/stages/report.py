"""The stage report: one page from the other stages' outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.stage import Stage
from trl_rlaif.recipe.sections import STAGES

if TYPE_CHECKING:
    from trl_rlaif.recipe import Recipe


class Report(Stage):
    """An HTML page, a Markdown summary, and plots."""

    name = "report"
    outputs = (artifacts.REPORT, artifacts.SUMMARY, artifacts.PLOTS)
    always = True
    alone = True

    def settings(self, recipe: Recipe) -> tuple[str, ...]:
        return ()

    def after(self, recipe: Recipe) -> tuple[str, ...]:
        return tuple(name for name in STAGES if name != self.name)
