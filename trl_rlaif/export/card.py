"""A model card from a run's report: data, judges, metrics with intervals, and limitations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from trl_rlaif import __version__
from trl_rlaif.data.rows import SUFFIXES
from trl_rlaif.models.loading import PACKAGE
from trl_rlaif.pipeline.trained import NOUNS, Trained
from trl_rlaif.report import no_learning, summary, warnings
from trl_rlaif.report.formatting import count, interval, label, number, percent, scores, section
from trl_rlaif.report.judge_figures import judged_sets
from trl_rlaif.report.run_data import Run

# Fields of a card that only users set.
LICENSE = ("license", "license_name", "license_link")
_PIPELINES = {"policy": "text-generation", "reward": "text-classification", "judge": "text-generation"}
_DATA = {"prompts": "prompts", "pairs": "pairs", "eval_prompts": "held-out prompts"}


def model_card(
    run: Run, trained: Trained, *, base: str | None, merged: bool, keep: Mapping[str, Any] | None = None
) -> ModelCard:
    """The card of a model trained by a run.

    Absolute paths of this machine are cut to file names.

    Args:
        run: As read for its report.
        trained: The model.
        base: The base's Hub id, if it has one.
        merged: Whether it is a merged model or an adapter.
        keep: Fields of an earlier card, such as the license that a user chose.
    """
    own = section({"rl": run.recipe.get("rl")}, "rl").get("algorithm") if trained.what == "policy" else None
    tags = ["trl-rlaif", "rlaif", *filter(None, [label(own, 30), "reward-model" if trained.what == "reward" else ""])]
    data = ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "finetune" if merged else "adapter",
        datasets=sorted({source.partition(":")[0] for _, source in _sources(run) if _on_hub(source)}) or None,
        library_name="transformers" if merged else "peft",
        pipeline_tag=_PIPELINES[trained.what],
        tags=tags,
        **(keep or {}),
    )
    name = base or Path(trained.base.path.removeprefix(PACKAGE)).name
    parts = [
        f"# {run.name}: {NOUNS[trained.what]}",
        _what_it_is(trained, name, merged),
        f"```python\n{_usage(trained, base or trained.base.path, merged)}\n```",
        f"## Data and judges\n\n{_bullets(f'{what}: {source}' for what, source in (*_sources(run), *_judges(run)))}",
        f"## Results\n\n{_bullets(_results(run, trained))}\n\n{_table(run)}",
        f"## What to doubt\n\n{_bullets(_doubts(run, trained))}",
        "## License\n\nNot stated here: add `license:` to the metadata above. The terms of base and data apply.",
    ]
    text = _without_paths("\n\n".join(part.rstrip() for part in parts), run.recipe)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


# ---- What it is, and how it is loaded -------------------------------------------------------------------


def _what_it_is(trained: Trained, base: str, merged: bool) -> str:
    kind = "whole model" if merged else "LoRA adapter"
    kind = "sequence classifier" if merged and trained.what == "reward" else kind
    said = f"The {NOUNS[trained.what]} of a run of trl-rlaif {__version__}, on `{base}`: a {kind}."
    if merged and trained.base.quantization == "nf4":
        said += (
            " It was trained on the base in 4 bits (NF4). The weights are these, dequantized, with the adapter merged "
            "into them."
        )
    elif trained.base.quantization == "nf4":
        said += " It was trained on the base in 4 bits (NF4, double quantization)."
    if trained.what == "reward":
        said += (
            " A score is read at the end of the response's turn"
            + (", where the chat template ends a conversation that the assistant ends." if merged else ".")
            + " Scores compare responses to one prompt; they have no zero and no unit."
        )
    if trained.template_kwargs:
        said += f" Prompts were rendered with these variables of the chat template: `{trained.template_kwargs}`."
    return said


def _usage(trained: Trained, base: str, merged: bool) -> str:
    where = "THIS_REPOSITORY"
    if trained.what == "reward" and not merged:
        lines = ["from trl_rlaif import load_reward_model", "", f'model = load_reward_model("{where}")']
        return "\n".join([*lines, "score = model(**inputs).logits[:, 0]"])
    kind = "SequenceClassification" if trained.what == "reward" else "CausalLM"
    lines = [f"from transformers import AutoModelFor{kind}, AutoTokenizer", ""]
    if merged:
        lines.append(f'model = AutoModelFor{kind}.from_pretrained("{where}", dtype="auto")')
    else:
        lines = ["from peft import PeftModel", *lines]
        lines.append(f'base = AutoModelFor{kind}.from_pretrained("{base}", dtype="auto")')
        lines.append(f'model = PeftModel.from_pretrained(base, "{where}")')
    lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{where}")')
    if trained.what == "reward":
        lines += [
            'turns = [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]',
            'inputs = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)',
            "score = model(**inputs).logits[0, 0]",
        ]
    return "\n".join(lines)


# ---- Data -----------------------------------------------------------------------------------------------


def _sources(run: Run) -> Iterator[tuple[str, str]]:
    """The run's input data: (what, source), the source as in the recipe."""
    data = section(run.recipe, "data")
    yield from ((name, data[key]) for key, name in _DATA.items() if isinstance(data.get(key), str))
    for stage, key in (("sft", "data"), ("judge", "pairs"), ("rl", "rehearsal")):
        source = section(run.recipe, stage).get(key)
        if isinstance(source, str):
            yield f"{stage}.{key}", source
    for name, source in section(run.recipe, "evaluate", "sets").items():
        if isinstance(source, str):
            yield f"held-out prompts of {label(name)}", source


def _judges(run: Run) -> Iterator[tuple[str, str]]:
    """The run's judges: (what it judged, the judge's model)."""
    for stage, what in (("label", "judge of the labels"), ("evaluate", "judge of the win rates")):
        if name := run.results.get(stage) and summary.judge_name(run, stage):
            yield what, name


def _on_hub(source: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", source.partition(":")[0])) and not source.endswith(SUFFIXES)


# ---- Results --------------------------------------------------------------------------------------------


def _results(run: Run, trained: Trained) -> list[str]:
    found = summary.summary(run, summary.set_results(run))
    return [*found, *_taught(run)] if trained.what == "judge" else found


def _taught(run: Run) -> Iterator[str]:
    """A judge's agreement with held-out pairs, before and after it was taught."""
    for name, of in section(run.results, "judge", "sources").items():
        rates = []
        for when in ("before", "after"):
            found = section(of, when, "agreement")
            ends = interval(found.get("interval"))
            rates.append(f"{percent(number(found.get('rate')))} ({summary.between(ends)})")
        held_out = count(number(section({"of": of}, "of").get("held_out")), "held-out pair")
        yield f"Agreement on {held_out} of the source {label(name)}: {rates[0]} before it was taught, {rates[1]} after."


def _table(run: Run) -> str:
    """The metrics of each held-out set with their 95% intervals."""
    rows = []
    for each in summary.set_results(run):
        for name, measure in (
            ("mean reward, change", each.reward),
            ("win rate over the initial policy", each.win_rate),
        ):
            if measure is not None:
                rows.append(f"| {each.name} | {name} | {measure.text} | {measure.interval_text} | {measure.verdict} |")
    accuracy = summary.reward_accuracy(run)
    if accuracy is not None:
        told = f"| {accuracy.text} | {accuracy.interval_text} | {accuracy.verdict} |"
        rows.append(f"| held-out pairs | reward model's accuracy {told}")
    ece = number(section(run.results, "reward").get("ece"))
    if ece is not None:
        rows.append(f"| held-out pairs | reward model's calibration error | {scores(ece)[0]} | | |")
    head = "| set | figure | value | 95% interval | |\n|---|---|---|---|---|\n"
    return head + "\n".join(rows) if rows else ""


def _doubts(run: Run, trained: Trained) -> list[str]:
    sets = summary.set_results(run)
    found = [*no_learning.signs_of_no_learning(run), *warnings.warnings(run, sets, judged_sets(run))]
    found = [*filter(None, [warnings.judge_caveat(run)]), *found]
    if trained.what == "judge" and not trained.used:
        found.insert(0, "The run did not use what this judge was taught: it did not help on held-out pairs.")
    own = "The judges are language models: these figures say what they prefer, which need not be what people prefer."
    return [own, *found]


# ---- Text -----------------------------------------------------------------------------------------------


def _bullets(items: Iterator[str] | list[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _without_paths(text: str, recipe: Any) -> str:
    """The text with the absolute paths in a recipe cut to their last parts."""
    for path in sorted({value for value in _texts(recipe) if value.startswith("/")}, key=len, reverse=True):
        text = text.replace(path, Path(path).name)
    return text


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(item)
