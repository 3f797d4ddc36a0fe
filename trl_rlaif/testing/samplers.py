"""The contract of a pair sampler, line by line, and a policy that answers by a rule."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from trl_rlaif.components import PairSampler
from trl_rlaif.encoding import PromptLike, as_text
from trl_rlaif.testing.checks import Subject, same, seeded
from trl_rlaif.testing.data import make_pairs, make_ragged_pairs
from trl_rlaif.types import Prompt, SampledPair
from trl_rlaif.validation import checked_pairs

if TYPE_CHECKING:
    from trl_rlaif.components import Generate

Rule = Callable[[str], str | None]


def _arbitrary(conversation: str) -> str:
    return f"Answer {hashlib.sha256(conversation.encode('utf-8', 'replace')).hexdigest()[:12]}."


class ScriptedPolicy:
    """A starting policy that answers by a rule, as a pair sampler calls it.

    As with a real one, a second answer to a conversation is another one: it depends on how often it was asked before.

    Args:
        rule: A conversation as text, with a line that counts the calls before it, to the answer; None where there is no
            room for one. By default arbitrary and repeatable.
    """

    def __init__(self, rule: Rule = _arbitrary) -> None:
        self.rule, self.calls = rule, 0

    def __call__(self, conversations: Mapping[str, PromptLike]) -> dict[str, str | None]:
        self.calls += 1
        return {id: self.rule(f"{as_text(of)}\n{self.calls - 1}") for id, of in conversations.items()}


def check_pair_sampler(
    sampler: PairSampler | type[PairSampler],
    *,
    policy: Callable[[], Generate] = ScriptedPolicy,
    prompts: Sequence[Prompt] | None = None,
) -> None:
    """Check that a pair sampler keeps its contract.

    For each prompt one or more pairs of different texts, or a reason why there is none; the same pairs in every run and
    whatever else is in the batch; other ones are allowed with another seed only; prompts as they were; ragged prompts,
    empty and equal answers and conversations without room for an answer sampled, dropped, or refused with a UserError.

    Args:
        sampler: An instance, whose options are taken, or a class whose options all have defaults.
        policy: Makes the policy that it asks; by default one whose answers are arbitrary and repeatable.
        prompts: At least two of which it can make pairs, ids unique; made on the spot by default.

    Raises:
        AssertionError: With the sampler's name, what is wrong, and how to mend it.
    """
    made = [Prompt(pair.id, pair.prompt, pair.category, pair.extra) for pair in make_pairs()]
    check = _Check(Subject(sampler, PairSampler), policy, list(prompts) if prompts else made)
    pairs = check.whole()
    check.repeated(pairs)
    check.alone(pairs)
    check.ragged()


class _Check:
    def __init__(self, subject: Subject, policy: Callable[[], Generate], prompts: list[Prompt]) -> None:
        self.subject, self.policy, self.prompts, self.fail = subject, policy, prompts, subject.fail

    def sample(
        self, prompts: Sequence[Prompt], what: str, generate: Generate | None = None, *, ragged: bool = False
    ) -> dict[str, list[SampledPair]]:
        """What a fresh instance makes of each prompt, checked; nothing where ragged ones are refused in words."""
        given, sampler, where = copy.deepcopy(list(prompts)), self.subject.fresh(), f"sample() on {what}"
        asked = generate or self.policy()
        found = self.subject.call(where, lambda: list(sampler.sample(given, asked, 0)), may_refuse=ragged)
        if not same(given, list(prompts)):
            self.fail(f"{where} changes the prompts", "Copy what you change: the run goes on with them.")
        if found is None:
            return {}
        with self.subject.rules(where):
            return checked_pairs(found, given)

    def whole(self) -> dict[str, list[SampledPair]]:
        """Pairs of all prompts; one of them at least must be a pair."""
        with seeded(1):
            pairs = self.sample(self.prompts, "ordinary prompts")
        if all(pair.dropped for of in pairs.values() for pair in of):
            reason = next(iter(pairs.values()))[0].dropped
            self.fail(
                f"every prompt is dropped: {reason}",
                "Pass prompts or a policy of which it can make pairs: check_pair_sampler(..., policy=...).",
            )
        return pairs

    def repeated(self, pairs: dict[str, list[SampledPair]]) -> None:
        with seeded(2):
            again = self.sample(self.prompts, "the same prompts a second time")
        for id, of in pairs.items():
            if not same(of, again[id]):
                fix = "Draw from a generator of your own, seeded by the seed and the prompt's id."
                self.fail(f"the pairs of {id!r} are other ones in a second run", fix)

    def alone(self, pairs: dict[str, list[SampledPair]]) -> None:
        for prompt in (self.prompts[0], self.prompts[-1]):
            found = self.sample([prompt], "a single prompt")
            if not same(pairs[prompt.id], found[prompt.id]):
                fix = "Make it depend on the prompt, the seed and what was generated alone."
                self.fail(f"the pairs of {prompt.id!r} are other ones where it is alone", fix)

    def ragged(self) -> None:
        """Prompts and answers that real runs meet sooner or later."""
        opened = [{"role": "user", "content": "Name a city."}, {"role": "assistant", "content": "The city is"}]
        texts = [Prompt(pair.id, pair.prompt) for pair in make_ragged_pairs()]
        for prompt in [*texts, Prompt("an answer that is begun", opened)]:
            self.sample([prompt], f"a prompt with {prompt.id}", ragged=True)
        rules: dict[str, Rule] = {
            "empty answers": lambda _: "",
            "equal answers": lambda _: "The same.",
            "conversations without room for an answer": lambda _: None,
        }
        for what, rule in rules.items():
            self.sample(self.prompts, what, ScriptedPolicy(rule), ragged=True)
