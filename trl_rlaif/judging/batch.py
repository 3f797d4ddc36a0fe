"""A judge queried through OpenAI-style batch files: it records its requests, or reads the answers to them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.judging.remote import RemoteJudge
from trl_rlaif.judging.server import Connection, Server, Unreadable

URLS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
# Nothing is sent, so the address is a placeholder.
_NOWHERE = "http://batch.invalid/v1"

# Length of a request's digest.
DIGITS = 16

Body = dict[str, Any]


def body_digest(body: Body) -> str:
    """Identifies a request: DIGITS hexadecimal digits."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:DIGITS]


class _Files(Connection):
    """Records requests, and answers them from a file."""

    def __init__(self, model: str, server: Server) -> None:
        super().__init__(model, replace(server, base_url=_NOWHERE))
        self._known, self._may_ask_more = True, False  # nothing can be detected or requested again
        self.asked: dict[str, Body] = {}
        self.answers: Mapping[str, Body | str] = {}

    @property
    def address(self) -> str:
        return "batch"

    def send(self, asked: dict[str, Any]) -> Any:
        from openai.types import Completion
        from openai.types.chat import ChatCompletion

        body = {name: value for name, value in asked.items() if name != "extra_body"} | asked.get("extra_body", {})
        digest = body_digest(body)
        self.asked[digest] = body
        answer = self.answers.get(digest, "not answered")
        if isinstance(answer, str):
            raise Unreadable(answer)
        return (Completion if self.server.api == "completions" else ChatCompletion).construct(**answer)


class BatchJudge(RemoteJudge):
    """A model queried through files; its answers are read as a server's are.

    An answer depends on its request alone, identified by ``body_digest``.

    Args:
        model: Its name.
        prompt: Makes the questions.
        server: Settings as for a server; ``prefill`` is not "auto", and ``votes`` is 0.
    """

    _connection: _Files

    def __init__(self, model: str, prompt: JudgePrompt, server: Server) -> None:
        super().__init__(model, prompt, server, _Files(model, server))

    def begin(self, answers: Mapping[str, Body | str] | None = None) -> None:
        """Forget earlier requests.

        Args:
            answers: By request digest, the answer's body, or the reason why there is none.
        """
        self._connection.asked, self._connection.answers = {}, answers or {}

    @property
    def asked(self) -> dict[str, Body]:
        """Requests since ``begin``, by digest."""
        return self._connection.asked
