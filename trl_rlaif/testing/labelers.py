"""The contract of a labeler, line by line."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from trl_rlaif.components import Labeler
from trl_rlaif.data import Pair
from trl_rlaif.judging.judge import Group, Judge
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.judging.question import Answer
from trl_rlaif.testing.checks import Subject, same
from trl_rlaif.testing.data import make_pairs, make_ragged_pairs, make_rollout
from trl_rlaif.testing.judges import ScriptedJudge
from trl_rlaif.types import Label
from trl_rlaif.validation import checked_labels

# Steps of the optimizer that looks for the answers which a label asks for, and how near the label must come.
_STEPS, _CLOSE = 300, 0.02


def check_labeler(
    labeler: Labeler | type[Labeler],
    *,
    judge: Callable[[], Judge] = ScriptedJudge,
    pairs: Sequence[Pair] | None = None,
) -> None:
    """Check that a labeler keeps its contract.

    One label a pair, probabilities in [0, 1] as plain numbers, what is done left out, each label the same in every
    run and whatever else is labeled, pairs as they were, ragged pairs labeled or skipped with a reason. One that is
    callable is checked as a reward function too, and one with ``candidates`` for what the stage judge needs of it.

    Args:
        labeler: An instance, whose options are taken, or a class whose options all have defaults.
        judge: Makes the judge that it asks; by default one whose answers are arbitrary and repeatable.
        pairs: At least two that it can label, ids unique; made on the spot by default.

    Raises:
        AssertionError: With the labeler's name, what is wrong, and how to mend it.
    """
    check = _Check(Subject(labeler, Labeler), judge, list(pairs) if pairs else make_pairs())
    labels = check.whole()
    check.repeated(labels)
    check.resumed(labels)
    check.alone(labels)
    check.empty()
    check.ragged()
    if check.subject.fresh().candidates:
        check.teaching()
    if callable(check.subject.fresh()):
        check.reward_function()


class _Answering(Judge):
    """Gives these answers to every pair."""

    def __init__(self, answers: list[Answer], prompt: JudgePrompt) -> None:
        super().__init__(prompt, "answering")
        self._answers = answers

    def ask(self, groups: Sequence[Group], candidates: Sequence[str], **_: Any) -> Iterator[tuple[int, list[Answer]]]:
        """The answers to the questions of each group."""
        yield from ((index, self._answers) for index in range(len(groups)))


class _Check:
    def __init__(self, subject: Subject, judge: Callable[[], Judge], pairs: list[Pair]) -> None:
        self.subject, self.judge, self.pairs, self.fail = subject, judge, pairs, subject.fail

    def label(self, pairs: Sequence[Pair], what: str, done: Collection[str] = ()) -> dict[str, Label]:
        """A fresh instance's labels by id, each of them checked."""
        given, known = copy.deepcopy(list(pairs)), copy.copy(done)
        labeler, judge = self.subject.fresh(), self.judge()

        def run() -> list[Any]:
            found = labeler.label(given, judge, known)
            if not isinstance(found, Iterator):
                self.fail(
                    f"label() returns a {type(found).__name__}",
                    "Yield each label as soon as it is known: a kill then loses only what is in flight.",
                )
            return list(found)

        labels = self._by_id(self.subject.call(f"label() on {what}", run), given, done)
        if not same(given, list(pairs)) or known != done:
            self.fail("label() changes the pairs or done", "Copy what you change: the run goes on with them.")
        return labels

    def _by_id(self, found: list[Any], pairs: Sequence[Pair], done: Collection[str]) -> dict[str, Label]:
        with self.subject.rules("label()"):
            return {label.id: label for label in checked_labels(found, pairs, done)}

    def whole(self) -> dict[str, Label]:
        """Labels of all pairs; one of them at least must be a label."""
        labels = self.label(self.pairs, "ordinary pairs")
        if all(label.skipped for label in labels.values()):
            reason = next(iter(labels.values())).skipped
            self.fail(
                f"every pair is skipped: {reason}", "Pass pairs that it can label: check_labeler(..., pairs=...)."
            )
        return labels

    def repeated(self, labels: dict[str, Label]) -> None:
        again = self.label(self.pairs, "the same pairs a second time")
        self._equal(labels, again, "in a second run", "Draw from a generator of your own, seeded by an option.")

    def resumed(self, labels: dict[str, Label]) -> None:
        done = {pair.id for pair in self.pairs[::2]}
        rest = self.label(self.pairs, "pairs half of which are done", done)
        if len(done) == len(self.pairs):
            return
        self._equal(
            {id: label for id, label in labels.items() if id not in done}, rest, "where others are done",
            "Make it depend on the pair alone, so that a run that was stopped goes on as it would have.",
        )  # fmt: skip

    def alone(self, labels: dict[str, Label]) -> None:
        pair = self.pairs[-1]
        found = self.label([pair], "a single pair")
        self._equal({pair.id: labels[pair.id]}, found, "where it is labeled alone", "Make it depend on the pair alone.")

    def empty(self) -> None:
        self.label([], "no pairs")
        self.label(self.pairs, "pairs that are all done", [pair.id for pair in self.pairs])

    def ragged(self) -> None:
        for pair in make_ragged_pairs():
            self.label([pair], f"a pair with {pair.id}")

    def _equal(self, first: dict[str, Label], second: dict[str, Label], when: str, fix: str) -> None:
        for id, label in first.items():
            if not same(label, second[id]):
                self.fail(f"the label of {id!r} is another one {when}", fix)

    def teaching(self) -> None:
        """Its questions fit each other, and answers that lower its teaching loss bring the label to its target."""
        labeler, prompt = self.subject.fresh(), self.judge().prompt
        questions = [self.subject.call("questions()", partial(labeler.questions, pair, prompt)) for pair in self.pairs]
        if len({len(of) for of in questions}) > 1 or not questions[0]:
            self.fail("questions() asks about some pairs more often than about others", "Ask the same of every pair.")
        if len({question.ending for of in questions for question in of}) > 1:
            self.fail("questions() has several endings", "End all with the same text: candidates complete it.")
        for target in (0.2, 0.9):
            learned = self._learned(labeler, len(questions[0]), target)
            answers = [Answer((tuple(row),)) for row in learned.tolist()]
            label = next(iter(labeler.label(self.pairs[:1], _Answering(answers, prompt))))
            if label.p is None or abs(label.p - target) > _CLOSE:
                self.fail(
                    f"answers that teaching_loss() brings to {target} make the label {label.p}",
                    "Give a loss that is least where label() reads the target.",
                )

    def _learned(self, labeler: Labeler, questions: int, target: float) -> torch.Tensor:
        """(questions, candidates), the normalized log-probabilities at which the teaching loss is least."""
        logits = torch.zeros(1, questions, len(labeler.candidates), requires_grad=True)
        optimizer, p = torch.optim.Adam([logits], lr=0.1), torch.tensor([target])
        for _ in range(_STEPS):
            optimizer.zero_grad()
            loss = self.subject.call("teaching_loss()", partial(labeler.teaching_loss, logits.log_softmax(-1), p))
            if not isinstance(loss, torch.Tensor) or loss.shape != (1,) or not loss.isfinite().all():
                self.fail(f"teaching_loss() returns {loss!r} for one pair", "Return a finite tensor of shape (B,).")
            loss.sum().backward()
            optimizer.step()
        return logits.detach().log_softmax(-1)[0]

    def reward_function(self) -> None:
        """With GRPOTrainer's signature: a finite number a completion, whichever form they have."""
        if not isinstance(getattr(self.subject.fresh(), "__name__", None), str):
            self.fail("is callable and has no __name__", "Set self.__name__: trainers call the reward by it in logs.")
        for chat in (True, False):
            rollout, labeler = make_rollout(chat=chat), self.subject.fresh()
            labeler.judge = self.judge()
            # Each prompt twice, one behind the other, for what compares the responses to one prompt.
            prompts = (
                [rollout.prompts[i // 2 * 2] for i in range(len(rollout.prompts))] if labeler.ranks else rollout.prompts
            )
            arguments = {
                "prompts": prompts,
                "completions": rollout.completions,
                "completion_ids": rollout.response_ids.tolist(),
                **rollout.columns,
            }
            given = copy.deepcopy(arguments)
            what = f"calling it as a reward function on {'messages' if chat else 'texts'}"
            rewards = self.subject.call(what, partial(labeler, **given))
            count = len(rollout.prompts)
            if not isinstance(rewards, list) or len(rewards) != count:
                self.fail(f"{what} does not return a list of {count} rewards", "Return one number a completion.")
            bad = [r for r in rewards if not isinstance(r, int | float) or not math.isfinite(r)]
            if bad:
                self.fail(f"{what} returns the reward {bad[0]!r}", "Return a finite number for every completion.")
            if not same(given, arguments):
                self.fail(f"{what} changes its arguments", "Copy what you change: the trainer goes on with them.")
