"""Labels pairs with probabilities from a judge's distribution over "1" and "2" in both orders."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trl_rlaif import (
    YES_NO,
    Answer,
    CriteriaOptions,
    Judge,
    JudgePrompt,
    Label,
    Labeler,
    Pair,
    Question,
    ask_together,
    done_indices,
)
from trl_rlaif_distilled.criteria import label_by_criteria
from trl_rlaif_distilled.debias import Debias, Order, combine, mean_preference, unread

if TYPE_CHECKING:
    import torch

CHOICES = ("1", "2")
Asked = dict[tuple[str, ...], list[list[Question]]]


class DistilledOptions(CriteriaOptions):
    """Options of `distilled`."""

    preamble: Literal["base", "detailed"] = Field("base", description="Length of the judge's instructions.")
    shots: int = Field(0, ge=0, le=8, description="Number of exemplars before the pair.")
    orders: Literal["both", "12", "21"] = Field(
        "both", description="Orders in which the judge sees the pair; a single one is for ablations."
    )
    debias: Debias = Field(
        "mean_logit",
        description="How the two orders are combined: mean_prob (as in the paper) or mean_logit, which "
        "cancels a position bias without losing confidence.",
    )


class DistilledLabeler(Labeler):
    """Soft labels from token probabilities (Lee et al. 2023, section 2.1)."""

    Options: ClassVar[type[DistilledOptions]] = DistilledOptions
    options: DistilledOptions
    candidates: Sequence[str] = CHOICES

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.options.criteria:
            self.candidates = ()  # judge training supports a single question only

    def check_prompt(self, prompt: JudgePrompt) -> None:
        """See Labeler."""
        self._question(prompt, "", "", "", None, *self._descriptions()[:1])
        if self.options.vetoes:
            prompt.check("", "", "", columns=None, think=self.options.thinking)

    def columns(self, prompt: JudgePrompt) -> Collection[str]:
        """See Labeler."""
        return {*prompt.columns_of("sample.jinja"), *(prompt.columns_of("check.jinja") if self.options.vetoes else ())}

    def check_row(self, prompt: JudgePrompt, columns: Mapping[str, Any]) -> None:
        """See Labeler."""
        self._question(prompt, "", "", "", columns)
        if self.options.vetoes:
            prompt.check("", "", "", columns=columns)

    def label(self, pairs: Sequence[Pair], judge: Judge, done: Collection[str] = ()) -> Iterator[Label]:
        """Yield one label per pair."""
        known = done_indices(pairs, done)
        if self.options.criteria:
            yield from self._by_criteria(pairs, judge, known)
            return
        groups = [self.questions(pair, judge.prompt) for pair in pairs]
        for index, answers in judge.ask(groups, self.candidates, thinking=self.options.asked(), done=known):
            yield self._label(pairs[index].id, answers, judge.name)

    def questions(self, pair: Pair, prompt: JudgePrompt) -> list[Question]:
        """One question per order."""
        shown = {
            "12": (pair.response_1, pair.response_2),
            "21": (pair.response_2, pair.response_1),
        }
        return [self._question(prompt, pair.prompt, *shown[order], pair.extra) for order in self._orders()]

    def teaching_loss(self, logprobs: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """Cross-entropy over both candidates, averaged over the orders."""
        import torch

        target = torch.stack((p, 1 - p), -1)
        targets = torch.stack([target if order == "12" else target.flip(-1) for order in self._orders()], 1)
        return -(targets * logprobs).sum(-1).mean(-1)

    def _by_criteria(self, pairs: Sequence[Pair], judge: Judge, known: Collection[int]) -> Iterator[Label]:
        """Every criterion is a separate question; the questions about one order are computed together."""
        options, orders = self.options, self._orders()
        items = [self._criteria_questions(pair, judge.prompt) for pair in pairs]
        for index, found in ask_together(judge, items, thinking=options.asked(), done=known):
            compared = dict(zip(orders, found[CHOICES], strict=True))
            checked = found.get(YES_NO, [])
            yield label_by_criteria(pairs[index].id, options, options.debias, compared, checked, judge.name)

    def _criteria_questions(self, pair: Pair, prompt: JudgePrompt) -> Asked:
        shown = {"12": pair.responses, "21": pair.responses[::-1]}
        columns, think = pair.extra, self.options.thinking
        found: Asked = {
            CHOICES: [
                [self._question(prompt, pair.prompt, *shown[order], columns, one) for one in self._descriptions()]
                for order in self._orders()
            ]
        }
        if self.options.vetoes:
            found[YES_NO] = [
                [prompt.check(pair.prompt, response, one, columns=columns, think=think) for one in self._vetoes()]
                for response in pair.responses
            ]
        return found

    def _descriptions(self) -> list[str]:
        return [of.description or name for name, of in self.options.weighed.items()]

    def _vetoes(self) -> list[str]:
        return [*self.options.vetoes.values()]

    def _question(
        self,
        template: JudgePrompt,
        prompt: Any,
        first: str,
        second: str,
        columns: Mapping[str, Any] | None,
        criterion: str = "",
    ) -> Question:
        options = self.options
        how: dict[str, Any] = {"preamble": options.preamble, "shots": options.shots, "think": options.thinking}
        return template.compare(prompt, first, second, criterion=criterion, columns=columns, **how)

    def _orders(self) -> tuple[Order, ...]:
        return ("12", "21") if self.options.orders == "both" else (self.options.orders,)

    def _label(self, id: str, answers: list[Answer], judge: str) -> Label:
        rationales: dict[str, Any] = {
            f"rationale_{order}": a.rationale for order, a in zip(self._orders(), answers, strict=True)
        }
        failed = unread(answers)
        if failed:
            return Label(id, judge=judge, skipped=failed, **rationales)
        read = {o: mean_preference(o, a.logprobs) for o, a in zip(self._orders(), answers, strict=True)}
        p = combine([found.logit for found in read.values()], self.options.debias)
        numbers: dict[str, Any] = {f"p_{order}": found.p for order, found in read.items()}
        numbers |= {f"mass_{order}": found.mass for order, found in read.items()}
        numbers |= {f"bound_{o}": a.bound for o, a in zip(self._orders(), answers, strict=True) if a.bound}
        numbers |= {"voted": True} if any(answer.voted for answer in answers) else {}
        return Label(id, p=p, judge=judge, **numbers, **rationales)
