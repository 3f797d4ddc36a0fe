"""A folder for recipes, a registry of fake components, and helpers for parsing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field, field_validator

from trl_rlaif.errors import Problem, UserError
from trl_rlaif.recipe import Recipe, parse_recipe
from trl_rlaif.recipe.sections import DataPath


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DistilledOptions(Options):
    samples: int = Field(1, ge=1)


class AdvantageOptions(Options):
    margin: float = Field(1.0, gt=0)
    bands: list[float] = []

    @field_validator("bands")
    @classmethod
    def _ordered(cls, bands: list[float]) -> list[float]:
        if bands != sorted(bands):
            raise ValueError("bands must rise")
        return bands


class ReviseOptions(Options):
    principles: DataPath
    rounds: int = 1


class FakeRegistry:
    """Two transforms, two labelers, one selector, one sampler, and a labeler from a broken plugin."""

    components = {
        ("labeler", "distilled"): DistilledOptions,
        ("labeler", "direct"): Options,
        ("labeler", "broken"): None,
        ("reward_transform", "advantage"): AdvantageOptions,
        ("reward_transform", "regulator"): Options,
        ("data_selector", "rehearsal"): Options,
        ("pair_sampler", "revise"): ReviseOptions,
    }

    def names(self, kind: str) -> list[str]:
        return sorted(name for k, name in self.components if k == kind)

    def rewards(self) -> list[str]:
        return [name for name in ("direct",) if ("labeler", name) in self.components]

    def options_model(self, kind: str, name: str) -> type[BaseModel]:
        model = self.components[kind, name]
        if model is None:
            raise UserError("The plugin acme 1.0 cannot be imported.", fix="Uninstall acme.")
        return model


@pytest.fixture
def registry() -> FakeRegistry:
    return FakeRegistry()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with one data file per purpose."""
    for name in ("prompts.jsonl", "eval.jsonl", "pairs.jsonl", "sft.jsonl"):
        (tmp_path / name).write_text("{}\n")
    prompt = tmp_path / "own_prompt"
    prompt.mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def parse(folder: Path, registry: FakeRegistry) -> Callable[..., Recipe]:
    """Parse a text, as recipe.yaml in the current folder."""

    def parse(text: str | bytes, *overrides: str, name: str = "recipe.yaml") -> Recipe:
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return parse_recipe(name, overrides=overrides, registry=registry)

    return parse


@pytest.fixture
def problems(parse: Callable[..., Recipe]) -> Callable[..., list[Problem]]:
    """The problems of an invalid text."""

    def problems(text: str | bytes, *overrides: str) -> list[Problem]:
        with pytest.raises(UserError) as caught:
            parse(text, *overrides)
        return list(caught.value.problems)

    return problems


@pytest.fixture
def only(problems: Callable[..., list[Problem]]) -> Callable[..., Problem]:
    """The only problem of an invalid text."""

    def only(text: str | bytes, *overrides: str) -> Problem:
        found = problems(text, *overrides)
        assert len(found) == 1, [str(problem) for problem in found]
        return found[0]

    return only


@pytest.fixture
def parse_errors_of_direct(tmp_path: Path) -> str:
    """The error for a recipe with direct rewards if no plugin provides them."""

    class WithoutDirect(FakeRegistry):
        components = {k: v for k, v in FakeRegistry.components.items() if k != ("labeler", "direct")}

    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "r.yaml").write_text("model: {path: gpt2}\ndata: {prompts: prompts.jsonl}\nrl: {rewards: [direct]}\n")
    with pytest.raises(UserError) as caught:
        parse_recipe(tmp_path / "r.yaml", registry=WithoutDirect())
    return str(caught.value)
