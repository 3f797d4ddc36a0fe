"""Writes a first recipe from four answers: the model, the prompts, the GPU and the goal."""

from __future__ import annotations

import json
import os
import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from trl_rlaif.data.overlap import prompt_key, split_by_group
from trl_rlaif.errors import UserError
from trl_rlaif.files import write_atomically

if TYPE_CHECKING:
    from trl_rlaif.plugins import Plugins
    from trl_rlaif.recipe import Recipe

Goal = Literal["labels", "dpo", "ppo", "grpo"]
GOALS: dict[str, str] = {
    "labels": "Have the judge label pairs of the model's responses",
    "dpo": "Train the model on the judge's preferences with DPO",
    "ppo": "Train a reward model on the judge's preferences, and the model on it with PPO",
    "grpo": "Train the model on the judge's ratings with GRPO, without a reward model",
}
# Prompts held out for evaluation: their fraction and maximum number; and the fewest prompts of a file that is split.
_HELD_OUT, _MOST_HELD_OUT, _FEWEST = 0.1, 200, 20

Sections = dict[str, dict[str, Any]]

_ABOUT = {
    "sample": "two responses to each prompt, from the initial policy",
    "label": "the judge compares them, in both orders",
    "reward": "a reward model: an adapter and a score head on the same base",
    "rl": "what trains the policy",
    "evaluate": "the trained policy against the initial one, on held-out prompts",
    "report": "report.html and report.md",
}
_COMMENTS = {
    ("model", "quantization"): "nf4: the frozen base in 4 bits; none: as dtype says",
    ("model", "lora"): "adapters on all linear layers, one set per role",
    ("label", "judge"): "the model itself; a larger one: {path: ..., quantization: nf4}",
    ("label", "prompt"): "what the judge is asked: a packaged prompt or your own folder",
    ("reward", "per_device_train_batch_size"): "pairs, so twice as many sequences",
    ("rl", "rewards"): "what a response is worth",
    ("rl", "per_device_train_batch_size"): "short of memory? Halve it and double the next key: only time changes",
    ("rl", "total_episodes"): "responses in all; a longer training needs more",
    ("rl", "max_prompt_length"): "longer prompts are left out",
    ("rl", "response_length"): "longest response in tokens",
    ("rl", "kl_coef"): "price of drifting from the initial policy",
    ("rl", "missing_eos_penalty"): "a response that is cut off loses this much",
    ("rl", "num_generations"): "responses to each prompt, which are compared with each other",
}


@dataclass(frozen=True)
class Answers:
    """Answers to the four questions.

    Args:
        model: A Hub id, a folder, or ``package:NAME``.
        data: A file of prompts, or a dataset's Hub id.
        gpu: GPU memory in GB; 0: no GPU.
        goal: One of GOALS.
    """

    model: str
    data: str
    gpu: int
    goal: Goal


def start(answers: Answers, path: Path, plugins: Plugins) -> list[str]:
    """Write a recipe that passes ``check`` and fits the GPU; return lines that say what to do with it.

    A .jsonl file of prompts is split at random into two files next to the recipe: a tenth is held out for evaluation.

    Raises:
        UserError: The file exists, the prompts cannot be read, or no such recipe fits the GPU.
    """
    if path.exists():
        raise UserError("This file already exists.", where=str(path), fix="Name another one, or remove it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    divided = _divided(answers, path)
    draft = path.with_name(f".{path.stem}.draft.yaml")
    try:
        for file, lines in divided.values():
            write_atomically(file, "".join(f"{line}\n" for line in lines))
        files = {key: file.name for key, (file, _) in divided.items()}
        sections = _sections(answers, path, files or {"prompts": _absolute(answers.data)})
        said = _fitted(answers, sections, draft, plugins)
    except BaseException:
        for file in (draft, *(file for file, _ in divided.values())):
            file.unlink(missing_ok=True)
        raise
    os.replace(draft, path)
    where = shlex.quote(str(path))
    first = f"{path}: {GOALS[answers.goal]}. {said}".rstrip()
    held_out = [
        f"{len(lines):,} prompts are held out for evaluation: {file}"
        for key, (file, lines) in divided.items()
        if key == "eval_prompts"
    ]
    return [first, *held_out, f"Next: trl-rlaif check {where}", f"      trl-rlaif run {where}"]


def _fitted(answers: Answers, sections: Sections, draft: Path, plugins: Plugins) -> str:
    """Write the draft with settings that fit the GPU, and return their predicted peak; modifies the sections."""
    recipe = _written(answers, sections, draft, plugins)
    if not answers.gpu:
        return ""
    from trl_rlaif.memory import ModelShape, advise, capacity, load_config, plan_memory

    try:
        shape = ModelShape.from_config(load_config(answers.model))
    except UserError:
        return "The model's configuration cannot be read here, so whether it fits the card is not known."
    if plan_memory(recipe, shape).peak > capacity(answers.gpu):
        sections["model"]["quantization"] = "nf4"
        recipe = _written(answers, sections, draft, plugins)
        [advice] = advise(recipe, shape, plan_memory(recipe, shape), [answers.gpu])
        if not advice.fits and not advice.settings:
            raise UserError(f"{answers.model} is too large for {answers.gpu} GB.", fix="Name a smaller model.")
        for setting in advice.settings:
            place, _, value = setting.partition("=")
            section, _, key = place.partition(".")
            sections[section][key] = yaml.safe_load(value)
        recipe = _written(answers, sections, draft, plugins)
    return f"Predicted peak: {plan_memory(recipe, shape).peak / 2**30:.1f} of {answers.gpu} GiB."


def _written(answers: Answers, sections: Sections, draft: Path, plugins: Plugins) -> Recipe:
    from trl_rlaif.recipe import parse_recipe

    write_atomically(draft, _text(answers, sections))
    return parse_recipe(draft, registry=plugins.registry)


def _sections(answers: Answers, path: Path, data: dict[str, str]) -> Sections:
    training = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
    length = {"max_prompt_length": 512, "response_length": 128, "temperature": 0.9}
    rl: dict[str, dict[str, Any]] = {
        "dpo": {"algorithm": "dpo", **training, "kl_coef": 0.1, "learning_rate": 2e-5},
        "ppo": {"algorithm": "ppo", "rewards": ["reward"], "total_episodes": 4096, **training, **length,
                "num_ppo_epochs": 1, "kl_coef": 0.05, "missing_eos_penalty": 1.0, "learning_rate": 5e-5},
        "grpo": {"algorithm": "grpo", "rewards": ["direct"], "total_episodes": 4096, **training, "num_generations": 4,
                 "response_length": 128, "temperature": 0.9, "kl_coef": 0.05, "learning_rate": 1e-4},
    }  # fmt: skip
    sections: Sections = {
        "run": {"name": path.stem},
        "model": {"path": answers.model, "dtype": "bfloat16" if answers.gpu else "float32", "quantization": "none",
                  "lora": {"r": 16, "alpha": 32}},
        "data": dict(data),
    }  # fmt: skip
    if answers.goal != "grpo":
        sections["sample"] = {"num_responses": 2, "max_new_tokens": 128, "batch_size": 32}
        sections["label"] = {"labeler": {"distilled": {"debias": "mean_logit"}}, "judge": "same", "prompt": "general",
                             "batch_tokens": 4096}  # fmt: skip
    if answers.goal == "ppo":
        sections["reward"] = training | {"per_device_train_batch_size": 4, "learning_rate": 2e-4}
    if answers.goal in rl:
        sections["rl"] = rl[answers.goal]
    if answers.goal in rl and "eval_prompts" in sections["data"]:
        sections["evaluate"] = {"temperature": 0.9, "batch_size": 32}
    return sections | {"report": {}}


def _absolute(data: str) -> str:
    """A file's absolute path; a Hub id unchanged."""
    source = Path(data).expanduser()
    return str(source.resolve()) if source.exists() else data


def _divided(answers: Answers, path: Path) -> dict[str, tuple[Path, list[str]]]:
    """Files and their lines by key of ``data``: training prompts and held-out ones. {} if they cannot be split."""
    source = Path(answers.data).expanduser()
    if source.suffix != ".jsonl" or not source.is_file() or answers.goal == "labels":
        return {}
    # Not splitlines: texts in JSON may contain other line separators.
    lines = [line for line in source.read_text(encoding="utf-8").split("\n") if line.strip()]
    if len(lines) < _FEWEST:
        return {}
    share = min(_HELD_OUT, _MOST_HELD_OUT / len(lines))
    halves = split_by_group([_prompt_of(line) for line in lines], share, seed=0)
    files = {
        key: (path.with_name(f"{path.stem}.{key}.jsonl"), [lines[i] for i in rows])
        for key, rows in zip(("prompts", "eval_prompts"), halves, strict=True)
    }
    for file, _ in files.values():
        if file.exists():
            raise UserError("This file already exists.", where=str(file), fix="Name another recipe, or remove it.")
    return files


def _prompt_of(line: str) -> str:
    """A prompt's key; for an invalid line, which ``check`` rejects, the line itself."""
    with suppress(ValueError, TypeError, AttributeError, KeyError):
        return prompt_key(json.loads(line)["prompt"])
    return line


def _text(answers: Answers, sections: Sections) -> str:
    lines = [f"# {GOALS[answers.goal]}.", "#", "# Check: trl-rlaif check FILE", "# Run:   trl-rlaif run FILE"]
    if answers.goal != "labels" and "evaluate" not in sections:
        lines += ["#", "# To evaluate the result, add data.eval_prompts, which are not trained on, and `evaluate:`."]
    for name, keys in sections.items():
        lines += ["", _commented(f"{name}:", _ABOUT.get(name, ""))]
        lines += [_commented(f"  {key}: {_flow(value)}", _COMMENTS.get((name, key), "")) for key, value in keys.items()]
    return "\n".join(lines) + "\n"


def _commented(line: str, comment: str) -> str:
    return f"{line:<27}   # {comment}" if comment else line


def _flow(value: Any) -> str:
    """A value on one line; text is quoted if YAML would not read it as text."""
    if isinstance(value, float):
        return f"{value:.1e}".replace("e-0", "e-") if value < 1e-3 else str(value)
    if isinstance(value, str) and yaml.safe_load(value) != value:
        return json.dumps(value)
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")
