"""Rewards of single responses from a judge's distribution over the ratings 1 to 10."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trl_rlaif import (
    YES_NO,
    Answer,
    CriteriaOptions,
    Judge,
    JudgePrompt,
    Label,
    Pair,
    Question,
    RewardLabeler,
    ask_together,
    done_indices,
    rated_label,
    rows_of,
)
from trl_rlaif_direct.criteria import CriteriaRating, label_by_criteria, rate_by_criteria
from trl_rlaif_direct.rating import RATINGS, Rating, rating

if TYPE_CHECKING:
    import torch

Asked = dict[tuple[str, ...], list[list[Question]]]


class DirectOptions(CriteriaOptions):
    """Options of `direct`."""


class DirectLabeler(RewardLabeler):
    """Direct rewards (Lee et al. 2023, section 2.2.2).

    With a judge it is a reward function for PPOTrainer and for TRL's GRPOTrainer and RLOOTrainer:
    ``reward_funcs=[DirectLabeler(judge)]``. As a labeler it rates both responses of a pair.

    Args:
        judge: The judge to ask when called as a reward function.
        options: See DirectOptions.
    """

    Options = DirectOptions
    options: DirectOptions
    candidates: Sequence[str] = RATINGS
    __name__ = "direct"

    def __init__(self, judge: Judge | None = None, **options: Any) -> None:
        super().__init__(judge, **options)
        if self.options.criteria:
            self.candidates = ()  # judge training supports a single question only

    def check_prompt(self, prompt: JudgePrompt) -> None:
        """See Labeler."""
        self._questions(prompt, "", "", None)

    def columns(self, prompt: JudgePrompt) -> Collection[str]:
        """See Labeler."""
        return {*prompt.columns_of("rating.jinja"), *(prompt.columns_of("check.jinja") if self.options.vetoes else ())}

    def check_row(self, prompt: JudgePrompt, columns: Mapping[str, Any]) -> None:
        """See Labeler."""
        self._questions(prompt, "", "", columns)

    def label(self, pairs: Sequence[Pair], judge: Judge, done: Collection[str] = ()) -> Iterator[Label]:
        """Yield one label per pair; p is the probability that response_1 is rated higher, ties counting half."""
        known = done_indices(pairs, done)
        if self.options.criteria:
            yield from self._by_criteria(pairs, judge, known)
            return
        groups = [self.questions(pair, judge.prompt) for pair in pairs]
        for index, answers in judge.ask(groups, RATINGS, thinking=self.options.asked(), done=known):
            yield self._label(pairs[index].id, answers, judge.name)

    def questions(self, pair: Pair, prompt: JudgePrompt) -> list[Question]:
        """One question per response."""
        how: dict[str, Any] = {"columns": pair.extra, "think": self.options.thinking}
        return [prompt.rate(pair.prompt, response, **how) for response in pair.responses]

    def teaching_loss(self, logprobs: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of which response is rated higher, ties counting half, as in the label."""
        import torch

        def log_higher(rating: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            up_to = other.logcumsumexp(-1)
            below = torch.nn.functional.pad(up_to[:, :-1], (1, 0), value=-math.inf)
            return (rating + torch.logaddexp(up_to, below) - math.log(2)).logsumexp(-1)

        first, second = logprobs.unbind(1)
        return -(p * log_higher(first, second) + (1 - p) * log_higher(second, first))

    def _by_criteria(self, pairs: Sequence[Pair], judge: Judge, known: Collection[int]) -> Iterator[Label]:
        """Every criterion is a separate question; the questions about one response are computed together."""
        asked = [[self._questions(judge.prompt, pair.prompt, r, pair.extra) for r in pair.responses] for pair in pairs]
        items = [{kind: [*first[kind], *second[kind]] for kind in first} for first, second in asked]
        for index, found in ask_together(judge, items, thinking=self.options.asked(), done=known):
            both = [{kind: of[side] for kind, of in found.items()} for side in (0, 1)]
            yield label_by_criteria(pairs[index].id, self.options, both, judge.name)

    def rate(
        self, prompts: Sequence[Any], responses: Sequence[str], judge: Judge, **columns: Any
    ) -> list[Rating | CriteriaRating | None]:
        """Rate each response; None if the judge gives no rating, with the reason in ``failed``.

        Args:
            columns: Data columns by name, each a list with one value per response.
        """
        rows = rows_of(columns, self.columns(judge.prompt), len(responses))
        items = [
            self._questions(judge.prompt, prompt, response, row)
            for prompt, response, row in zip(prompts, responses, rows, strict=True)
        ]
        found = dict(ask_together(judge, items, thinking=self.options.asked()))
        read = [self._read({kind: answers for kind, (answers,) in found[i].items()}) for i in range(len(items))]
        self.failed = [one for one in read if isinstance(one, str)]
        return [None if isinstance(one, str) else one for one in read]

    def _questions(self, template: JudgePrompt, prompt: Any, response: str, columns: Mapping[str, Any] | None) -> Asked:
        """The questions about one response: its rating, overall or by each criterion, and the vetoes."""
        options = self.options
        how: dict[str, Any] = {"columns": columns, "think": options.thinking}
        criteria = [of.description or name for name, of in options.weighed.items()] or [""]
        found: Asked = {RATINGS: [[template.rate(prompt, response, criterion=one, **how) for one in criteria]]}
        if options.vetoes:
            found[YES_NO] = [[template.check(prompt, response, one, **how) for one in options.vetoes.values()]]
        return found

    def _read(self, answers: Mapping[tuple[str, ...], list[Answer]]) -> Rating | CriteriaRating | str:
        """A response's rating, or the reason why there is none."""
        if self.options.criteria:
            return rate_by_criteria(self.options, answers)
        (answer,) = answers[RATINGS]
        return answer.failed or rating(answer.logprobs)

    def rewards(
        self, prompts: Sequence[Any], responses: Sequence[str], judge: Judge, **columns: Any
    ) -> list[float | None]:
        """In [-1, 1]; see RewardLabeler."""
        return [None if one is None else one.reward for one in self.rate(prompts, responses, judge, **columns)]

    def _label(self, id: str, answers: list[Answer], judge: str) -> Label:
        rated = [answer.failed or rating(answer.logprobs) for answer in answers]
        label = rated_label(id, judge, rated, [[answer] for answer in answers])
        if label.skipped:
            return label
        first, second = (list(one.probabilities) for one in rated if isinstance(one, Rating))
        return replace(label, ratings_1=first, ratings_2=second)
