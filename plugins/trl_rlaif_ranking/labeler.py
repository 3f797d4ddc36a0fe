"""Rewards for a group of responses from a judge's comparisons within the group."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator
from trl_rlaif_distilled import DistilledLabeler, DistilledOptions
from trl_rlaif_distilled.debias import mean_preference, unread

from trl_rlaif import Answer, Judge, RewardLabeler, UserError, rows_of

if TYPE_CHECKING:
    from trl_rlaif import Asked, Ranking


class RankingOptions(DistilledOptions):
    """Options of `ranking`; those of `distilled` control how the judge is asked and how pairs are labeled."""

    method: Literal["tournament", "all_pairs"] = Field(
        "tournament",
        description="Ask about the most uncertain pairs so far, or about every pair in both orders.",
    )
    questions: int | None = Field(None, ge=1, description="Questions per group in a tournament; null: a third of all.")
    at_once: int | None = Field(
        None,
        ge=1,
        description="Questions per group in one round of a tournament; null: half the number of responses.",
    )

    @model_validator(mode="after")
    def _one_question(self) -> RankingOptions:
        if self.criteria:
            raise ValueError("A ranking asks one question about each two responses. Leave out criteria.")
        return self


@dataclass
class _Group:
    """A prompt, its distinct responses, and the row and the response index of each completion."""

    prompt: Any
    columns: dict[str, Any]
    responses: dict[str, int] = field(default_factory=dict)
    rows: list[tuple[int, int]] = field(default_factory=list)

    def add(self, row: int, text: str) -> None:
        """Add a completion."""
        self.rows.append((row, self.responses.setdefault(text, len(self.responses))))


class RankingLabeler(RewardLabeler, DistilledLabeler):
    """Group-relative rewards: how much better a response is than the others to the same prompt.

    With a judge it is a reward function of TRL's GRPOTrainer and RLOOTrainer, ``reward_funcs=[RankingLabeler(judge)]``.
    The judge compares responses to the same prompt; a Bradley-Terry model fitted to all answers of a call
    (trl_rlaif.ranking) gives the probability p that one response beats another. A response's reward is the mean of
    2 p - 1 over the others: it is in [-1, 1], and a group's rewards sum to 0. Equal texts have equal rewards.

    It labels pairs like `distilled`.

    Args:
        judge: The judge to ask when called as a reward function.
        options: See RankingOptions.
    """

    Options = RankingOptions
    options: RankingOptions
    ranks: ClassVar[bool] = True
    __name__ = "ranking"

    def rewards(
        self, prompts: Sequence[Any], responses: Sequence[str], judge: Judge, **columns: Any
    ) -> list[float | None]:
        """See RewardLabeler; None for a response without any judged comparison.

        Args:
            prompts: Rows with the same prompt form a group, in any order.
            columns: Other data columns, which the judge's prompt may use.

        Raises:
            UserError: A prompt has a single completion.
        """
        groups: dict[str, _Group] = {}
        rows = rows_of(columns, self.columns(judge.prompt), len(responses))
        for row, (prompt, text) in enumerate(zip(prompts, responses, strict=True)):
            key = json.dumps([prompt, rows[row]], sort_keys=True, default=str)
            groups.setdefault(key, _Group(prompt, rows[row])).add(row, text)
        alone = next((group for group in groups.values() if len(group.rows) == 1), None)
        if alone is not None:
            raise UserError(
                f"The reward 'ranking' compares the responses to a prompt, and {str(alone.prompt)[:100]!r} has one.",
                fix="Use GRPO or RLOO; with several processes, each needs whole groups: per_device_train_batch_size x "
                "gradient_accumulation_steps a multiple of num_generations.",
            )
        self.failed = []
        found = self._rewards(list(groups.values()), judge)
        return [found[row] for row in range(len(prompts))]

    def _rewards(self, groups: list[_Group], judge: Judge) -> dict[int, float | None]:
        """Rewards by row."""
        texts = [list(group.responses) for group in groups]
        ranking = self.rank([group.prompt for group in groups], texts, judge, [group.columns for group in groups])
        compared = {
            (question.group, item)
            for question, p in zip(ranking.asked, ranking.answers, strict=True)
            if p is not None
            for item in (question.first, question.second)
        }
        found: dict[int, float | None] = {}
        for number, group in enumerate(groups):
            # A text ties with itself; a group of identical responses needs no comparison.
            known = [(row, i) for row, i in group.rows if (number, i) in compared or len(group.responses) == 1]
            items = np.array([i for _, i in known], dtype=np.int64)
            group_of = np.full(len(items) ** 2, number)
            p = ranking.strengths.probabilities(group_of, np.repeat(items, len(items)), np.tile(items, len(items)))
            margins = (2 * p - 1).reshape(len(items), len(items)).sum(axis=1) / max(1, len(items) - 1)
            found |= dict.fromkeys((row for row, _ in group.rows), None)
            found |= {row: margin for (row, _), margin in zip(known, margins.tolist(), strict=True)}
        return found

    def rank(
        self,
        prompts: Sequence[Any],
        responses: Sequence[Sequence[str]],
        judge: Judge,
        columns: Sequence[Mapping[str, Any]] | None = None,
    ) -> Ranking:
        """Rank the distinct responses to each prompt; ``failed`` lists the reasons of unanswered questions.

        Args:
            columns: Other data columns by prompt, which the judge's prompt may use.
        """
        rows = columns or [{} for _ in prompts]

        def ask(asked: list[Asked]) -> list[float | None]:
            by_group: dict[int, list[Asked]] = {}
            for question in asked:
                by_group.setdefault(question.group, []).append(question)
            texts = [
                [
                    self._question(judge.prompt, prompts[g], responses[g][q.first], responses[g][q.second], rows[g])
                    for q in questions
                ]
                for g, questions in by_group.items()
            ]
            of_groups = list(by_group.values())
            found: dict[Asked, float | None] = {}
            for index, answers in judge.ask(texts, ("1", "2"), thinking=self.options.asked()):
                found |= {q: self._read(answer) for q, answer in zip(of_groups[index], answers, strict=True)}
            return [found[question] for question in asked]

        from trl_rlaif import rank_all, rank_by_tournament

        sizes = [len(of) for of in responses]
        if self.options.method == "all_pairs":
            return rank_all(ask, sizes)
        at_once = self.options.at_once or max(1, max(sizes, default=0) // 2)
        return rank_by_tournament(ask, sizes, questions=self.options.questions, at_once=at_once)

    def _read(self, answer: Answer) -> float | None:
        """The probability that the response shown first is better."""
        failed = unread([answer])
        if failed:
            self.failed.append(failed)
            return None
        return mean_preference("12", answer.logprobs).p
