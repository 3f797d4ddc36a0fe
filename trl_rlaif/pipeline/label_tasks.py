"""A recipe's labelers, and everything that determines their labels."""

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
    """One labeler's task: its name in the report, the labeler, its judge and its prompt."""

    name: str
    labeler: ComponentRef
    judge: str | JudgeSection | ServerJudgeSection
    prompt: str


def label_tasks(recipe: Recipe) -> list[LabelTask]:
    """The recipe's labelers, the main one first."""
    section = recipe.label
    main = LabelTask("label", section.main_labeler, section.judge, section.prompt)
    others = [
        LabelTask(name, c.labeler or main.labeler, c.judge or main.judge, c.prompt or main.prompt)
        for name, c in section.compare.items()
    ]
    return [main, *others]


def label_key(context: Context, task: LabelTask) -> LabelKey:
    """Everything that determines a task's labels. Loads no model."""
    judge, adapter = task.judge, None
    if judge == "taught":
        judge, adapter = context.recipe.judge.model, context.judges.taught_adapter
    if isinstance(judge, ServerJudgeSection):
        name = judge.path
        listed = 20 if judge.top_logprobs == "auto" else judge.top_logprobs  # or more, if needed
        # A served model is identified by name: its labels do not depend on the address, or on the number of servers.
        revision = f"{judge.api} {judge.prefill} {judge.votes} {listed}"
        revision += _told(judge.chat_template_kwargs) + _told(judge.extra_body)
    else:
        spec = context.model_spec if isinstance(judge, str) else model_spec(judge)
        # Only the folder's own name: on another machine, the same model may have another path.
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
    """Settings of a judge as a part of its revision; empty if there are none."""
    return f" {json.dumps(kwargs, sort_keys=True)}" if kwargs else ""
