"""Labels through OpenAI-style batch files: exports requests for unlabeled pairs, imports answers to labels.jsonl."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trl_rlaif.data import Pair
from trl_rlaif.errors import UserError
from trl_rlaif.files import to_line, write_atomically
from trl_rlaif.judging.batch import DIGITS, URLS, BatchJudge
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.judging.usage import Meter
from trl_rlaif.labels import LabelKey, LabelStore
from trl_rlaif.labels.store import KEY, last_places, once
from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.judges import price_of, server_of
from trl_rlaif.pipeline.label_tasks import LabelTask, label_key, label_tasks
from trl_rlaif.pipeline.outside_labels import opened_to_label
from trl_rlaif.pipeline.stored_pairs import StoredPairs
from trl_rlaif.pipeline.usage import counted
from trl_rlaif.plugins import Plugins
from trl_rlaif.recipe import Recipe, ServerJudgeSection, prompt_folder
from trl_rlaif.types import Label

# Maximum number of pairs named in a message.
_NAMED = 5


@dataclass
class Imported:
    """The outcome of importing answers.

    Args:
        labeled: Newly labeled pairs.
        known: Pairs labeled before.
        failed: Pairs that could not be judged, by reason.
        missing: Ids of pairs with a missing answer.
        foreign: Answers to requests that this recipe does not make, such as with another prompt.
        tokens: Used by the answers behind the added labels, as the answers report them.
    """

    labeled: int = 0
    known: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    missing: list[str] = field(default_factory=list)
    foreign: int = 0
    tokens: int = 0


def export_batch(recipe: Recipe, plugins: Plugins, output: Path, file: Path) -> tuple[int, int]:
    """Write requests for all pairs of a run that the main labeler has not labeled.

    A line's ``custom_id`` joins the label's keys in the label store and the request's digest.

    Args:
        recipe: Its main judge is on a server.
        plugins: Installed plugins.
        output: The run's folder.
        file: JSON lines for OpenAI's Batch API; replaced.

    Returns:
        The numbers of pairs and of requests.

    Raises:
        UserError: A request depends on earlier answers; the run has no pairs yet; or ``file`` has no folder.
    """
    if not file.parent.is_dir():
        raise UserError(f"There is no folder {file.parent}.", where=str(file), fix="Create it, or name another file.")
    with _opened(recipe, plugins, output) as work:
        missing, url, requests = work.missing(), URLS[work.judge.server.api], 0

        def lines() -> Iterator[str]:
            nonlocal requests
            for pair in missing:
                for digest, body in work.requests(pair).items():
                    requests += 1
                    yield to_line(
                        {"custom_id": f"{work.prefix(pair)}{digest}", "method": "POST", "url": url, "body": body}
                    )

        write_atomically(file, lines())
    return len(missing), requests


def import_batch(recipe: Recipe, plugins: Plugins, output: Path, files: Sequence[Path]) -> Imported:
    """Add labels to a run from answers in files, as if from a server. Importing again adds nothing.

    Args:
        recipe: The one used for the export.
        plugins: Installed plugins.
        output: The run's folder.
        files: JSON lines with ``custom_id`` and ``response`` or ``error``, in any order.

    Raises:
        UserError: A file cannot be read, or a line is invalid; or as in ``export_batch``.
    """
    places = _places(files)
    with _opened(recipe, plugins, output) as work:
        found = Imported()
        by_pair: dict[str, dict[str, tuple[Path, int]]] = {work.prefix_of(k.decode()): {} for k in work.keys.tolist()}
        for id, place in places.items():
            prefix, digest = id[:-DIGITS], id[-DIGITS:]
            if prefix in by_pair:
                by_pair[prefix][digest] = place
            else:
                found.foreign += 1
        missing = work.missing()
        found.known = len(work.pairs) - len(missing)
        for pair in missing:
            given = {digest: _answer_at(*place) for digest, place in by_pair[work.prefix(pair)].items()}
            label = work.label(pair, given)
            if not work.judge.asked.keys() <= given.keys():
                found.missing.append(pair.id)
                continue
            if work.store.add(work.key, pair, label):  # otherwise, the same answers failed before
                work.context.total.add(work.judge.meter.used)
                found.tokens += work.judge.meter.used.tokens
            if label.p is None:
                found.failed[label.skipped or ""] += 1
            else:
                found.labeled += 1
        return found


def describe(found: Imported) -> str:
    """A summary for the terminal, with the pairs that lack an answer."""
    lines = [f"Pairs labeled: {found.labeled:,} (by {found.tokens:,} tokens); labeled before: {found.known:,}."]
    lines += [f"Pairs that could not be judged: {count:,} ({reason})." for reason, count in found.failed.items()]
    if found.missing:
        named = ", ".join(found.missing[:_NAMED]) + (", ..." if len(found.missing) > _NAMED else "")
        lines.append(f"Pairs that lack an answer: {len(found.missing):,} ({named}).")
    if found.foreign:
        lines.append(f"Answers to requests that this recipe does not make: {found.foreign:,}. Was it changed?")
    return "\n".join(lines)


@dataclass
class _Work:
    """Shared by export and import: labels one pair at a time with a judge that is asked through files."""

    context: Context
    task: LabelTask
    judge: BatchJudge
    key: LabelKey
    store: LabelStore
    pairs: StoredPairs
    keys: np.ndarray

    def missing(self) -> StoredPairs:
        """Pairs without a label."""
        judged = [self.store.is_judged(self.key.key, key.decode()) for key in self.keys.tolist()]
        return self.pairs.at(np.flatnonzero(~np.array(judged)))

    def prefix(self, pair: Pair) -> str:
        return self.prefix_of(self.key.of(pair))

    def prefix_of(self, key: str) -> str:
        return f"{self.key.key}-{key}-"

    def requests(self, pair: Pair) -> dict[str, dict[str, Any]]:
        self.label(pair, {})
        return self.judge.asked

    def label(self, pair: Pair, answers: dict[str, Any]) -> Label:
        self.judge.begin(answers)
        self.judge.meter = Meter(price_of(self.task.judge))  # counts only these answers
        (label,) = self.context.create_labeler(self.task.labeler).label([pair], self.judge)
        return label


@contextmanager
def _opened(recipe: Recipe, plugins: Plugins, output: Path) -> Iterator[_Work]:
    section, task = _server_judge(recipe), label_tasks(recipe)[0]
    with opened_to_label(recipe, plugins, output) as context, counted(context, "label"):
        judge = BatchJudge(section.path, JudgePrompt.load(prompt_folder(task.prompt)), server_of(section))
        key, pairs = label_key(context, task), context.pairs()
        everything = np.array([key.of(pair).encode() for pair in pairs], dtype=KEY)
        keys = once(everything)
        pairs = pairs.at(last_places(keys, everything))
        with LabelStore(context.folder / artifacts.LABELS, context.folder.state / artifacts.LABEL_INDEX) as store:
            yield _Work(context, task, judge, key, store, pairs, keys)


def _server_judge(recipe: Recipe) -> ServerJudgeSection:
    """The main judge. Settings whose requests depend on earlier answers are rejected."""
    if recipe.label is None:
        raise UserError("Batch files are for labels, and this recipe has no 'label'.")
    section, judge, where = recipe.label, recipe.label.judge, recipe.line(("label",))
    if not isinstance(judge, ServerJudgeSection):
        what = "Batch files are for a judge on a server."
        raise UserError(what, where=where, fix="Set label.judge: {backend: openai, ...}.")
    thinks = section.main_labeler.options.get("thinking")
    tournament = section.ranking is not None and section.ranking.method == "tournament"
    rounds = recipe.rounds is not None and recipe.rounds.number > 1
    begun = "Set judge.prefill: false; or true, where the server continues an answer as vLLM does."
    for wrong, what, fix in (
        (judge.api == "chat" and judge.prefill == "auto", "prefill: auto is found out by asking the server.", begun),
        (judge.votes > 0, "votes are asked for once an answer cannot be read.", "Set judge.votes: 0."),
        (thinks, "a rationale is asked for before the answer.", "Set thinking: false."),
        (tournament, "a tournament asks by the answers before.", "Set label.ranking.method: all_pairs."),
        (rounds, "a round samples from what the round before has trained.", "Leave out rounds."),
    ):
        if wrong:
            raise UserError(f"A batch file asks everything at once, and {what}", where=where, fix=fix)
    return judge


def _places(files: Sequence[Path]) -> dict[str, tuple[Path, int]]:
    """Each answer's file and byte offset, by custom_id; of several, the first successful one, or else the last."""
    found, good = dict[str, tuple[Path, int]](), set[str]()
    for file in files:
        try:
            with file.open("rb") as lines:
                place = 0
                for number, line in enumerate(lines, 1):
                    id, answer = _parsed(line, f"{file}:{number}")
                    if id not in good:
                        found[id] = (file, place)
                    good.update([id] if isinstance(answer, dict) else [])
                    place += len(line)
        except OSError as error:
            raise UserError(f"The answers cannot be read: {error}", where=str(file)) from None
    return found


def _answer_at(file: Path, place: int) -> dict[str, Any] | str:
    with file.open("rb") as lines:
        lines.seek(place)
        return _parsed(lines.readline(), str(file))[1]


def _parsed(line: bytes, where: str) -> tuple[str, dict[str, Any] | str]:
    """The custom_id, and the answer's body or the reason why there is none."""
    try:
        row = json.loads(line)
        return str(row["custom_id"]), _answer(row)
    except (ValueError, KeyError, TypeError, AttributeError):
        what = "the line is not an answer of a batch: an object with custom_id, and response or error."
        raise UserError(what, where=where, fix="Remove the line.") from None


def _answer(row: dict[str, Any]) -> dict[str, Any] | str:
    response = row.get("response") or {}
    body, status = response.get("body"), response.get("status_code", 200)
    if isinstance(body, dict) and status == 200 and not row.get("error"):
        return body
    error = row.get("error") or (body or {}).get("error") or {}
    reason = str(error.get("message") or error.get("code") or "no answer")
    return f"{status}: {reason}" if response else reason
