"""A run folder as the first version left it: its original text files, and markers in its format.

The numbers come from a run of ``write_recipe`` with the sections below on the tiny model. Weights are placeholders:
completed stages do not read them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import yaml

from helpers.recipes import write_recipe
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.recipe import prompt_folder

FILES = Path(__file__).parents[1] / "pipeline" / "first_version"
SECTIONS = {
    "sft": {"data": "sft.jsonl", "max_steps": 2, "per_device_train_batch_size": 2},
    "label": {"labeler": {"distilled": {"debias": "mean_prob"}}},
    "reward": {"num_train_epochs": 1},
    "rl": {"total_episodes": 8, "learning_rate": 1e-2},
}
STAGES = ("sft", "sample", "label", "reward", "rl", "evaluate", "report")
WEIGHTS = ("sft", "preferences", "reward", "policy", "checkpoints/sft", "checkpoints/reward", "checkpoints/rl")


def write_first_version(base: Path, model: str, **sections: object) -> tuple[Path, Path]:
    """Returns (recipe, run folder); ``sections`` change the run's recipe, as in ``write_recipe``."""
    rows = [{"prompt": f"what is {i}?", "completion": " a city"} for i in range(4)]
    (base / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = write_recipe(base, model, **SECTIONS, **sections)
    out = base / "out"
    (out / ".state").mkdir(parents=True)
    for file in FILES.iterdir():
        text = file.read_text(encoding="utf-8").replace("{folder}/model", model).replace("{folder}", str(base))
        (out / file.name).write_text(text, encoding="utf-8")
    for name in WEIGHTS:
        (out / name).mkdir(parents=True)
        (out / name / "weights").write_text(name)
    saved = yaml.safe_load((out / "recipe.yaml").read_text())
    for stage, section in sections.items():
        saved[stage] |= section
    (out / "recipe.yaml").write_text(yaml.safe_dump(saved, sort_keys=False))
    prints = fingerprints(saved)
    for stage, fingerprint in prints.items():
        text = json.dumps({"fingerprint": fingerprint, "complete": True})
        (out / ".state" / f"{stage}.json").write_text(text)
    (out / ".state" / "progress.json").write_text(json.dumps({"stages": prints, "outcome": "done"}))
    return recipe, out


def fingerprints(saved: dict) -> dict[str, str]:
    """The first version's fingerprints for this recipe, in which only label has a judge prompt."""
    common = [{name: saved[name] for name in ("run", "model", "data")} | {"run": {"seed": saved["run"]["seed"]}}]
    common += [{key: _content(value) for key, value in saved["data"].items() if isinstance(value, str)}]
    before, found = json.dumps(common, sort_keys=True, default=str), {}
    for stage in STAGES:
        section = {k: v for k, v in saved[stage].items() if not k.startswith("track_") and k != "stop_on_forgetting"}
        files = {"sft": [_content(saved["sft"]["data"])], "label": [_revision(saved["label"]["prompt"])]}
        text = json.dumps([section, files.get(stage, [])], sort_keys=True, default=str)
        before = hashlib.sha256(f"{before}\n{stage}\n{text}".encode()).hexdigest()
        found[stage] = before
    return found


def _revision(prompt: str) -> str:
    return JudgePrompt.load(prompt_folder(prompt)).revision


def _content(path: str) -> str | None:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else None
