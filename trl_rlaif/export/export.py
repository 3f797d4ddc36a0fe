"""Exports what a run has trained: adapter or whole model, tokenizer and model card."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from trl_rlaif.errors import UserError
from trl_rlaif.export.card import LICENSE, model_card
from trl_rlaif.files import to_json, write_folder
from trl_rlaif.models.loading import hub_id
from trl_rlaif.pipeline.trained import Trained, What, find_trained
from trl_rlaif.report.run_data import read_run

_CARD = "README.md"
_ADAPTER_CONFIG = "adapter_config.json"
# PEFT's own card, which names this machine's folders, and the states of transforms, which this library alone reads.
_LEFT_OUT = (_CARD, "*.pt")


@dataclass(frozen=True)
class ExportOptions:
    """How a model leaves a run.

    Args:
        merge: As a whole model, in which base and adapter are one; else as a PEFT adapter.
        output: The new folder; None writes one below the run's, or, with a ``repo``, none.
        repo: A repository of the Hub's that it is pushed to.
        public: Whether a repository that is made for it is.
        base: The base's Hub id, for others, where the run read it from a file.
    """

    merge: bool = False
    output: Path | None = None
    repo: str | None = None
    public: bool = False
    base: str | None = None


@dataclass(frozen=True)
class Exported:
    """Where it is now.

    Args:
        folder: None where it was only pushed.
        url: Its page on the Hub; None where it was not pushed.
        base: The base's Hub id; None where others have no way to find it.
        difference: Of a merged model: the largest relative difference between what it answers and what base and
            adapter do.
    """

    folder: Path | None
    url: str | None
    base: str | None
    difference: float | None


def export_model(folder: str | Path, what: What, options: ExportOptions | None = None) -> Exported:
    """Write or push what a run has trained, with a model card.

    Args:
        folder: The run's.
        what: The policy, the reward model or the judge.
        options: How.

    Raises:
        UserError: There is no such model, the output folder is in use, nobody else could load the result, or the Hub
            refuses it.
        RunError: The Hub cannot be reached, or the merged model would answer otherwise.
    """
    options = options or ExportOptions()
    trained = find_trained(folder, what)
    run, base = read_run(Path(folder)), options.base or hub_id(trained.base.path)
    output = options.output or (None if options.repo else default_folder(folder, what, merge=options.merge))
    if output is not None and output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        raise UserError("This path already exists.", where=str(output), fix="Remove it, or choose another --output.")
    if options.repo and base is None and not options.merge:
        raise UserError(
            f"The adapter needs the base {trained.base.path}, which others do not have.",
            where="--to hub",
            fix="Name the same model on the Hub with --base, or push the whole model with --merge.",
        )
    repo = None
    if options.repo:  # first of all: what it refuses should cost nothing
        from trl_rlaif.export.hub import HubRepo

        repo = HubRepo(options.repo, public=options.public)
    kept = {key: value for key, value in (repo.card() if repo else {}).items() if key in LICENSE}
    found: list[float] = []

    def write(place: Path) -> None:
        if options.merge:
            from trl_rlaif.export.merging import write_merged

            found.append(write_merged(trained, place))
        else:
            _copy_adapter(trained, place, base)
        model_card(run, trained, base=base, merged=options.merge, keep=kept).save(place / _CARD)

    with tempfile.TemporaryDirectory() as temporary:
        place = output or Path(temporary) / what
        write_folder(place, write)
        url = repo.push(place, f"{run.name}: {what}") if repo else None
    return Exported(output, url, base, next(iter(found), None))


def default_folder(folder: str | Path, what: What, *, merge: bool) -> Path:
    """Where an export is written that names no place: below the run's own folder."""
    from trl_rlaif.pipeline.artifacts import EXPORTS

    return Path(folder) / EXPORTS / (f"{what}-merged" if merge else what)


def _copy_adapter(trained: Trained, folder: Path, base: str | None) -> None:
    """The adapter as the run wrote it, but with a name of its base that others know."""
    shutil.copytree(trained.path, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_LEFT_OUT))
    path = folder / _ADAPTER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    if base is not None:
        path.write_text(to_json(config | {"base_model_name_or_path": base}, indent=2), encoding="utf-8")
