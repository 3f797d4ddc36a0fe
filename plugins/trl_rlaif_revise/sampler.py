"""Samples a response, its critique under a principle, and its revision: a pair, and text for fine-tuning."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from trl_rlaif import DataPath, Options, PairSampler, Prompt, SampledPair, as_messages, follow_up, read_records

if TYPE_CHECKING:
    from trl_rlaif.components import Generate


class Principle(Options):
    """A row of the principles file: the requests for a critique and for a revision."""

    name: str = Field(pattern=r"\S", description="Name of the principle in pairs.")
    critique: str = Field(pattern=r"\S", description="Asks the model to criticize its response.")
    revision: str = Field(pattern=r"\S", description="Asks the model to revise its response by its critique.")


class ReviseOptions(Options):
    """Options of `revise`."""

    principles: DataPath = Field(description="A file with one principle per row: name, critique and revision.")


class Revise(PairSampler):
    """Critique and revision, the supervised stage of Constitutional AI (Bai et al. 2022, section 3.1).

    For each prompt, a principle is drawn. The model responds, critiques its response at the principle's critique
    request in the same conversation, and then revises it at the revision request. The pair is (response, revision);
    the judge decides which one is better. Revisions are kept for fine-tuning.

    A prompt is dropped if one of the three is empty or does not fit into the model's context, if the revision equals
    the response, or if the prompt ends with an assistant turn, which a revision would not continue.
    """

    Options = ReviseOptions
    options: ReviseOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.principles = read_records(self.options.principles, Principle)

    def sample(self, prompts: Sequence[Prompt], generate: Generate, seed: int) -> Iterator[SampledPair]:
        """See PairSampler."""
        drawn = {prompt.id: random.Random(f"{seed} {prompt.id}").choice(self.principles) for prompt in prompts}
        opened = {prompt.id for prompt in prompts if as_messages(prompt.prompt)[-1]["role"] == "assistant"}
        dropped = dict.fromkeys(opened, "assistant's turn to be continued")
        asked: dict[str, Any] = {prompt.id: prompt.prompt for prompt in prompts if prompt.id not in opened}
        responses = _answers(generate, asked, "response", dropped)
        asked = {id: follow_up(asked[id], text, drawn[id].critique) for id, text in responses.items()}
        critiques = _answers(generate, asked, "critique", dropped)
        asked = {id: follow_up(asked[id], text, drawn[id].revision) for id, text in critiques.items()}
        revisions = _answers(generate, asked, "revision", dropped)
        for prompt in prompts:
            id = prompt.id
            if id in dropped:
                yield SampledPair(id, dropped=dropped[id])
            elif revisions[id] == responses[id]:
                yield SampledPair(id, dropped="revision equal to the response")
            else:
                made = {"principle": drawn[id].name, "critique": critiques[id]}
                yield SampledPair(id, responses[id], revisions[id], made, revision=revisions[id])


def _answers(
    generate: Generate, conversations: Mapping[str, Any], what: str, dropped: dict[str, str]
) -> dict[str, str]:
    """The model's answers; reasons for missing ones are added to ``dropped``."""
    answers = generate(conversations) if conversations else {}
    for id, text in answers.items():
        if not text:
            dropped[id] = f"no room for the {what} in the context" if text is None else f"empty {what}"
    return {id: text for id, text in answers.items() if text}
