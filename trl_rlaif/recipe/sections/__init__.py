"""The sections of a recipe as typed models: every key with its default, range and description."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from trl_rlaif.recipe.sections.data import DataSection, SampleSection, SftSection
from trl_rlaif.recipe.sections.evaluate import FORGET_SET, EvaluateSection, FurtherJudgeSection
from trl_rlaif.recipe.sections.judges import (
    JudgeSection,
    OtherJudgeSection,
    ServerJudgeSection,
    TeachingSection,
    VLLMJudgeSection,
)
from trl_rlaif.recipe.sections.label import ComparedSection, JurySection, LabelSection, RankingSection
from trl_rlaif.recipe.sections.model import LoraSection, ModelSection
from trl_rlaif.recipe.sections.run import KERNELS, ReportSection, RoundsSection, RunSection
from trl_rlaif.recipe.sections.training import STOPPING_LIMITS, RewardSection, RlSection, reward_name
from trl_rlaif.recipe.sections.values import ComponentLookup, ComponentRef, DataPath, Named, Number, Section, safe_name

STAGE_SECTIONS: dict[str, type[Section]] = {
    "sft": SftSection,
    "sample": SampleSection,
    "judge": TeachingSection,
    "label": LabelSection,
    "reward": RewardSection,
    "rl": RlSection,
    "evaluate": EvaluateSection,
    "report": ReportSection,
}

SECTIONS: dict[str, type[Section]] = {
    "run": RunSection,
    "model": ModelSection,
    "data": DataSection,
    "rounds": RoundsSection,
    **STAGE_SECTIONS,
}

# In order; trl_rlaif.pipeline.stages describes each.
STAGES = tuple(STAGE_SECTIONS)


def plain(value: Any) -> Any:
    """A section, or any value in one, as plain data that ``yaml.safe_dump`` can write and a recipe can contain."""
    if isinstance(value, ComponentRef):
        return {value.name: plain(value.options)} if value.options else value.name
    if isinstance(value, BaseModel):
        keys = {name: plain(getattr(value, name)) for name in type(value).model_fields if name != "config"}
        return {**keys, **plain(getattr(value, "config", {}))}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


__all__ = [
    "ComparedSection",
    "ComponentLookup",
    "ComponentRef",
    "DataPath",
    "DataSection",
    "EvaluateSection",
    "FORGET_SET",
    "FurtherJudgeSection",
    "JudgeSection",
    "JurySection",
    "KERNELS",
    "LabelSection",
    "LoraSection",
    "ModelSection",
    "Named",
    "OtherJudgeSection",
    "Number",
    "RankingSection",
    "ReportSection",
    "RewardSection",
    "RlSection",
    "RoundsSection",
    "RunSection",
    "SECTIONS",
    "STAGES",
    "STAGE_SECTIONS",
    "STOPPING_LIMITS",
    "SampleSection",
    "ServerJudgeSection",
    "SftSection",
    "TeachingSection",
    "VLLMJudgeSection",
    "plain",
    "reward_name",
    "safe_name",
]
