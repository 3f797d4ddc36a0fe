"""Finds a run's trained models in its folder: the adapter, its base, and the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trl_rlaif.chat_templates import dated, has_date
from trl_rlaif.encoding import set_template_kwargs
from trl_rlaif.errors import UserError
from trl_rlaif.files import read_state
from trl_rlaif.models.loading import ModelSpec, load_tokenizer
from trl_rlaif.pipeline import artifacts, digests
from trl_rlaif.pipeline.lineage import runs_from
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.stages import STAGES
from trl_rlaif.recipe.variants import KEY as COMPARE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

What = Literal["policy", "reward", "judge"]
NOUNS: dict[What, str] = {"policy": "policy", "reward": "reward model", "judge": "judge"}
# The stage that trains each, and the adapter's folder.
_MADE: dict[What, tuple[str, str]] = {
    "policy": ("rl", artifacts.POLICY),
    "reward": ("reward", artifacts.REWARD),
    "judge": ("judge", artifacts.JUDGE),
}


@dataclass(frozen=True)
class Trained:
    """An adapter trained by a run.

    Args:
        what: Which model.
        path: Its folder, with the tokenizer.
        base: Its base model, with the run's dtype.
        template_kwargs: The run's variables for the chat template.
        day: The run's date, for chat templates that state the date; None: not stored.
        used: For a judge: whether the run found that the adapter helps.
    """

    what: What
    path: Path
    base: ModelSpec
    template_kwargs: dict[str, Any]
    day: date | None
    used: bool = True

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, which encodes prompts as in the run."""
        tokenizer = load_tokenizer(str(self.path))
        if self.day is not None and has_date(tokenizer):
            tokenizer.chat_template = dated(tokenizer.chat_template, self.day)
        return set_template_kwargs(tokenizer, self.template_kwargs)


def find_trained(folder: str | Path, what: What) -> Trained:
    """Find a model trained by a run.

    Args:
        folder: The run's folder; that of a run in rounds has the last round's models.
        what: The policy, the reward model or the judge.

    Raises:
        UserError: There is no run, or a comparison; the stage is missing, has not completed or made no adapter; or its
            files have changed.
    """
    if not (Path(folder) / artifacts.RECIPE).is_file():
        fix = "Name the folder that `trl-rlaif run` wrote."
        raise UserError("This is not a run's folder: it has no recipe.yaml.", where=str(folder), fix=fix)
    own = RunFolder(folder)
    recipe = own.recipe()
    if COMPARE in recipe:
        places = " or ".join(str(path) for path in sorted((own / artifacts.VARIANTS).glob("*")))
        fix = f"Name one of them: {places}."
        raise UserError("This is a comparison; each variant is a run of its own.", where=str(folder), fix=fix)
    (stage, name), runs = _MADE[what], runs_from(str(own.path))
    # A run that continues another one uses that one's judge.
    run = next((run for run in ([own, *runs] if what == "judge" else [own]) if run.is_complete(stage)), None)
    if run is None:
        state = "has not completed" if stage in recipe else "is not part of this run"
        raise UserError(f"The stage '{stage}', which trains the {NOUNS[what]}, {state}.", where=str(folder))
    digests.check(run, [STAGES[stage]], companions=False)
    numbers = run.results_of(stage)
    if not (run / name).is_dir():
        raise UserError(f"The judge was taught nothing: {numbers.get('reason')}.", where=str(run.path))
    model = run.recipe()["judge"]["model"] if what == "judge" else "same"
    return _trained(what, run, model if isinstance(model, dict) else recipe["model"], _day([*reversed(runs), own]))


def _trained(what: What, run: RunFolder, model: dict[str, Any], day: date | None) -> Trained:
    dtype = model["dtype"]
    if dtype == "auto":
        dtype = run.recipe().get("machine", {}).get("dtype", "auto")
    return Trained(
        what=what,
        path=run / _MADE[what][1],
        base=ModelSpec(model["path"], dtype, model["quantization"]),
        template_kwargs=model.get("chat_template_kwargs") or {},
        day=day,
        used=run.results_of("judge").get("used", False) if what == "judge" else True,
    )


def _day(runs: list[RunFolder]) -> date | None:
    """The date of the first run that stored one."""
    for run in runs:
        if found := read_state(run.state / artifacts.DATE, "Chat templates that tell the date need it."):
            return date.fromisoformat(found["date"])
    return None
