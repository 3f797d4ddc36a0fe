"""A judge scripted by a function, and a short prompt for tests."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from jinja2 import Environment

from trl_rlaif.judging.framing import unframed
from trl_rlaif.judging.judge import Judge
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.judging.question import Answer, Question, Thinking
from trl_rlaif.recipe import prompt_folder

PARTS = {
    "base.txt": "You are a judge. Answer with 1 or 2 only.",
    "detailed.txt": "You are a judge. Take your time, and answer with 1 or 2 only.",
    "sample.jinja": "Request:\n{{ context }}\n\nResponse 1:\n{{ response_1 }}\n\nResponse 2:\n{{ response_2 }}",
    "ending.txt": "Preferred Response=",
    "thinking.txt": "Let us compare.",
    "rubric.txt": "You are a judge. Answer with a number from 1 to 10.",
    "rating.jinja": "Request:\n{{ context }}\n\nResponse:\n{{ response }}",
    "rating_ending.txt": "Rating=",
    "rating_thinking.txt": "Let us look at it.",
    "check.txt": "You are a judge. Answer Yes or No.",
    "check.jinja": "Request:\n{{ context }}\n\nResponse:\n{{ response }}\n\nRequirement:\n{{ criterion }}",
    "check_ending.txt": "Met=",
    "check_thinking.txt": "Let us check it.",
}


def make_judge_prompt(**parts: str | None) -> JudgePrompt:
    """A short prompt; ``ending="..."`` replaces ending.txt (or .jinja), None removes it."""
    merged: dict[str, str | None] = dict(PARTS)
    for name, text in parts.items():
        merged[f"{name}.jinja" if f"{name}.jinja" in PARTS else f"{name}.txt"] = text
    return JudgePrompt("short", {name: text for name, text in merged.items() if text is not None})


def shown(prompt: JudgePrompt, question: Question) -> dict[str, str]:
    """The texts in a question: context, response_1 and response_2, or response, and the criterion, if any."""
    names = ("context", "response_1", "response_2", "response", "criterion")
    for name in ("sample.jinja", "check.jinja", "rating.jinja"):
        for asked in (names, names[:-1]):  # with a criterion, templates end differently
            keys = dict.fromkeys(names, "") | {key: f"\ue000{key}\ue001" for key in asked}
            rendered = Environment().from_string(prompt.parts.get(name, "\ue002")).render(**keys)
            pattern = re.sub("\ue000(\\w+)\ue001", r"(?P<\1>.*)", re.escape(rendered))
            if found := re.search(pattern + r"\Z", question.messages[-1]["content"], re.DOTALL):
                return {key: unframed(text) for key, text in found.groupdict().items()}
    raise AssertionError("no sample of this prompt")


class ScriptedJudge(Judge):
    """A judge that answers by a function, the last group first.

    Args:
        rule: Called with a question's texts (context, response_1, response_2 in the order shown; or context,
            response; or context, response, criterion). Returns log-odds of the first of two candidates, a log-weight
            for each candidate, or a text with the reason for a missing answer. By default, answers are arbitrary but
            deterministic by question.
        prompt: The judge's prompt; the packaged ``general`` by default.
        mass: Total probability of all candidates.
        rationale: Function that writes rationales: (texts, number of the rationale) -> rationale.

    ``asked`` keeps the arguments of each call.
    """

    def __init__(
        self,
        rule: Callable[..., float | Sequence[float] | str] | None = None,
        *,
        prompt: JudgePrompt | None = None,
        name: str = "scripted",
        mass: float = 0.9,
        rationale: Callable[[dict[str, str], int], str] = lambda texts, number: f"because {number}",
    ) -> None:
        super().__init__(prompt or JudgePrompt.load(prompt_folder("general")), name)
        self.rule, self.mass, self.rationale = rule, mass, rationale
        self.asked: list[dict[str, Any]] = []

    def ask(
        self,
        groups: Sequence[Sequence[Question]],
        candidates: Sequence[str],
        *,
        thinking: Thinking | None = None,
        done: Collection[int] = (),
    ) -> Iterator[tuple[int, list[Answer]]]:
        """See Judge."""
        self.asked.append({"groups": groups, "candidates": candidates, "thinking": thinking, "done": done})
        for index in reversed(range(len(groups))):
            if index not in done:
                yield index, [self._answer(question, candidates, thinking) for question in groups[index]]

    def _answer(self, question: Question, candidates: Sequence[str], thinking: Thinking | None) -> Answer:
        texts = shown(self.prompt, question) if self.rule else {}
        numbers = range(thinking.rationales) if thinking else ()
        rationales = tuple(self.rationale(texts, number) for number in numbers)
        found = self.rule(**texts) if self.rule else _arbitrary(question, candidates)
        if isinstance(found, str):
            return Answer(rationales=rationales, failed=found)
        weights = [found / 2, -found / 2] if isinstance(found, int | float) else list(found)
        assert len(weights) == len(candidates)
        high = max(weights)
        total = high + math.log(math.fsum(math.exp(weight - high) for weight in weights))
        logprobs = tuple(math.log(self.mass) + weight - total for weight in weights)
        return Answer((logprobs,) * max(1, len(rationales)), rationales)


def _arbitrary(question: Question, candidates: Sequence[str]) -> list[float]:
    generator = random.Random(question.messages[-1]["content"])  # a text gives the same numbers in every process
    return [generator.gauss(0, 1) for _ in candidates]
