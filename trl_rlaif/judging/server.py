"""A model on an OpenAI-compatible server: what it is asked in, and what it was found to be able to do."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from trl_rlaif.errors import RunError, UserError
from trl_rlaif.judging.pool import ServerPool
from trl_rlaif.judging.question import Message, Question
from trl_rlaif.judging.usage import Meter
from trl_rlaif.progress import say

if TYPE_CHECKING:
    from openai import OpenAI

# How many of the likeliest tokens to ask for; and how many where a candidate is not among them.
_USUAL, _MORE = 20, 200
# What to ask for where a server refuses as many as were wanted.
_FEWER = (20, 10, 5, 1)
_WITHOUT = "the server gives no log-probabilities (set judge.votes to sample answers)"


@dataclass(frozen=True)
class Server:
    """How a judge's server is talked to.

    Args:
        base_url: None takes OPENAI_BASE_URL, or OpenAI's own. Of several, all with the same model on the same kind of
            server, each request goes to the least busy.
        api_key_env: The environment variable that holds the key. Local servers need none.
        api: ``chat`` asks with messages, ``completions`` with plain text (base models).
        prefill: The server lets a chat answer begin with given text (vLLM's continue_final_message); ``auto`` finds out
            by the first question.
        top_logprobs: How many of the likeliest tokens to ask for; servers allow 5 to 20, or more. ``auto`` asks for 20,
            and for 200 once a candidate is not among them, where the server gives so many.
        votes: Where log-probabilities cannot be had: answers to sample instead. 0 gives up on the question.
        tolerance: How much of the candidates' mass, in [0, 1], may hide behind the likeliest tokens. A candidate that
            is not among them is no likelier than the least of them, and counts as that.
        concurrency: Requests at once, on all servers together; fewer on one that is overloaded.
        timeout: Seconds that a request may take.
        max_retries: After a rate limit, a server error, a dropped connection or a timeout. The wait grows,
            and what the server asks for (Retry-After) is honoured.
        chat_template_kwargs: Sent along with every chat request, as vLLM, SGLang and llama.cpp's server take them.
            Where ``enable_thinking`` is among them, it is for rationales: the answer itself is asked for without.
        extra_body: Further fields of every request's body.
    """

    base_url: str | Sequence[str] | None = None
    api_key_env: str = "OPENAI_API_KEY"
    api: Literal["chat", "completions"] = "chat"
    prefill: Literal["auto"] | bool = "auto"
    top_logprobs: Literal["auto"] | int = "auto"
    votes: int = 0
    tolerance: float = 0.01
    concurrency: int = 8
    timeout: float = 60.0
    max_retries: int = 6
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    extra_body: Mapping[str, Any] = field(default_factory=dict)


class ServerGone(RunError, UserError):
    """Nobody answers any more. Also a UserError: on one of those in a reward, the trainers save what was learned."""

    exit_code = RunError.exit_code


class Unreadable(Exception):
    """The server answered, and the answer does not hold what was asked for."""


class NoLogProbabilities(Unreadable):
    """The answer comes without any."""


class Connection:
    """Requests to one model on a server, in the most exact way that its first question found out.

    Args:
        model: Its name on the server.
        server: How to talk to it.
    """

    def __init__(self, model: str, server: Server) -> None:
        self.model, self.server = model, server
        self._servers, self.meter = ServerPool(server), Meter()
        # Found out by the first question; until then it is asked alone.
        self.prefills = server.prefill if server.api == "chat" else False
        self._known, self._names, self._lists = False, False, True
        self._finding_out = threading.Lock()
        self._most = _USUAL if server.top_logprobs == "auto" else server.top_logprobs
        self._may_ask_more = server.top_logprobs == "auto"
        self._ids: dict[tuple[str, str], int | None] = {}

    @property
    def address(self) -> str:
        """Where the server is, or all of them are."""
        return ", ".join(self._servers.addresses)

    def address_of(self, error: Exception) -> str:
        """Where the server is that an error came from; where all are, if the error does not say."""
        client = self._origin(error)
        return self.address if client is None else str(client.base_url)

    def _origin(self, error: Exception) -> OpenAI | None:
        import openai

        return self._servers.origin(error) if isinstance(error, openai.APIError) else None

    @property
    def continues(self) -> bool:
        """Whether the model goes on where the given text ends."""
        return self.prefills is True or self.server.api == "completions"

    def say(self, text: str) -> None:
        """Tell the user something about this server."""
        say(f"Judge {self.model} at {self.address}: {text}")

    def models(self, error: Exception) -> list[str]:
        """The names that the server knows from which an error came; empty where it does not tell."""
        client = self._origin(error)
        if client is None:
            return []
        try:
            return sorted(model.id for model in client.with_options(max_retries=0, timeout=5).models.list())
        except Exception:  # whatever a server that is none of OpenAI's kind answers
            return []

    # ---- What the server can do -------------------------------------------------------------------------

    def find_out(self, question: Question, texts: Sequence[str], instruction: str) -> None:
        """What the server can do, by the first question, and say so; nothing once it is known.

        Args:
            question: Asked alone.
            texts: The candidates.
            instruction: See ``choices``.
        """
        if self._known:
            return
        with self._finding_out:
            if self._known:  # another thread has asked
                return
            if self.prefills == "auto":
                self.prefills = self._find_prefill(question, texts, instruction)
            if self.prefills == "auto":
                return
            self._names = self._find_names(question, texts, instruction)
            self._known = True
        told = "its answer is begun for it (prefill)" if self.continues else "it is told to answer with nothing else"
        read = "the candidates' own log-probabilities are" if self._names else "its likeliest tokens are"
        self.say(f"{told}, and {read if self._lists else 'nothing can be'} read.")

    def _find_prefill(self, question: Question, texts: Sequence[str], instruction: str) -> bool | Literal["auto"]:
        """Whether the server continues the answer that it is given, by which way gives the candidates more.

        Where neither can be read, nothing is begun: the server may take no notice of it. A question that is refused
        both ways decides nothing.
        """
        import openai

        mass: dict[bool, float] = {}
        without = 0
        for prefills in (True, False):
            try:
                tokens = self._listed(question, instruction, prefills)[0]
                mass[prefills] = math.fsum(p for token, p in tokens if token.strip() in texts)
            except Unreadable as error:
                mass[prefills] = 0.0
                without += isinstance(error, NoLogProbabilities)
            except (openai.BadRequestError, openai.UnprocessableEntityError):
                continue
            if mass[prefills] > 0.9:
                break
        if not mass:
            return "auto"
        self._lists = without < len(mass)
        return mass.get(True, 0.0) > 0 and mass[True] >= mass.get(False, 0.0)

    def _find_names(self, question: Question, texts: Sequence[str], instruction: str) -> bool:
        """Whether the server gives the log-probabilities of tokens that are named, as vLLM does."""
        import openai

        try:
            tokens = self._token_ids(question, texts) if self._lists else {}
            return bool(tokens) and bool(self._named(question, instruction, tokens))
        except (Unreadable, openai.APIError):  # whatever a gateway does with a field that it does not know
            return False

    def more(self, listed: int) -> bool:
        """Whether more of the likeliest tokens can be asked for than were listed; from now on they are."""
        with self._finding_out:
            if self._may_ask_more and not self._names:
                self._may_ask_more, self._most = False, _MORE
            return listed < self._most and not self._names

    def _token_ids(self, question: Question, texts: Sequence[str]) -> dict[int, str]:
        """The tokens that the texts begin with behind the ending, and the shortest text each; empty if unknown."""
        for text in texts:
            if (question.ending, text) not in self._ids:
                self._ids[question.ending, text] = self._token_id(question, text)
        found: dict[int, str] = {}
        for text in sorted(texts, key=len):
            token = self._ids[question.ending, text]
            if token is None or not text.startswith(found.get(token, text)):  # "10" may begin as "1" does
                return {}
            found.setdefault(token, text)
        return found

    def _token_id(self, question: Question, text: str) -> int | None:
        if not self.continues:
            ids = self._tokenize({"prompt": text, "add_special_tokens": False})
            return ids[0] if ids else None
        before, behind = (
            self._tokenize(self._prompt(replace(question, ending=question.ending + end))) for end in ("", text)
        )
        # Where the text is joined to the ending's last token, the server cannot be asked behind the ending.
        return behind[len(before)] if len(behind) > len(before) > 0 and behind[: len(before)] == before else None

    def _prompt(self, question: Question) -> dict[str, Any]:
        """A question, as vLLM's /tokenize takes it, with its ending."""
        if self.server.api == "completions":
            return {"prompt": _plain(question)}
        return {"messages": self._messages(question, None)} | self._body(prefills=True, thinks=False)

    def _tokenize(self, body: dict[str, Any]) -> list[int]:
        """Token ids by vLLM's /tokenize, which is not below /v1; empty where there is no such thing."""
        import openai

        def send(client: OpenAI) -> Any:
            url = str(client.base_url).rstrip("/").removesuffix("/v1") + "/tokenize"
            return client.with_options(max_retries=0).post(url, cast_to=object, body={"model": self.model, **body})

        try:
            answer = self._servers.request(send)
            return [int(token) for token in answer["tokens"]]
        except (openai.APIError, ValueError, TypeError, KeyError):
            return []

    # ---- Requests ---------------------------------------------------------------------------------------

    def choices(
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

        Raises:
            Unreadable: There is none.
        """
        body = options.pop("extra_body", {})
        if self.server.api == "completions":
            body = {**self.server.extra_body, **body}
            extra = {"extra_body": body} if body else {}
            made = self.send({"model": self.model, "prompt": _plain(question)} | options | extra)
        else:
            prefills = self.prefills is True if prefills is None else prefills
            body = self._body(prefills, thinks) | body
            extra = {"extra_body": body} if body else {}
            messages = self._messages(question, None if prefills else instruction)
            made = self.send({"model": self.model, "messages": messages} | options | extra)
        self.meter.add(getattr(made, "usage", None))
        if not getattr(made, "choices", None):
            raise Unreadable("the server's answer holds no choice")
        return list(made.choices)

    def send(self, asked: dict[str, Any]) -> Any:
        """The answer to a request of these arguments."""
        if self.server.api == "completions":
            return self._servers.request(lambda client: client.completions.create(**asked))
        return self._servers.request(lambda client: client.chat.completions.create(**asked))

    def _messages(self, question: Question, instruction: str | None) -> list[Message]:
        """The question's, with the beginning of the answer, or else an instruction."""
        if instruction is None:
            return [*question.messages, {"role": "assistant", "content": question.ending}]
        *before, last = question.messages
        return [*before, {**last, "content": "\n\n".join(filter(None, [last["content"], instruction]))}]

    def _body(self, prefills: bool, thinks: bool) -> dict[str, Any]:
        kwargs = dict(self.server.chat_template_kwargs)
        if "enable_thinking" in kwargs and not thinks:
            kwargs["enable_thinking"] = False
        body = dict(self.server.extra_body) | ({"chat_template_kwargs": kwargs} if kwargs else {})
        return body | ({"continue_final_message": True, "add_generation_prompt": False} if prefills else {})

    def said(self, choice: Any, begun: str) -> str:
        """A choice's text.

        Args:
            choice: The server's.
            begun: What the answer was begun with, which llama.cpp's server repeats.

        Raises:
            Unreadable: It has none.
        """
        try:
            text = (choice.text if self.server.api == "completions" else choice.message.content) or ""
        except AttributeError:
            raise Unreadable("the server's answer holds no text") from None
        return text.removeprefix(begun) if self.prefills is True else text

    def top(self, question: Question, texts: Sequence[str], instruction: str) -> tuple[list[tuple[str, float]], bool]:
        """First tokens of the answer with their probabilities, and whether they are of a thought.

        They are those that the texts begin with, where the server gives the log-probabilities of named tokens; else
        its likeliest.

        Args:
            question: Up to its ending.
            texts: What the answer may be.
            instruction: See ``choices``.

        Raises:
            Unreadable: There are none.
        """
        if not self._lists:
            raise NoLogProbabilities(_WITHOUT)
        tokens = self._token_ids(question, texts) if self._names else {}
        return (self._named(question, instruction, tokens), False) if tokens else self._listed(question, instruction)

    def _named(self, question: Question, instruction: str, tokens: Mapping[int, str]) -> list[tuple[str, float]]:
        """Probabilities of the tokens with these ids."""
        body = {"logprob_token_ids": list(tokens), "return_tokens_as_token_ids": True}
        # The list may hold what was sampled, too.
        options = self._options(max(self._most, len(tokens) + 1)) | {"extra_body": body}
        found = dict(self._probabilities(self.choices(question, instruction, **options)[0]))
        try:
            return [(text, found[f"token_id:{token}"]) for token, text in tokens.items()]
        except KeyError:
            raise Unreadable("the server does not give the log-probabilities of named tokens") from None

    def _listed(
        self, question: Question, instruction: str, prefills: bool | None = None
    ) -> tuple[list[tuple[str, float]], bool]:
        """As many of the likeliest tokens as the server gives, up to what was asked for."""
        import openai

        while True:
            most = self._most
            try:
                choice = self.choices(question, instruction, prefills=prefills, **self._options(most))[0]
                return self._probabilities(choice), bool(reasoning(choice))
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                fewer = next((count for count in _FEWER if count < most), None)
                if ("logprobs" not in str(error) and most != _MORE) or fewer is None:
                    raise
                self._most = min(self._most, fewer)
                self.say(f"{most} log-probabilities are refused; asking for {fewer}.")

    def _options(self, most: int) -> dict[str, Any]:
        """Of a request for the first token with this many others."""
        chat = {"logprobs": True, "top_logprobs": most}
        listed = {"logprobs": most} if self.server.api == "completions" else chat
        return {"max_tokens": 1, "temperature": 1.0} | listed

    def _probabilities(self, choice: Any) -> list[tuple[str, float]]:
        if getattr(choice, "logprobs", None) is None:
            raise NoLogProbabilities(_WITHOUT)
        try:
            if self.server.api == "completions":
                pairs = list(choice.logprobs.top_logprobs[0].items())
            else:
                pairs = [(entry.token, entry.logprob) for entry in choice.logprobs.content[0].top_logprobs]
            found = [(token, math.exp(logprob)) for token, logprob in pairs]
            if not found or any(math.isnan(p) for _, p in found):
                raise ValueError
            return found
        except (AttributeError, IndexError, TypeError, ValueError, OverflowError):
            raise Unreadable(_WITHOUT) from None


def reasoning(choice: Any) -> str:
    """A reasoning model's thoughts, where the server tells them from the answer."""
    message = getattr(choice, "message", None)
    told = (getattr(message, name, None) for name in ("reasoning_content", "reasoning"))
    return next((text for text in told if isinstance(text, str) and text), "")


def _plain(question: Question) -> str:
    return "".join(f"{message['content']}\n\n" for message in question.messages) + question.ending
