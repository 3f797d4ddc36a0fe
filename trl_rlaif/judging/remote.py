"""A judge behind an OpenAI-compatible server: vLLM, llama.cpp's server, or a hosted one."""

from __future__ import annotations

import math
import queue
import re
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Generic, NamedTuple, TypeVar

from trl_rlaif.distributed import from_first
from trl_rlaif.errors import UserError
from trl_rlaif.judging.judge import Group, Judge
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.judging.question import Answer, Message, Question, Thinking, Written
from trl_rlaif.judging.server import Connection, Server, ServerGone, Unreadable, reasoning
from trl_rlaif.judging.usage import Meter

# Connection failures in a row after which the server is considered gone.
GONE_AFTER = 3

# A reasoning model's tags, if the server leaves its thoughts in the text.
_THOUGHT_MARKS = re.compile(r"</?think>|\[/?THINK\]")
_THOUGHT = re.compile(r".*(?:</think>|\[/THINK\])", re.DOTALL)

T = TypeVar("T")


class _Read(NamedTuple):
    """One question's distribution, read or sampled; see Answer."""

    logprobs: tuple[float, ...]
    bound: float = 0.0
    voted: bool = False


class _Work(Generic[T]):
    """Indices for worker threads and their results, with a bound on how far the workers run ahead of the consumer.

    Args:
        todo: The indices.
        ahead: Maximum number in progress or waiting for the consumer.
    """

    def __init__(self, todo: Sequence[int], ahead: int) -> None:
        self._todo, self._lock = iter(todo), threading.Lock()
        self._room, self._ahead = threading.Semaphore(ahead), ahead
        self._found: queue.SimpleQueue[tuple[int, T | Exception] | None] = queue.SimpleQueue()
        self.stopped = False

    def take(self) -> int | None:
        """The next index; None if none is left or the work was stopped."""
        self._room.acquire()
        with self._lock:
            return None if self.stopped else next(self._todo, None)

    def give(self, index: int, found: T | Exception) -> None:
        """Hand over the result of an index, or its error."""
        self._found.put((index, found))

    def end(self) -> None:
        """Announce that a thread has ended."""
        self._found.put(None)

    def found(self, threads: int) -> Iterator[tuple[int, T]]:
        """Results as they arrive, until this many threads have ended; an error is raised."""
        while threads:
            item = self._found.get()
            if item is None:
                threads -= 1
                continue
            self._room.release()
            index, found = item
            if isinstance(found, Exception):
                raise found
            yield index, found

    def stop(self) -> None:
        """Let all threads end after their current request."""
        self.stopped = True
        self._room.release(self._ahead)


class RemoteJudge(Judge):
    """A model on a server.

    Args:
        model: Its name on the server.
        prompt: The judge's prompt, which makes the questions.
        server: Its connection settings.
        connection: Sends the requests; None: a new connection to the server.
    """

    def __init__(self, model: str, prompt: JudgePrompt, server: Server, connection: Connection | None = None) -> None:
        super().__init__(prompt, model)
        self.server, self._connection = server, connection or Connection(model, server)
        self._telling = threading.Lock()
        self._takes_n, self._lost, self._told_of_votes = True, 0, False

    def ask(
        self,
        groups: Sequence[Group],
        candidates: Sequence[str],
        *,
        thinking: Thinking | None = None,
        done: Collection[int] = (),
    ) -> Iterator[tuple[int, list[Answer]]]:
        """As in Judge, with several concurrent requests.

        Raises:
            UserError: The server rejects this client altogether (key, model, address).
        """

        def answers(index: int, work: _Work) -> list[Answer]:
            return [self._answer(q, candidates, thinking) for q in groups[index] if not work.stopped]

        todo = [index for index in range(len(groups)) if index not in done]
        return from_first(lambda: self._each(todo, answers))

    def write(
        self, questions: Sequence[Question], *, max_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[Written]:
        """As in Judge. Raises as ``ask``."""
        options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        written = from_first(
            lambda: self._each(range(len(questions)), lambda index, work: self._written(questions[index], options))
        )
        return [text for _, text in sorted(written, key=lambda found: found[0])]

    def _each(self, todo: Sequence[int], do: Callable[[int, _Work[T]], T]) -> Iterator[tuple[int, T]]:
        """Results of ``do`` for each index, as soon as they are available.

        Raises:
            BudgetUsedUp: After the requests in progress, if more are left.
        """
        work: _Work[T] = _Work(todo, ahead=2 * self.server.concurrency)

        def run() -> None:
            while not self.meter.used_up and (index := work.take()) is not None:
                try:
                    work.give(index, do(index, work))
                except Exception as error:  # raised where it is awaited
                    work.give(index, error)
            work.end()

        threads, given = min(self.server.concurrency, len(todo)), 0
        for _ in range(threads):
            # Daemons: a stopped program does not wait for an unresponsive server.
            threading.Thread(target=run, daemon=True).start()
        try:
            for found in work.found(threads):
                given += 1
                yield found
            if given < len(todo):
                raise self.meter.error()
        finally:
            work.stop()

    @property
    def meter(self) -> Meter:
        """Counts the server's tokens."""
        return self._connection.meter

    @meter.setter
    def meter(self, meter: Meter) -> None:
        self._connection.meter = meter

    # ---- One question ---------------------------------------------------------------------------------

    def _answer(self, question: Question, candidates: Sequence[str], thinking: Thinking | None) -> Answer:
        """Answer a question. If it alone fails, the Answer gives the reason.

        Raises:
            UserError: The server rejects this client altogether.
            ServerGone: Several questions in a row were not answered.
        """
        import openai

        rationales: list[str] = []
        try:
            with self._refusals():
                if thinking is not None:
                    rationales += [self._think(question, thinking, i) for i in range(thinking.rationales)]
                asked = [_after(question, self.prompt.quote(text)) for text in rationales] or [question]
                found = [self._distribution(one, candidates) for one in asked]
            bound, voted = max(one.bound for one in found), any(one.voted for one in found)
            return Answer(tuple(one.logprobs for one in found), tuple(rationales), bound=bound, voted=voted)
        except (openai.APIError, Unreadable, ValueError) as error:  # ValueError: the response is not JSON
            return Answer(rationales=tuple(rationales), failed=self._fault(error))

    def _written(self, question: Question, options: dict[str, Any]) -> Written:
        """As ``_answer``."""
        import openai

        try:
            with self._refusals():
                choice, *_ = self._connection.choices(question, "", thinks=True, prefills=False, **options)
                text = _THOUGHT.sub("", self._connection.said(choice, "")).strip()
            return Written(text, ended=getattr(choice, "finish_reason", None) != "length")
        except (openai.APIError, Unreadable, ValueError) as error:
            return Written(failed=self._fault(error))

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Raise UserError if the server rejects this client altogether."""
        import openai

        try:
            yield
            self._lost = 0
        except openai.NotFoundError as error:
            raise self._not_found(error) from None
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise UserError(
                f"The judge's server rejects the request: {_short(error)}",
                where=self._connection.address_of(error),
                fix=f"Check judge.path, judge.base_url and the key in {self.server.api_key_env}.",
            ) from None

    def _fault(self, error: Exception) -> str:
        """Describe why one question failed.

        Raises:
            ServerGone: Several in a row were not answered, so there is no point in trying the rest.
        """
        import openai

        lost = isinstance(error, openai.APIConnectionError)
        self._lost += lost
        if lost and self._lost >= GONE_AFTER:
            raise ServerGone(
                f"The judge's server does not answer: {_short(error)}",
                where=self._connection.address,
                fix="Restart it, then continue with --resume: its answers are kept. A slow server needs a longer "
                "judge.timeout.",
            )
        return f"{_short(error)} ({self._connection.address_of(error)})"

    def _not_found(self, error: Exception) -> UserError:
        """The error after a 404: the model's name or the address is wrong."""
        fix = f"Check judge.path, judge.base_url and the key in {self.server.api_key_env}."
        names, address = self._connection.models(error), self._connection.address_of(error)
        if names and self.name not in names:
            fix = f"Set judge.path to one of its models: {', '.join(names[:20])}."
        elif not names and not address.rstrip("/").endswith("/v1"):
            fix = f"Should judge.base_url be {address.rstrip('/')}/v1? If not, check judge.path."
        return UserError(f"The judge's server rejects the request: {_short(error)}", where=address, fix=fix)

    def _think(self, question: Question, thinking: Thinking, number: int) -> str:
        """The model's own reasoning, followed by the requested explanation."""
        choice, *_ = self._connection.choices(
            replace(question, ending=question.thinking),
            f"{question.thinking} Explain in a few sentences, and do not give your answer yet.",
            thinks=True,
            max_tokens=thinking.max_tokens,
            temperature=thinking.temperature,
            seed=thinking.seed + number,
        )
        # With its tags, the chat template would drop the thoughts from the next request.
        said, ending = _THOUGHT_MARKS.sub("", self._connection.said(choice, question.thinking)), question.ending.strip()
        explained = (said.split(ending)[0] if ending else said).strip()
        return "\n\n".join(text for text in (reasoning(choice).strip(), explained) if text)

    def _distribution(self, question: Question, candidates: Sequence[str]) -> _Read:
        """Log-probabilities of the candidates: read, or if unavailable, estimated from votes."""
        import openai

        instruction = f"Answer with one of {', '.join(candidates)} and nothing else."
        try:
            self._connection.find_out(question, candidates, instruction)
            return self._read(question, candidates, instruction)
        # Some servers refuse log-probabilities. A request refused for another reason will be refused again.
        except (
            Unreadable,
            openai.BadRequestError,
            openai.PermissionDeniedError,
            openai.UnprocessableEntityError,
        ) as error:
            if not self.server.votes:
                raise
            with self._telling:
                if not self._told_of_votes:
                    self._connection.say(f"answers are sampled where they cannot be read; first, {_short(error)}.")
                self._told_of_votes = True
            return self._voted(question, candidates, instruction)

    def _read(self, question: Question, candidates: Sequence[str], instruction: str, again: bool = True) -> _Read:
        tokens, thinks = self._connection.top(question, candidates, instruction)
        found = [math.fsum(p for token, p in tokens if token.strip() == text) for text in candidates]
        least, behind = min(p for _, p in tokens), max(0.0, 1 - math.fsum(p for _, p in tokens))
        unsure = 0.0
        for i, short in enumerate(candidates):
            for j, long in enumerate(candidates):
                if long == short or not long.startswith(short) or found[j] or not found[i]:
                    continue
                if not self._connection.continues:
                    # "1" may be the first of the two tokens of "10", and nothing can be appended to it.
                    unsure += found[i]
                    continue
                # "10" in two tokens: the second one is read after the first.
                end = long[len(short) :]
                rest, _ = self._connection.top(replace(question, ending=question.ending + short), [end], instruction)
                share = math.fsum(p for token, p in rest if token.strip() == end)
                if not share:
                    unsure += found[i] * max(0.0, 1 - math.fsum(p for _, p in rest))
                found[i], found[j] = found[i] * (1 - share), found[i] * share
        missing = [i for i, p in enumerate(found) if p == 0]
        if missing and again and self._connection.more(len(tokens)):
            return self._read(question, candidates, instruction, again=False)
        listed = math.fsum(found)
        # Each is at most the lowest listed probability; together, at most the unlisted mass.
        each = min(least, behind / len(missing)) if missing else 0.0
        hidden = len(missing) * each + (unsure if missing else 0.0)
        bound = hidden / (listed + len(missing) * each) if listed else 1.0
        if missing and bound > self.server.tolerance:
            raise Unreadable(self._why_unread([candidates[i] for i in missing], len(tokens), thinks))
        for i in missing:
            found[i] = each
        return _Read(tuple(math.log(p) if p > 0 else -math.inf for p in found), bound if missing else 0.0)

    def _why_unread(self, missing: Sequence[str], listed: int, thinks: bool) -> str:
        advice = "judge.votes to sample answers instead"
        if thinks:
            advice = "judge.chat_template_kwargs: {enable_thinking: false}, so that the model does not think first"
        elif self.server.api == "chat" and self._connection.prefills is not True:
            advice = f"prefill: true if the server can continue a given answer, as vLLM can; or {advice}"
        return (
            f"the server does not give the probability of {', '.join(missing)}: not among its {listed} likeliest "
            f"tokens, of which the least is not unlikely enough for judge.tolerance (set {advice})"
        )

    def _voted(self, question: Question, candidates: Sequence[str], instruction: str) -> _Read:
        """Proportions of sampled answers; other texts count as mass outside the candidates."""
        longest_first = sorted(candidates, key=len, reverse=True)
        pattern = re.compile(r"\W*(" + "|".join(map(re.escape, longest_first)) + r")(?![0-9A-Za-z]|\.\d)")
        votes: Counter[str] = Counter()
        while votes.total() < self.server.votes:
            # Some servers treat the whole answer as reasoning if no end tag follows.
            for choice in self._samples(question, instruction, votes.total()):
                match = pattern.match(self._connection.said(choice, question.ending) or reasoning(choice))
                votes[match[1] if match else ""] += 1
        if not votes.keys() & set(candidates):
            raise Unreadable(f"none of {self.server.votes} sampled answers is one of {', '.join(candidates)}")
        shares = (votes[text] / self.server.votes for text in candidates)
        return _Read(tuple(math.log(share) if share else -math.inf for share in shares), voted=True)

    def _samples(self, question: Question, instruction: str, known: int) -> list[Any]:
        """At least one of the answers still to be sampled; all of them if the server draws several per request."""
        import openai

        options: dict[str, Any] = {"max_tokens": 4, "temperature": 1.0, "seed": known}
        left = self.server.votes - known
        if left > 1 and self._takes_n:
            try:
                return self._connection.choices(question, instruction, n=left, **options)[:left]
            except (openai.BadRequestError, openai.UnprocessableEntityError):
                self._takes_n = False
        return self._connection.choices(question, instruction, **options)[:1]


def _after(question: Question, rationale: str) -> Question:
    """The question followed by its rationale, a request for the answer, and the ending."""
    said: Message = {"role": "assistant", "content": f"{question.thinking} {rationale}".strip()}
    ask: Message = {"role": "user", "content": "What is your answer?"}
    return Question((*question.messages, said, ask), question.ending)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300]
