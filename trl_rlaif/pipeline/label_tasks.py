"""The labelers of a recipe, each with what determines its labels."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_rlaif.chat_templates import has_date
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.labels import LabelKey
from trl_rlaif.models.loading import model_revision
from trl_rlaif.pipeline.inputs import digest
from trl_rlaif.pipeline.judges import model_spec
from trl_rlaif.recipe import ComponentRef, JudgeSection, Recipe, ServerJudgeSection, VLLMJudgeSection, prompt_folder

if TYPE_CHECKING:
    from trl_rlaif.pipeline.context import Context


@dataclass(frozen=True)
class LabelTask:
    """One labeler's work: its name in the report, and what it consists of."""

    name: str
    labeler: ComponentRef
    judge: str | JudgeSection | ServerJudgeSection
    prompt: str


def label_tasks(recipe: Recipe) -> list[LabelTask]:
    """The labelers of the recipe; the first one's labels are what the reward model learns from."""
    section = recipe.label
    main = LabelTask("label", section.main_labeler, section.judge, section.prompt)
    others = [
        LabelTask(name, c.labeler or main.labeler, c.judge or main.judge, c.prompt or main.prompt)
        for name, c in section.compare.items()
    ]
    return [main, *others]


def label_key(context: Context, task: LabelTask) -> LabelKey:
    """What determines a task's labels. No model is loaded."""
    judge, adapter = task.judge, None
    if judge == "taught":
        judge, adapter = context.recipe.judge.model, context.judges.taught_adapter
    if isinstance(judge, ServerJudgeSection):
        name = judge.path
        listed = 20 if judge.top_logprobs == "auto" else judge.top_logprobs  # or more, if need be
        # The model's name stands for it, wherever it is served: another address, or several, give the same labels.
        revision = f"{judge.api} {judge.prefill} {judge.votes} {listed}"
        revision += _told(judge.chat_template_kwargs) + _told(judge.extra_body)
    else:
        spec = context.model_spec if isinstance(judge, str) else model_spec(judge)
        # A folder's own name: on another machine the same model may lie elsewhere.
        name = Path(spec.path).name if Path(spec.path).exists() else spec.path
        revision = f"{model_revision(spec.path)} {spec.dtype} {spec.quantization}"
        revision += " vllm" if isinstance(judge, VLLMJudgeSection) else ""
        revision += _told((context.recipe.model if isinstance(judge, str) else judge).chat_template_kwargs)
        if has_date(context.judges.tokenizer(judge)):
            revision += f" {context.date}"
        if adapter is not None:
            from trl_rlaif.models.shared_model import ADAPTER_FILE

            revision += f" {digest(str(adapter / ADAPTER_FILE))}"
    prompt = JudgePrompt.load(prompt_folder(task.prompt))
    columns = tuple(sorted(context.create_labeler(task.labeler).columns(prompt)))
    return LabelKey(task.labeler.name, dict(task.labeler.options), name, revision, prompt.revision, columns)


def _told(kwargs: dict[str, Any]) -> str:
    """What a judge's chat template is told, as a part of its revision; nothing where it is told nothing."""
    return f" {json.dumps(kwargs, sort_keys=True)}" if kwargs else ""
