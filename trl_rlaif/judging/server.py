"""A model on an OpenAI-compatible server: its requests, and detection of what the server supports."""

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

# Number of top tokens to request; and once a candidate is not among them.
_USUAL, _MORE = 20, 200
# Numbers to try next if a server refuses that many.
_FEWER = (20, 10, 5, 1)
_WITHOUT = "the server gives no log-probabilities (set judge.votes to sample answers)"


@dataclass(frozen=True)
class Server:
    """Connection settings of a judge's server.

    Args:
        base_url: None: OPENAI_BASE_URL, or OpenAI's own. With several, all serving the same model on the same kind of
            server, each request goes to the least busy.
        api_key_env: The environment variable that holds the key. Local servers need none.
        api: ``chat`` sends messages, ``completions`` plain text (base models).
        prefill: Whether the server continues a partial chat answer (vLLM's continue_final_message); ``auto`` tests it
            with the first question.
        top_logprobs: Number of top tokens to request; servers allow 5 to 20, or more. ``auto`` requests 20, and 200
            once a candidate is not among them, if the server gives that many.
        votes: Answers to sample per question if log-probabilities are unavailable; 0: the question fails.
        tolerance: Maximum fraction of the candidates' mass, in [0, 1], that may be unlisted. An unlisted candidate
            counts as its upper bound: the lowest listed probability or, if less, an equal part of the unlisted mass.
        concurrency: Maximum concurrent requests over all servers; fewer on an overloaded one.
        timeout: Maximum seconds per request.
        max_retries: After a rate limit, a server error, a dropped connection or a timeout, with increasing delay;
            Retry-After is honoured.
        chat_template_kwargs: Sent with every chat request, as accepted by vLLM, SGLang and llama.cpp's server.
            ``enable_thinking`` applies to rationales only; it is False for the answer itself.
        extra_body: Further fields of every request body.
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
    """No server answers any longer. Also a UserError: if a reward raises one, the trainers save their progress."""

    exit_code = RunError.exit_code


class Unreadable(Exception):
    """The server's answer lacks what was requested."""


class NoLogProbabilities(Unreadable):
    """The answer has no log-probabilities."""


class Connection:
    """Requests to one model on a server, by the most exact method that it supports, detected with the first question.

    Args:
        model: Its name on the server.
        server: Its connection settings.
    """

    def __init__(self, model: str, server: Server) -> None:
        self.model, self.server = model, server
        self._servers, self.meter = ServerPool(server), Meter()
        # Detected with the first question, which is sent alone.
        self.prefills = server.prefill if server.api == "chat" else False
        self._known, self._names, self._lists = False, False, True
        self._finding_out = threading.Lock()
        self._most = _USUAL if server.top_logprobs == "auto" else server.top_logprobs
        self._may_ask_more = server.top_logprobs == "auto"
        self._ids: dict[tuple[str, str], int | None] = {}

    @property
    def address(self) -> str:
        """Address of the server, or of all servers."""
        return ", ".join(self._servers.addresses)

    def address_of(self, error: Exception) -> str:
        """Address of the server that raised an error; of all servers if unknown."""
        client = self._origin(error)
        return self.address if client is None else str(client.base_url)

    def _origin(self, error: Exception) -> OpenAI | None:
        import openai

        return self._servers.origin(error) if isinstance(error, openai.APIError) else None

    @property
    def continues(self) -> bool:
        """Whether the model continues the given text."""
        return self.prefills is True or self.server.api == "completions"

    def say(self, text: str) -> None:
        """Tell the user something about this server."""
        say(f"Judge {self.model} at {self.address}: {text}")

    def models(self, error: Exception) -> list[str]:
        """Model names on the server that raised an error; empty if it does not list them."""
        client = self._origin(error)
        if client is None:
            return []
        try:
            return sorted(model.id for model in client.with_options(max_retries=0, timeout=5).models.list())
        except Exception:  # whatever a server that does not follow OpenAI's API answers
            return []

    # ---- Capabilities of the server ---------------------------------------------------------------------

    def find_out(self, question: Question, texts: Sequence[str], instruction: str) -> None:
        """Detect and report the server's capabilities with the first question; does nothing once they are known.

        Args:
            question: Sent alone.
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
        """Whether the server continues a given answer: tries with and without, and compares the candidates' mass.

        If neither can be read, the answer is not prefilled: the server may ignore it. A question refused both ways
        leaves "auto".
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
        """Whether the server returns log-probabilities of specified tokens, as vLLM does."""
        import openai

        try:
            tokens = self._token_ids(question, texts) if self._lists else {}
            return bool(tokens) and bool(self._named(question, instruction, tokens))
        except (Unreadable, openai.APIError):  # whatever a gateway does with an unknown field
            return False

    def more(self, listed: int) -> bool:
        """Whether more top tokens than were listed can be requested; if so, later requests do."""
        with self._finding_out:
            if self._may_ask_more and not self._names:
                self._may_ask_more, self._most = False, _MORE
            return listed < self._most and not self._names

    def _token_ids(self, question: Question, texts: Sequence[str]) -> dict[int, str]:
        """First tokens of the texts after the ending, each with its shortest text; empty if unknown."""
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
        # If the text merges with the ending's last token, it has no first token of its own.
        return behind[len(before)] if len(behind) > len(before) > 0 and behind[: len(before)] == before else None

    def _prompt(self, question: Question) -> dict[str, Any]:
        """A question with its ending, as a request to vLLM's /tokenize."""
        if self.server.api == "completions":
            return {"prompt": _plain(question)}
        return {"messages": self._messages(question, None)} | self._body(prefills=True, thinks=False)

    def _tokenize(self, body: dict[str, Any]) -> list[int]:
        """Token ids from vLLM's /tokenize, which is not under /v1; empty if the server has no such endpoint."""
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
            instruction: Replaces the ending if the answer cannot be prefilled.
            thinks: Whether the model may reason first.
            prefills: Whether the answer is prefilled; None: if the server is known to support it.
            options: Further arguments of the request.

        Raises:
            Unreadable: There is no choice.
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
        """The answer to a request with these arguments."""
        if self.server.api == "completions":
            return self._servers.request(lambda client: client.completions.create(**asked))
        return self._servers.request(lambda client: client.chat.completions.create(**asked))

    def _messages(self, question: Question, instruction: str | None) -> list[Message]:
        """The question's messages, followed by the start of the answer; or with an instruction appended."""
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
            begun: The prefilled text, which llama.cpp's server repeats.

        Raises:
            Unreadable: It has no text.
        """
        try:
            text = (choice.text if self.server.api == "completions" else choice.message.content) or ""
        except AttributeError:
            raise Unreadable("the server's answer holds no text") from None
        return text.removeprefix(begun) if self.prefills is True else text

    def top(self, question: Question, texts: Sequence[str], instruction: str) -> tuple[list[tuple[str, float]], bool]:
        """First tokens of the answer with their probabilities, and whether they belong to a thought.

        The first tokens of the texts, if the server returns log-probabilities of specified tokens; else its top tokens.

        Args:
            question: Up to its ending.
            texts: The candidates.
            instruction: See ``choices``.

        Raises:
            Unreadable: There are no log-probabilities.
        """
        if not self._lists:
            raise NoLogProbabilities(_WITHOUT)
        tokens = self._token_ids(question, texts) if self._names else {}
        return (self._named(question, instruction, tokens), False) if tokens else self._listed(question, instruction)

    def _named(self, question: Question, instruction: str, tokens: Mapping[int, str]) -> list[tuple[str, float]]:
        """Probabilities of the tokens with these ids."""
        body = {"logprob_token_ids": list(tokens), "return_tokens_as_token_ids": True}
        # The list may also include the sampled token.
        options = self._options(max(self._most, len(tokens) + 1)) | {"extra_body": body}
        found = dict(self._probabilities(self.choices(question, instruction, **options)[0]))
        try:
            return [(text, found[f"token_id:{token}"]) for token, text in tokens.items()]
        except KeyError:
            raise Unreadable("the server does not give the log-probabilities of named tokens") from None

    def _listed(
        self, question: Question, instruction: str, prefills: bool | None = None
    ) -> tuple[list[tuple[str, float]], bool]:
        """As many top tokens as the server gives, up to the number wanted; and whether the answer has reasoning."""
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
        """Options of a request for one token with this many top log-probabilities."""
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
    """A reasoning model's thoughts, if the server separates them from the answer."""
    message = getattr(choice, "message", None)
    told = (getattr(message, name, None) for name in ("reasoning_content", "reasoning"))
    return next((text for text in told if isinstance(text, str) and text), "")


def _plain(question: Question) -> str:
    return "".join(f"{message['content']}\n\n" for message in question.messages) + question.ending
