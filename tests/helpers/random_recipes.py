"""Random small recipes, drawn from the schema that validates recipes, and the outcome of each.

A new section, key, option, component or TRL field is drawn as soon as it is declared.
"""

from __future__ import annotations

import enum
import json
import math
import random
import re
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from helpers import forked
from helpers.tiny import save_tiny_model
from trl_rlaif.algorithms import ALGORITHMS
from trl_rlaif.data import COLUMNS
from trl_rlaif.errors import TrlRlaifError, UserError
from trl_rlaif.recipe import SECTIONS, ComponentRef
from trl_rlaif.recipe.ranges import RANGES, Range
from trl_rlaif.recipe.sections import FORGET_SET, Named, OtherJudgeSection
from trl_rlaif.recipe.trl_fields import _SET_BY_US, CONFIG_CLASSES, config_hints, own_keys, strict_hint
from trl_rlaif.recipe.variants import CHANGEABLE

# Keep a section small, unless other values are drawn.
_SMALL: dict[str, dict[str, Any]] = {
    "sft": {"max_steps": 1, "per_device_train_batch_size": 2},
    "sample": {"max_new_tokens": 4},
    "reward": {"max_steps": 1, "per_device_train_batch_size": 2, "eval_fraction": 0.3},
    "rl": {"total_episodes": 4, "per_device_train_batch_size": 2, "response_length": 4, "max_steps": 1},
    "evaluate": {"max_new_tokens": 4},
}
# Valid, but slow by design or dependent on another machine: compiling takes minutes, and a server that does not answer
# is waited for.
_LEFT_OUT = {"torch_compile", "torch_compile_backend", "torch_compile_mode", "vllm_mode", "generation", "ddp_timeout",
             "max_retries", "timeout", "extra_body", "quantization"}  # fmt: skip
_WILD_NUMBERS = (-1, 0, -0.5, 1.5, 2.5, 10**12, float("nan"), float("inf"), -1e30)
_WILD: tuple[Any, ...] = (*_WILD_NUMBERS, None, True, "", "x", "a/b", [], {}, [None], [1], {"a": 1})
# Outcomes other than success or a message for the recipe's author.
BAD = ("traceback", "hang", "died")
_FUNCTIONS = """
def length(completions, **columns):
    return [float(len(text)) for text in completions]


def same(completions, **columns):
    return [1.0 for _ in completions]


def none(completions, **columns):
    return [None for _ in completions]


def shout(completions, **columns):
    raise ValueError("no reward")
"""
_PROMPT = {
    "base.txt": "Judge.", "detailed.txt": "Judge well.", "ending.txt": "Better=", "thinking.txt": "Thoughts:",
    "sample.jinja": "Q: {{ context }}\nA: {{ response_1 }}\nB: {{ response_2 }}", "rubric.txt": "Rate.",
    "rating.jinja": "Q: {{ context }}\nA: {{ response }}", "rating_ending.txt": "Score=",
    "rating_thinking.txt": "Thoughts:",
    "exemplars.jsonl": json.dumps(
        {"context": "a", "response_1": "b", "response_2": "c", "rationale": "d", "preferred": 1}
    ),
}  # fmt: skip


def write_sources(folder: Path) -> Path:
    """Write what random recipes refer to: data of every kind, a model, an adapter, a judge prompt, reward functions."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from helpers.recipes import write_prompts

    folder.mkdir(parents=True, exist_ok=True)
    model = save_tiny_model(folder / "model", length=4096)
    base = AutoModelForCausalLM.from_pretrained(model)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(folder / "adapter"))
    write_prompts(folder / "prompts.jsonl", 4)
    write_prompts(folder / "eval_prompts.jsonl", 2, start=20)
    asked = [{"role": "user", "content": "name a color"}]
    answered = [*asked, {"role": "assistant", "content": "blue"}]
    pair = {"prompt": "name a color", "chosen": "blue", "rejected": "fox", "category": "a", "margin": 1.0}
    responses = {"prompt": "name a city", "response_1": "the capital", "response_2": "lazy dog", "human": 1}
    rows = {
        "messages": [{"prompt": asked}] * 3,
        "pairs": [pair, {**pair, "prompt": "name a dog"}] * 3,
        "responses": [responses, {**responses, "human": 2}] * 3,
        "calibration": [{**responses, "human": i % 2 + 1} for i in range(20)],
        "scored": [{"prompt": "name a color", "responses": ["a", "b", "c"], "scores": [1, 2, 3]}] * 4,
        "kto": [{"prompt": "name a color", "completion": "ab"[i % 2], "label": i % 2 == 0} for i in range(8)],
        "talks": [{"messages": answered}] * 4,
        "completions": [{"prompt": "name a color", "completion": "blue"}] * 4,
        "texts": [{"text": "the quick brown fox"}] * 4,
    }
    for name, of in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in of))
    (folder / "rewards.py").write_text(_FUNCTIONS)
    (folder / "judge").mkdir(exist_ok=True)
    for name, text in _PROMPT.items():
        (folder / "judge" / name).write_text(text)
    return folder


class RandomRecipe:
    """Draws one recipe.

    Args:
        draw: Makes all random choices.
        sources: The folder that ``write_sources`` wrote.
        registry: The installed components.
    """

    def __init__(self, draw: random.Random, sources: Path, registry: Any) -> None:
        self.draw, self.sources, self.registry = draw, sources, registry
        # The share of values drawn without regard to type and range.
        self.wild = draw.choice((0.0, 0.0, 0.02))

    def recipe(self) -> dict[str, Any]:
        """A recipe as loaded from YAML."""
        algorithm = self.draw.choice(list(ALGORITHMS))
        stages = self._stages(algorithm)
        found = {name: self.section(name, algorithm) for name in ("run", "model", "data", *stages)}
        if self.draw.random() < 0.9:
            self._agree(found)
        if self.draw.random() < 0.2 and "evaluate" in found:
            changed = self.draw.choice([name for name in CHANGEABLE if name in found])
            found["compare"] = ["a", {"b": {changed: self.section(changed, algorithm)}}]
        if self.draw.random() < 0.15 and {"sample", "label", "rl"} <= found.keys():
            found["rounds"] = self.draw.choice((2, {"number": 2, "reference": "previous"}))
            if "reward" in found:
                found["reward"].pop("policies", None)
                found["rl"] |= {"rewards": ["reward"], "labelers": []}
        return found

    def _agree(self, found: dict[str, Any]) -> None:
        """Give each stage what it needs from the others."""
        data, rl, evaluate = found["data"], found.get("rl", {}), found.get("evaluate", {})
        if "sample" in found:
            data.pop("pairs", None)
        elif {"label", "reward"} & found.keys() or rl.get("algorithm") == "dpo":
            data["pairs"] = self._data("pairs")
            data["format"] = Path(data["pairs"]).stem.replace("pairs", "preference")
        if found.get("label", {}).get("ranking"):
            found["label"].pop("calibration", None)
            if "sample" in found:
                found["sample"] |= {"num_responses": 3, "keep_pairs": "all"}
        if rl.get("algorithm") == "dpo":
            rl |= {"selectors": [], "transforms": []}
        if rl.get("algorithm") == "rejection_sampling":
            rl["selectors"] = rl.get("selectors") or ["rejection_sampling"]
        if "reward" not in found and "reward" in (rl.get("rewards") or ["reward"]):
            rl["rewards"] = [f"{self.sources / 'rewards.py'}:length"]
        if evaluate.get("stop_on_forgetting") is not None:
            evaluate["sets"] = {FORGET_SET: self._data("prompts")}

    def _stages(self, algorithm: str) -> list[str]:
        """The stages of a pipeline, mostly consistent with each other."""
        chance = lambda p: self.draw.random() < p  # noqa: E731
        rl = chance(0.75)
        learns = algorithm == "dpo" and rl
        pairs = learns or chance(0.6)
        stages = {"sft": chance(0.2), "sample": pairs and chance(0.6), "label": pairs, "reward": pairs and chance(0.8),
                  "rl": rl, "evaluate": rl and chance(0.4), "report": chance(0.4)}  # fmt: skip
        return [name for name, kept in stages.items() if kept] or ["report"]

    def section(self, name: str, algorithm: str) -> dict[str, Any]:
        """A section's keys: those that keep it small, and a few of the others."""
        keys = {**_SMALL.get(name, {})}
        keys |= self._fields(SECTIONS[name], 0.15, keep={"config"})
        if name == "rl":
            keys["algorithm"] = algorithm
        if name == "model":
            keys |= {"dtype": self.draw.choice(("float32", "float32", "float32", "bfloat16"))}
        if name == "data":
            keys.setdefault("prompts", self._data("prompts"))
            keys.setdefault("eval_prompts", self._data("prompts"))
        if name in CONFIG_CLASSES:
            hints = config_hints(name, algorithm)
            refused = set() if self.draw.random() < self.wild else _SET_BY_US.keys()
            known = [key for key in hints if key not in {*own_keys(name), *_LEFT_OUT, *refused}]
            for key in self.draw.sample(known, self.draw.choice((0, 1, 1, 2, 3, 5))):
                keys[key] = self.value(strict_hint(hints[key]), (), key)
        return keys

    def _fields(self, model: type[BaseModel], share: float, keep: Iterable[str] = ()) -> dict[str, Any]:
        found = {}
        for name, field in model.model_fields.items():
            key = field.alias or name
            if name in keep or name in _LEFT_OUT or not (field.is_required() or self.draw.random() < share):
                continue
            if (model, name) != (SECTIONS["run"], "name"):
                found[key] = self.value(field.annotation, field.metadata, key)
        return found

    def value(self, hint: Any, metadata: Iterable[Any], key: Any) -> Any:
        """A value of a type, mostly within its range."""
        if self.draw.random() < self.wild:
            return self.draw.choice(_WILD_NUMBERS if hint in (int, float) else _WILD)
        if get_origin(hint) is Annotated:
            hint, *more = get_args(hint)
            return self.value(hint, [*more, *metadata], key)
        named = next((item for item in metadata if isinstance(item, Named)), None)
        if named is not None and (hint is str or get_origin(hint) is not list):
            return self._named(named.kind, key)
        if hint is ComponentRef:
            return self._component({"labeler": "labeler", "selectors": "data_selector"}.get(key, "reward_transform"))
        if isinstance(hint, type) and issubclass(hint, BaseModel):
            return self._fields(hint, 0.6 if issubclass(hint, OtherJudgeSection) else 0.3)
        if isinstance(hint, type) and issubclass(hint, enum.Enum):
            return self.draw.choice([member.value for member in hint])
        return self._plain(hint, metadata, key)

    def _plain(self, hint: Any, metadata: Iterable[Any], key: Any) -> Any:
        origin, args = get_origin(hint), get_args(hint)
        if origin is Literal:
            return self.draw.choice(args)
        if origin in (Union, types.UnionType):
            return self.value(self.draw.choice(args), metadata, key)
        if origin in (list, tuple, set):
            items = [item for item in args if item is not Ellipsis]
            if origin is tuple and len(items) > 1:
                return [self.value(item, (), key) for item in items]
            return [self.value(items[0], (), key) for _ in range(self.draw.choice((1, 1, 2)))]
        if key == "columns":
            return dict.fromkeys(self.draw.sample(COLUMNS, 1), self.draw.choice(COLUMNS))
        if origin is dict:
            name = self.value(args[0], (), f"{key}_key") if args else "x"
            name = "x" if isinstance(name, list | dict) else name  # not a hashable key
            return {name: self.value(args[1] if args else str, (), key)}
        if hint in (None, type(None)):
            return None
        if hint is bool:
            return self.draw.random() < 0.5
        if hint in (int, float):
            return self._number(hint, metadata, key)
        if key == "sets_key":
            return self.draw.choice((FORGET_SET, "test"))
        if hint is str:
            return self.draw.choice(("a", "category", "eos", "x", "cpu", "loss", "steps", "none", "prompt"))
        return self.draw.choice((None, True, 1, "x", {}, []))

    def _number(self, hint: type, metadata: Iterable[Any], key: Any) -> int | float:
        limits = _limits(metadata) or RANGES.get(key) or Range(0)
        least = max(limits.least, -4) if math.isfinite(limits.least) else 0
        most = min(limits.most, least + 16)
        if hint is int:
            inside = [least, least + 1, least + 1, least + 2, least + 3, least + 7, most]
            return next(int(n) for n in self.draw.sample(inside, len(inside)) if n in limits or n == inside[1])
        inside = [least, most, *(least + (most - least) * part for part in (0.01, 0.1, 0.25, 0.5, 0.75))]
        if most - least > 1:
            inside += [least + 1e-4, least + 0.05, least + 0.5, least + 1]
        return self.draw.choice([n for n in inside if n in limits])

    def _component(self, kind: str) -> Any:
        name = self.draw.choice(self.registry.names(kind))
        options = self._fields(self.registry.options_model(kind, name), 0.25)
        return {name: options} if options else name

    def _named(self, kind: str, key: Any) -> str:
        if kind == "data":
            return self._data(str(key))
        if kind == "reward":
            return self._reward()
        judge = str(self.sources / "judge")
        choices = {
            "model": [str(self.sources / "model")],
            "policy": ["base", str(self.sources / "adapter")],
            "prompt": [judge, judge, judge, "general", "summarization"],
            "rating_prompt": [judge, judge, "harmlessness"],
        }
        return self.draw.choice(choices[kind])

    def _reward(self) -> str:
        functions = [f"{self.sources / 'rewards.py'}:{name}" for name in re.findall(r"def (\w+)", _FUNCTIONS)]
        return self.draw.choice([*functions, functions[0], functions[0], "reward", "direct"])

    def _data(self, key: str) -> str:
        kinds = {
            "pairs": ("pairs", "responses", "scored", "kto"),
            "calibration": ("calibration",),
            "data": ("talks", "completions", "texts"),
            "rehearsal": ("talks", "completions"),
            "prompts": ("prompts", "prompts", "messages"),
            "eval_prompts": ("eval_prompts", "eval_prompts", "messages"),
        }
        names = kinds.get(key, ("eval_prompts", "prompts"))
        if self.draw.random() < self.wild:
            names = tuple({name for of in kinds.values() for name in of})
        return str(self.sources / f"{self.draw.choice(sorted(names))}.jsonl")


def _limits(metadata: Iterable[Any]) -> Range | None:
    """The bounds in a pydantic field's metadata."""
    limits = Range()
    for item in metadata:
        if isinstance(item, FieldInfo):
            limits = _limits(item.metadata) or limits
        elif isinstance(item, annotated_types.Ge | annotated_types.MinLen):
            limits = limits._replace(least=getattr(item, "ge", None) or 0)
        elif isinstance(item, annotated_types.Gt):
            limits = limits._replace(least=item.gt, open_least=True)
        elif isinstance(item, annotated_types.Le):
            limits = limits._replace(most=item.le)
        elif isinstance(item, annotated_types.Lt):
            limits = limits._replace(most=item.lt, open_most=True)
    return None if limits == Range() else limits


def write_random_recipe(draw: random.Random, sources: Path, folder: Path) -> Path:
    """Write a random recipe.yaml into a folder."""
    from trl_rlaif.plugins import installed_plugins

    path = folder / "recipe.yaml"
    recipe = RandomRecipe(draw, sources, installed_plugins().registry).recipe()
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def outcome_of(recipe: Path, limit: float = 60) -> dict[str, str]:
    """The outcome of `trl-rlaif check` and then `trl-rlaif run` on a recipe, in a separate process.

    ``outcome`` is ``refused`` if check refuses the recipe; else ``ran``, ``message`` (a UserError), ``failed`` (another
    error with a message, about something outside of the recipe), ``traceback``, ``hang`` or ``died``. ``said`` is why.
    """
    log, told = recipe.with_name("log"), recipe.with_name("outcome.json")
    process = forked.start(_tried, str(recipe), str(told), environment=_ENVIRONMENT, output=str(log))
    process.join(limit)
    hangs = process.is_alive()
    if hangs:
        process.kill()
        process.join()
    if told.exists() and not hangs:
        return json.loads(told.read_text())
    return {"outcome": "hang" if hangs else "died", "said": log.read_text(errors="replace")[-2000:]}


_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}


def _tried(recipe: str, told: str) -> None:
    found = _outcome(["check", recipe])
    if found["outcome"] == "ran":
        found = _outcome(["run", recipe, "--output", str(Path(recipe).with_name("out"))])
    elif found["outcome"] == "message":
        found["outcome"] = "refused"
    Path(told).write_text(json.dumps(found))


def _outcome(arguments: list[str]) -> dict[str, str]:
    import traceback

    from trl_rlaif.cli import app

    try:
        app(arguments, standalone_mode=False)
    except UserError as error:
        return {"outcome": "message", "said": str(error)}
    except TrlRlaifError as error:
        return {"outcome": "failed", "said": str(error)}
    except BaseException:
        return {"outcome": "traceback", "said": traceback.format_exc()}
    return {"outcome": "ran", "said": ""}
