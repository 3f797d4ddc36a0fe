"""Rewards and labels from a rubric: yes or no per criterion, with the judge's exact probabilities."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pydantic import Field, model_validator

from trl_rlaif import (
    YES_NO,
    Answer,
    CriterionLabel,
    Judge,
    JudgePrompt,
    Label,
    Options,
    Pair,
    Question,
    Rated,
    RewardLabeler,
    ScoreDistribution,
    ThinkingOptions,
    UserError,
    ask_together,
    done_indices,
    rated_label,
    rows_of,
    yes,
)
from trl_rlaif_rubric.rubric import NOTHING_TO_GAIN, Criterion, grade, read_rubric


class CriterionOptions(Options):
    """A criterion shared by all prompts."""

    criterion: str = Field(min_length=1, description="A statement that a response either meets or not.")
    weight: float = Field(1.0, description="Weight of the criterion; below 0: the response should not meet it.")

    @model_validator(mode="after")
    def _counts(self) -> CriterionOptions:
        with _as_value_error():
            Criterion(self.criterion, self.weight)
        return self


class RubricOptions(ThinkingOptions):
    """Options of `rubric`."""

    column: str | None = Field(
        "rubric", min_length=1, description="Column of the data with each prompt's own criteria; null: none."
    )
    shared: list[str | CriterionOptions] = Field(
        default_factory=list, description="Criteria for all prompts: a text, or {criterion: text, weight: 1}."
    )

    @model_validator(mode="after")
    def _some(self) -> RubricOptions:
        with _as_value_error():
            if not any(one.weight > 0 for one in self.criteria()) and self.column is None:
                raise UserError("Name a column, or give shared criteria of which one has a positive weight.")
        return self

    def criteria(self) -> list[Criterion]:
        """The shared criteria."""
        return read_rubric([one if isinstance(one, str) else one.model_dump() for one in self.shared])


@contextmanager
def _as_value_error() -> Iterator[None]:
    """Convert UserError to the ValueError that a pydantic validator must raise."""
    try:
        yield
    except UserError as error:
        raise ValueError(str(error)) from None


class RubricLabeler(RewardLabeler):
    """Rubric rewards (Gunjal et al. 2025; graded as HealthBench, Arora et al. 2025).

    Every criterion is a separate "Yes" or "No" question after prompt and response, whose computation all criteria of a
    response share. With a judge it is a reward function for PPOTrainer and for TRL's GRPOTrainer and RLOOTrainer:
    ``reward_funcs=[RubricLabeler(judge)]``, with a column ``rubric`` in the dataset. As a labeler it grades both
    responses of a pair.

    Args:
        judge: The judge to ask when called as a reward function.
        options: See RubricOptions.
    """

    Options = RubricOptions
    options: RubricOptions
    __name__ = "rubric"

    def __init__(self, judge: Judge | None = None, **options: Any) -> None:
        super().__init__(judge, **options)
        self.shared = self.options.criteria()

    def check_prompt(self, prompt: JudgePrompt) -> None:
        """See Labeler."""
        prompt.check("", "", "", columns=None, think=self.options.thinking)

    def columns(self, prompt: JudgePrompt) -> Collection[str]:
        """See Labeler."""
        return {*prompt.columns_of("check.jinja"), *filter(None, [self.options.column])}

    def check_row(self, prompt: JudgePrompt, columns: Mapping[str, Any]) -> None:
        """See Labeler."""
        self._questions(prompt, "", "", self.rubric(columns), columns)

    def rubric(self, columns: Mapping[str, Any]) -> list[Criterion]:
        """The criteria of a row: its own, then the shared ones.

        Raises:
            UserError: The row has none, one is not well-formed, or none has a positive weight.
        """
        column = self.options.column
        own = columns.get(column) if column else []
        if own is None and not any(criterion.weight > 0 for criterion in self.shared):
            raise UserError(
                f"There is no column '{column}', which the labeler 'rubric' reads.",
                fix="Give every prompt its criteria (`trl-rlaif draft-rubrics` drafts them), or set the options column "
                "or shared.",
            )
        found = [*read_rubric(own or []), *self.shared]
        if not any(criterion.weight > 0 for criterion in found):
            raise UserError(NOTHING_TO_GAIN, fix="Add what a good response should meet.")
        return found

    def label(self, pairs: Sequence[Pair], judge: Judge, done: Collection[str] = ()) -> Iterator[Label]:
        """Yield one label per pair; p is the probability that response_1 scores higher, ties counting half."""
        rubrics = [self.rubric(pair.extra) for pair in pairs]
        items: list[dict[tuple[str, ...], list[list[Question]]]] = [
            {
                YES_NO: [
                    self._questions(judge.prompt, pair.prompt, response, rubric, pair.extra)
                    for response in pair.responses
                ]
            }
            for pair, rubric in zip(pairs, rubrics, strict=True)
        ]
        known = done_indices(pairs, done)
        for index, found in ask_together(judge, items, thinking=self.options.asked(), done=known):
            yield _label(pairs[index].id, rubrics[index], found[YES_NO], judge.name)

    def grade(
        self, prompts: Sequence[Any], responses: Sequence[str], judge: Judge, **columns: Any
    ) -> list[ScoreDistribution | None]:
        """Score each response; None if the judge cannot, with the reason in ``failed``.

        Args:
            columns: Data columns by name, each a list with one value per response.
        """
        rows = rows_of(columns, self.columns(judge.prompt), len(responses))
        rubrics = [self.rubric(row) for row in rows]
        groups = [
            self._questions(judge.prompt, prompt, response, rubric, row)
            for prompt, response, rubric, row in zip(prompts, responses, rubrics, rows, strict=True)
        ]
        found = dict(judge.ask(groups, YES_NO, thinking=self.options.asked()))
        read = [yes(found[i]) for i in range(len(groups))]
        self.failed = [met for met in read if isinstance(met, str)]
        return [None if isinstance(met, str) else grade(of, met) for of, met in zip(rubrics, read, strict=True)]

    def rewards(
        self, prompts: Sequence[Any], responses: Sequence[str], judge: Judge, **columns: Any
    ) -> list[float | None]:
        """Expected scores in [0, 1]; see RewardLabeler."""
        return [None if one is None else one.mean for one in self.grade(prompts, responses, judge, **columns)]

    def _questions(
        self, template: JudgePrompt, prompt: Any, response: str, rubric: Sequence[Criterion], columns: Mapping[str, Any]
    ) -> list[Question]:
        think = self.options.thinking
        return [template.check(prompt, response, one.text, columns=columns, think=think) for one in rubric]


@dataclass(frozen=True)
class _Graded(Rated):
    met: list[float]


def _graded(rubric: Sequence[Criterion], answers: Sequence[Answer]) -> _Graded | str:
    met = yes(answers)
    if isinstance(met, str):
        return met
    # The judge's total probability of Yes and No, averaged over the criteria.
    mass = fmean(sum(map(math.exp, draw)) for answer in answers for draw in answer.logprobs)
    return _Graded(grade(rubric, met), min(1.0, mass), met)


def _label(id: str, rubric: Sequence[Criterion], both: list[list[Answer]], judge: str) -> Label:
    def criteria(first: _Graded, second: _Graded) -> list[CriterionLabel]:
        return [
            CriterionLabel(one.text, one.weight, score_1=a, score_2=b)
            for one, a, b in zip(rubric, first.met, second.met, strict=True)
        ]

    return rated_label(id, judge, [_graded(rubric, answers) for answers in both], both, criteria)
