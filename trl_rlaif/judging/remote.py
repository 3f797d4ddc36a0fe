"""A judge behind an OpenAI-compatible server: vLLM, llama.cpp's server, or a hosted one."""

from __future__ import annotations

import math
import os
import queue
import re
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from trl_rlaif.errors import RunError, UserError
from trl_rlaif.judging.judge import Group, Judge
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.judging.question import Answer, Message, Question, Thinking
from trl_rlaif.progress import say

if TYPE_CHECKING:
    from openai import OpenAI

# Questions that are lost to the connection one after another before the server is taken to be gone.
GONE_AFTER = 3
# How many of the likeliest tokens to ask for where a server refuses as many as were wanted.
_FEWER = (20, 10, 5, 1)

# A reasoning model's marks, where the server leaves its thoughts in the text.
_THOUGHT_MARKS = re.compile(r"</?think>|\[/?THINK\]")


@dataclass(frozen=True)
class Server:
    """How a judge's server is talked to.

    Args:
        base_url: None takes OPENAI_BASE_URL, or OpenAI's own.
        api_key_env: The environment variable that holds the key. Local servers need none.
        api: ``chat`` asks with messages, ``completions`` with plain text (base models).
        prefill: The server lets a chat answer begin with given text (vLLM's continue_final_message); ``auto`` finds out
            by the first question.
        top_logprobs: How many of the likeliest tokens to ask for; servers allow 5 to 20, or more.
        votes: Where log-probabilities cannot be had: answers to sample instead. 0 gives up on the question.
        tolerance: How much of the candidates' mass, in [0, 1], may hide behind the likeliest tokens. A candidate that
            is not among them is no likelier than the least of them, and counts as that.
        concurrency: Requests at once.
        timeout: Seconds that a request may take.
        max_retries: After a rate limit, a server error, a dropped connection or a timeout. The wait grows,
            and what the server asks for (Retry-After) is honoured.
        chat_template_kwargs: Sent along with every chat request, as vLLM, SGLang and llama.cpp's server take them.
            Where ``enable_thinking`` is among them, it is for rationales: the answer itself is asked for without.
        extra_body: Further fields of every request's body.
    """

    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    api: Literal["chat", "completions"] = "chat"
    prefill: Literal["auto"] | bool = "auto"
    top_logprobs: int = 20
    votes: int = 0
    tolerance: float = 0.01
    concurrency: int = 8
    timeout: float = 60.0
    max_retries: int = 6
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    def client(self) -> OpenAI:
        """The official client.

        Raises:
            UserError: The package openai is not installed, or a key is needed and not set.
        """
        try:
            from openai import OpenAI
        except ImportError:
            raise UserError(
                "A judge on a server needs the package openai.", fix="pip install 'trl-rlaif[openai]'"
            ) from None
        key = os.environ.get(self.api_key_env)
        if key is None and not (self.base_url or os.environ.get("OPENAI_BASE_URL")):
            raise UserError(f"The environment variable {self.api_key_env} holds no key for the judge's server.")
        return OpenAI(base_url=self.base_url, api_key=key or "none", timeout=self.timeout, max_retries=self.max_retries)


class _Read(NamedTuple):
    """What was read of one question, or sampled; see Answer."""

    logprobs: tuple[float, ...]
    bound: float = 0.0
    voted: bool = False


class ServerGone(RunError, UserError):
    """Nobody answers any more. Also a UserError: on one of those in a reward, the trainers save what was learned."""

    exit_code = RunError.exit_code


class _Unreadable(Exception):
    """The server answered, and the answer does not hold what was asked for."""


class _Work:
    """Indices for threads to take and what they found, with a bound on how far they are ahead of the taker.

    Args:
        todo: The indices.
        ahead: How many may be under way or waiting to be taken.
    """

    def __init__(self, todo: Sequence[int], ahead: int) -> None:
        self._todo, self._lock = iter(todo), threading.Lock()
        self._room, self._ahead = threading.Semaphore(ahead), ahead
        self._found: queue.SimpleQueue[tuple[int, list[Answer] | Exception]] = queue.SimpleQueue()
        self.stopped = False

    def take(self) -> int | None:
        """The next index; None where there is none, or nobody wants an answer any more."""
        self._room.acquire()
        with self._lock:
            return None if self.stopped else next(self._todo, None)

    def give(self, index: int, found: list[Answer] | Exception) -> None:
        """Hand over what belongs to an index."""
        self._found.put((index, found))

    def next(self) -> tuple[int, list[Answer]]:
        """What was found next; an error is raised."""
        index, found = self._found.get()
        self._room.release()
        if isinstance(found, Exception):
            raise found
        return index, found

    def stop(self) -> None:
        """Let all threads end after the request that they are at."""
        self.stopped = True
        self._room.release(self._ahead)


class RemoteJudge(Judge):
    """A model on a server.

    Args:
        model: Its name on the server.
        prompt: Makes the questions.
        server: How to talk to it.
    """

    def __init__(self, model: str, prompt: JudgePrompt, server: Server) -> None:
        super().__init__(prompt, model)
        self.server = server
        self._client = server.client()
        # Found out by the first question; until then it is asked alone.
        self._prefills = server.prefill if server.api == "chat" else False
        self._asking = threading.Lock()
        self._most, self._takes_n, self._lost, self._told_of_votes = server.top_logprobs, True, 0, False

    def ask(
        self,
        groups: Sequence[Group],
        candidates: Sequence[str],
        *,
        thinking: Thinking | None = None,
        done: Collection[int] = (),
    ) -> Iterator[tuple[int, list[Answer]]]:
        """As of every judge; several requests are under way at once.

        Raises:
            UserError: The server refuses this client altogether (key, model, address).
        """
        todo = [index for index in range(len(groups)) if index not in done]
        work = _Work(todo, ahead=2 * self.server.concurrency)

        def answer_groups() -> None:
            while (index := work.take()) is not None:
                try:
                    work.give(index, [self._answer(q, candidates, thinking) for q in groups[index] if not work.stopped])
                except Exception as error:  # raised where the answers are awaited
                    work.give(index, error)

        for _ in range(min(self.server.concurrency, len(todo))):
            # Daemons: a program that is stopped does not wait for a server that does not answer.
            threading.Thread(target=answer_groups, daemon=True).start()
        try:
            for _ in todo:
                yield work.next()
        finally:
            work.stop()

    # ---- One question ---------------------------------------------------------------------------------

    def _answer(self, question: Question, candidates: Sequence[str], thinking: Thinking | None) -> Answer:
        """Of a fault that concerns this question alone, an answer that says so.

        Raises:
            UserError: The server refuses this client altogether.
            ServerGone: Nobody has answered several questions in a row.
        """
        import openai

        rationales: list[str] = []
        try:
            if thinking is not None:
                rationales += [self._think(question, thinking, i) for i in range(thinking.rationales)]
            asked = [_after(question, self.prompt.quote(text)) for text in rationales] or [question]
            found = [self._distribution(one, candidates) for one in asked]
            self._lost = 0
            bound, voted = max(one.bound for one in found), any(one.voted for one in found)
            return Answer(tuple(one.logprobs for one in found), tuple(rationales), bound=bound, voted=voted)
        except openai.NotFoundError as error:
            raise self._not_found(error) from None
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise UserError(
                f"The judge's server refuses the request: {_short(error)}",
                where=self._address,
                fix=f"Check judge.path, judge.base_url and the key in {self.server.api_key_env}.",
            ) from None
        except (openai.APIError, _Unreadable, ValueError) as error:  # ValueError: what came is no JSON
            if isinstance(error, openai.APIConnectionError):
                self._count_lost(error)
            return Answer(rationales=tuple(rationales), failed=f"{_short(error)} ({self._address})")

    @property
    def _address(self) -> str:
        return str(self._client.base_url)

    def _count_lost(self, error: Exception) -> None:
        """Give up on the server, and not on one question after the other, once several have not been answered."""
        self._lost += 1
        if self._lost >= GONE_AFTER:
            raise ServerGone(
                f"The judge's server does not answer: {_short(error)}",
                where=self._address,
                fix="Start it again, then go on with --resume: what it has said is kept. A slow one needs a longer "
                "judge.timeout.",
            )

    def _not_found(self, error: Exception) -> UserError:
        """Which of the two is wrong, the model's name or the address."""
        fix = f"Check judge.path, judge.base_url and the key in {self.server.api_key_env}."
        try:
            names = sorted(model.id for model in self._client.with_options(max_retries=0, timeout=5).models.list())
        except Exception:  # whatever a server that is none of OpenAI's kind answers
            names = []
        if names and self.name not in names:
            fix = f"Set judge.path to one of its models: {', '.join(names[:20])}."
        elif not names and not self._address.rstrip("/").endswith("/v1"):
            fix = f"Should judge.base_url be {self._address.rstrip('/')}/v1? Else check judge.path."
        return UserError(f"The judge's server refuses the request: {_short(error)}", where=self._address, fix=fix)

    def _think(self, question: Question, thinking: Thinking, number: int) -> str:
        """What the model thought of its own accord, and what it explained when it was asked to."""
        choice = self._request(
            replace(question, ending=question.thinking),
            f"{question.thinking} Explain in a few sentences, and do not give your answer yet.",
            thinks=True,
            max_tokens=thinking.max_tokens,
            temperature=thinking.temperature,
            seed=thinking.seed + number,
        )
        # Its marks would make the chat template drop the thoughts when it is shown them.
        said, ending = _THOUGHT_MARKS.sub("", self._said(choice)), question.ending.strip()
        explained = (said.split(ending)[0] if ending else said).strip()
        return "\n\n".join(text for text in (_reasoning(choice).strip(), explained) if text)

    def _distribution(self, question: Question, candidates: Sequence[str]) -> _Read:
        """Log-probabilities of the candidates; read, or where they cannot be had from votes."""
        import openai

        instruction = f"Answer with one of {', '.join(candidates)} and nothing else."
        try:
            if self._prefills == "auto":
                with self._asking:
                    self._find_out(question, candidates, instruction)
            return self._read(question, candidates, instruction)
        # Some servers refuse a request for log-probabilities; what they refuse for another reason, they refuse again.
        except (
            _Unreadable,
            openai.BadRequestError,
            openai.PermissionDeniedError,
            openai.UnprocessableEntityError,
        ) as error:
            if not self.server.votes:
                raise
            with self._asking:
                if not self._told_of_votes:
                    say(f"Judge {self.name} at {self._address}: answers are sampled where they cannot be read; first, "
                        f"{_short(error)}.")  # fmt: skip
                self._told_of_votes = True
            return self._voted(question, candidates, instruction)

    def _find_out(self, question: Question, candidates: Sequence[str], instruction: str) -> None:
        """Whether the server continues the answer that it is given, by which way gives the candidates more.

        Where neither can be read, nothing is begun: the server may take no notice of it. A question that is refused
        both ways decides nothing.
        """
        import openai

        if self._prefills != "auto":  # another thread has asked
            return
        mass: dict[bool, float] = {}
        for prefills in (True, False):
            try:
                tokens, _ = self._top(question, instruction, prefills)
                mass[prefills] = math.fsum(p for token, p in tokens if token.strip() in candidates)
            except _Unreadable:
                mass[prefills] = 0.0
            except (openai.BadRequestError, openai.UnprocessableEntityError):
                continue
            if mass[prefills] > 0.9:
                break
        if not mass:
            return
        self._prefills = mass.get(True, 0.0) > 0 and mass[True] >= mass.get(False, 0.0)
        way = "its answer is begun for it (prefill)" if self._prefills else "it is told to answer with nothing else"
        say(f"Judge {self.name} at {self._address}: {way}.")

    def _read(self, question: Question, candidates: Sequence[str], instruction: str) -> _Read:
        tokens, thinks = self._top(question, instruction)
        found = [math.fsum(p for token, p in tokens if token.strip() == text) for text in candidates]
        least, behind = min(p for _, p in tokens), max(0.0, 1 - math.fsum(p for _, p in tokens))
        unsure = 0.0
        for i, short in enumerate(candidates):
            for j, long in enumerate(candidates):
                if long == short or not long.startswith(short) or found[j] or not found[i]:
                    continue
                if not self._continues:
                    # "1" may be the first of the two tokens of "10", and nothing can be sent behind it.
                    unsure += found[i]
                    continue
                # "10" in two tokens: the second one is read behind the first.
                rest, _ = self._top(replace(question, ending=question.ending + short), instruction)
                share = math.fsum(p for token, p in rest if token.strip() == long[len(short) :])
                if not share:
                    unsure += found[i] * max(0.0, 1 - math.fsum(p for _, p in rest))
                found[i], found[j] = found[i] * (1 - share), found[i] * share
        missing = [i for i, p in enumerate(found) if p == 0]
        listed = math.fsum(found)
        # No likelier than the least that is listed, and all of them together than what is left.
        each = min(least, behind / len(missing)) if missing else 0.0
        hidden = len(missing) * each + (unsure if missing else 0.0)
        bound = hidden / (listed + len(missing) * each) if listed else 1.0
        if missing and bound > self.server.tolerance:
            raise _Unreadable(self._why_unread([candidates[i] for i in missing], len(tokens), thinks))
        for i in missing:
            found[i] = each
        return _Read(tuple(math.log(p) if p > 0 else -math.inf for p in found), bound if missing else 0.0)

    def _why_unread(self, missing: Sequence[str], listed: int, thinks: bool) -> str:
        advice = "judge.votes to sample answers instead"
        if thinks:
            advice = "judge.chat_template_kwargs so that the model does not think first: {enable_thinking: false}"
        elif self.server.api == "chat" and self._prefills is not True:
            advice = f"prefill: true where the server can begin an answer, as vLLM can; or {advice}"
        return (
            f"the server does not give the probability of {', '.join(missing)}: not among its {listed} likeliest "
            f"tokens, of which the least is not unlikely enough for judge.tolerance (set {advice})"
        )

    def _voted(self, question: Question, candidates: Sequence[str], instruction: str) -> _Read:
        """Shares of sampled answers; what is no candidate counts as mass elsewhere."""
        longest_first = sorted(candidates, key=len, reverse=True)
        pattern = re.compile(r"\W*(" + "|".join(map(re.escape, longest_first)) + r")(?![0-9A-Za-z]|\.\d)")
        votes: Counter[str] = Counter()
        while votes.total() < self.server.votes:
            # Some servers take all of an answer for thoughts that their end does not follow.
            for choice in self._samples(question, instruction, votes.total()):
                match = pattern.match(self._said(choice) or _reasoning(choice))
                votes[match[1] if match else ""] += 1
        if not votes.keys() & set(candidates):
            raise _Unreadable(f"none of {self.server.votes} sampled answers is one of {', '.join(candidates)}")
        shares = (votes[text] / self.server.votes for text in candidates)
        return _Read(tuple(math.log(share) if share else -math.inf for share in shares), voted=True)

    def _samples(self, question: Question, instruction: str, known: int) -> list[Any]:
        """At least one of the answers that are still to be sampled; all of them where the server draws several."""
        import openai

        options: dict[str, Any] = {"max_tokens": 4, "temperature": 1.0, "seed": known}
        left = self.server.votes - known
        if left > 1 and self._takes_n:
            try:
                return self._choices(question, instruction, n=left, **options)[:left]
            except (openai.BadRequestError, openai.UnprocessableEntityError):
                self._takes_n = False
        return self._choices(question, instruction, **options)[:1]

    # ---- Requests -------------------------------------------------------------------------------------

    @property
    def _continues(self) -> bool:
        """Whether the model goes on where the given text ends."""
        return self._prefills is True or self.server.api == "completions"

    def _request(self, question: Question, instruction: str, **options: Any) -> Any:
        return self._choices(question, instruction, **options)[0]

    def _choices(
        self,
        question: Question,
        instruction: str,
        *,
        thinks: bool = False,
        prefills: bool | None = None,
        **options: Any,
    ) -> list[Any]:
        """The server's choices for a question, at least one.

        Args:
            question: Up to its ending.
            instruction: Stands in for an ending that the answer cannot begin with.
            thinks: Whether the model's own thoughts are welcome.
            prefills: Whether the answer is begun for the server; None: as it is known to take it.
            options: Of the request.
        """
        if self.server.api == "completions":
            text = "".join(f"{message['content']}\n\n" for message in question.messages)
            extra = {"extra_body": dict(self.server.extra_body)} if self.server.extra_body else {}
            made = self._client.completions.create(model=self.name, prompt=text + question.ending, **options, **extra)
        else:
            body = self._template_body(thinks)
            messages: list[Message] = list(question.messages)
            if self._prefills is True if prefills is None else prefills:
                messages.append({"role": "assistant", "content": question.ending})
                body |= {"continue_final_message": True, "add_generation_prompt": False}
            else:
                last = messages[-1]
                messages[-1] = {**last, "content": f"{last['content']}\n\n{instruction}"}
            extra = {"extra_body": body} if body else {}
            made = self._client.chat.completions.create(model=self.name, messages=messages, **options, **extra)
        if not getattr(made, "choices", None):
            raise _Unreadable("the server's answer holds no choice")
        return list(made.choices)

    def _template_body(self, thinks: bool) -> dict[str, Any]:
        kwargs = dict(self.server.chat_template_kwargs)
        if "enable_thinking" in kwargs and not thinks:
            kwargs["enable_thinking"] = False
        return dict(self.server.extra_body) | ({"chat_template_kwargs": kwargs} if kwargs else {})

    def _said(self, choice: Any) -> str:
        try:
            return (choice.text if self.server.api == "completions" else choice.message.content) or ""
        except AttributeError:
            raise _Unreadable("the server's answer holds no text") from None

    def _top(
        self, question: Question, instruction: str, prefills: bool | None = None
    ) -> tuple[list[tuple[str, float]], bool]:
        """The likeliest first tokens of the answer with their probabilities, and whether they are of a thought."""
        choice = self._with_logprobs(question, instruction, prefills)
        try:
            if self.server.api == "completions":
                pairs = list(choice.logprobs.top_logprobs[0].items())
            else:
                pairs = [(entry.token, entry.logprob) for entry in choice.logprobs.content[0].top_logprobs]
            found = [(token, math.exp(logprob)) for token, logprob in pairs]
            if not found or any(math.isnan(p) for _, p in found):
                raise ValueError
            return found, bool(_reasoning(choice))
        except (AttributeError, IndexError, TypeError, ValueError, OverflowError):
            raise _Unreadable("the server gives no log-probabilities (set judge.votes to sample answers)") from None

    def _with_logprobs(self, question: Question, instruction: str, prefills: bool | None) -> Any:
        """One token, with as many likeliest ones as the server gives, up to what was asked for."""
        import openai

        while True:
            most = self._most
            options: dict[str, Any] = {"max_tokens": 1, "temperature": 1.0}
            chat = {"logprobs": True, "top_logprobs": most}
            options |= {"logprobs": most} if self.server.api == "completions" else chat
            try:
                return self._request(question, instruction, prefills=prefills, **options)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                fewer = next((count for count in _FEWER if count < most), None)
                if "logprobs" not in str(error) or fewer is None:
                    raise
                self._most = min(self._most, fewer)
                say(f"Judge {self.name} at {self._address} refuses {most} log-probabilities; {fewer} are asked for.")


def _reasoning(choice: Any) -> str:
    """A reasoning model's thoughts, where the server tells them from the answer."""
    message = getattr(choice, "message", None)
    told = (getattr(message, name, None) for name in ("reasoning_content", "reasoning"))
    return next((text for text in told if isinstance(text, str) and text), "")


def _after(question: Question, rationale: str) -> Question:
    """The question once the rationale is written: it stands in front of the ending."""
    said: Message = {"role": "assistant", "content": f"{question.thinking} {rationale}".strip()}
    ask: Message = {"role": "user", "content": "What is your answer?"}
    return Question((*question.messages, said, ask), question.ending)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300]
