"""Recipes: YAML files that say what a run does, read into typed sections with the line of every key."""

from trl_rlaif.recipe.parsing import Recipe, parse_recipe
from trl_rlaif.recipe.paths import packaged_recipes, prompt_folder, recipes_dir
from trl_rlaif.recipe.sections import (
    SECTIONS,
    STAGES,
    ComponentLookup,
    ComponentRef,
    DataSection,
    EvaluateSection,
    JudgeSection,
    LabelSection,
    LoraSection,
    ModelSection,
    ReportSection,
    RewardSection,
    RlSection,
    RunSection,
    SampleSection,
    ServerJudgeSection,
    SftSection,
)

__all__ = [
    "SECTIONS",
    "STAGES",
    "ComponentLookup",
    "ComponentRef",
    "DataSection",
    "EvaluateSection",
    "JudgeSection",
    "LabelSection",
    "LoraSection",
    "ModelSection",
    "Recipe",
    "ReportSection",
    "RewardSection",
    "RlSection",
    "RunSection",
    "SampleSection",
    "SftSection",
    "ServerJudgeSection",
    "packaged_recipes",
    "parse_recipe",
    "prompt_folder",
    "recipes_dir",
]
