"""Exports a trained model: adapter or merged model, tokenizer and model card."""

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
# PEFT's own card, which contains this machine's paths, and states of transforms, which only this library reads.
_LEFT_OUT = (_CARD, "*.pt")


@dataclass(frozen=True)
class ExportOptions:
    """How to export a model.

    Args:
        merge: Merge the adapter into the base; otherwise, export a PEFT adapter.
        output: The new folder; None: one below the run's folder, or, with a ``repo``, none.
        repo: Hub repository to push to.
        public: Make a new repository public.
        base: The base's Hub id, for other users, if the run loaded it from a local path.
    """

    merge: bool = False
    output: Path | None = None
    repo: str | None = None
    public: bool = False
    base: str | None = None


@dataclass(frozen=True)
class Exported:
    """Result of an export.

    Args:
        folder: The folder; None if it was only pushed.
        url: Its page on the Hub; None if it was not pushed.
        base: The base's Hub id; None if unknown, so that others cannot find the base.
        difference: For a merged model, the relative difference between its outputs and those of base and adapter.
    """

    folder: Path | None
    url: str | None
    base: str | None
    difference: float | None


def export_model(folder: str | Path, what: What, options: ExportOptions | None = None) -> Exported:
    """Write or push a trained model, with a model card.

    Args:
        folder: The run's folder.
        what: The policy, the reward model or the judge.
        options: How to export it; None: the defaults.

    Raises:
        UserError: There is no such model, the output path exists, nobody else could load the result, or the Hub
            rejects it.
        RunError: The Hub cannot be reached, or the merged model's outputs differ.
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
    if options.repo:  # first, so that no work is lost if the Hub rejects it
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
    """Default folder of an export: below the run's folder."""
    from trl_rlaif.pipeline.artifacts import EXPORTS

    return Path(folder) / EXPORTS / (f"{what}-merged" if merge else what)


def _copy_adapter(trained: Trained, folder: Path, base: str | None) -> None:
    """Copy the adapter, with the base's Hub id in its configuration, if there is one."""
    shutil.copytree(trained.path, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_LEFT_OUT))
    path = folder / _ADAPTER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    if base is not None:
        path.write_text(to_json(config | {"base_model_name_or_path": base}, indent=2), encoding="utf-8")
