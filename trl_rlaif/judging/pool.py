"""Interchangeable servers of one model: each request goes to the least busy, and a failed one is skipped for a while.

An overloaded one gets fewer concurrent requests.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from trl_rlaif.errors import UserError
from trl_rlaif.progress import say

if TYPE_CHECKING:
    from openai import APIError, OpenAI

    from trl_rlaif.judging.server import Server

# Seconds for which a server is skipped after a failure; doubled after each further one.
FIRST_REST, LONGEST_REST = 1.0, 60.0
# Client errors that may not recur on a retry, or on another server.
_PASSING = (408, 409, 429)
# Errors of an overloaded server. Seconds within which they count as one event.
_OVERLOADED, _SAME = (429, 503), 1.0

T = TypeVar("T")


@dataclass(eq=False)
class _Member:
    """A server, with its requests in progress, their limit, and its failures since its last answer."""

    client: OpenAI
    most: float
    busy: int = 0
    halved_at: float = -math.inf
    failures: int = 0
    rests_until: float = 0.0

    @property
    def awake(self) -> bool:
        """Whether it may get a request. After a failure, it gets one at a time until it answers."""
        return time.monotonic() >= self.rests_until and not (self.failures and self.busy)

    @property
    def has_room(self) -> bool:
        """Whether its limit allows another request."""
        return self.busy < int(self.most)

    @property
    def address(self) -> str:
        return str(self.client.base_url)

    def halve(self) -> None:
        """Halve the limit: additive increase, multiplicative decrease (Chiu and Jain 1989)."""
        now = time.monotonic()
        if now - self.halved_at >= _SAME:
            self.most, self.halved_at = max(1.0, min(self.most, self.busy) / 2), now


class ServerPool:
    """The servers of a judge. Each has its own limit on concurrent requests, at most ``Server.concurrency``: a 429, a
    503 or a timeout halves it, and as many successful answers as the limit raise it by one.

    Args:
        server: Settings, with the addresses.

    Raises:
        UserError: The package openai is not installed, or a key is needed and not set.
    """

    def __init__(self, server: Server) -> None:
        try:
            from openai import DefaultHttpxClient, OpenAI
        except ImportError:
            raise UserError(
                "A judge on a server needs the package openai.", fix="pip install 'trl-rlaif[openai]'"
            ) from None
        key = os.environ.get(server.api_key_env)
        if key is None and not (server.base_url or os.environ.get("OPENAI_BASE_URL")):
            raise UserError(f"The environment variable {server.api_key_env} has no API key for the judge's server.")
        addresses = (
            [server.base_url] if server.base_url is None or isinstance(server.base_url, str) else server.base_url
        )
        options = {"timeout": server.timeout, "max_retries": server.max_retries}
        self._concurrency = server.concurrency

        def member(url: str | None) -> _Member:
            # This also sees the client's own retries.
            heard = DefaultHttpxClient(event_hooks={"response": [lambda response: self._hear(made, response)]})
            client = OpenAI(base_url=url, api_key=key or "none", http_client=heard, **options)
            made = _Member(client, most=server.concurrency)
            return made

        self._members = [member(url) for url in addresses]
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)

    @property
    def addresses(self) -> list[str]:
        """Addresses of the servers."""
        return [member.address for member in self._members]

    def origin(self, error: APIError) -> OpenAI | None:
        """The client whose request caused an error; None if unknown."""
        url = str(error.request.url)
        return next((member.client for member in self._members if url.startswith(member.address)), None)

    def request(self, send: Callable[[OpenAI], T]) -> T:
        """One server's answer.

        After a transient error, such as a dropped connection, the server is skipped for a while and the next one is
        tried. The last one left retries up to ``Server.max_retries`` times.

        Args:
            send: Makes the request.

        Raises:
            APIError: No server has answered, or one has rejected the request itself.
        """
        import openai

        tried: set[_Member] = set()
        while True:
            member, alone = self._take(tried)
            try:
                made = send(member.client if alone else member.client.with_options(max_retries=0))
            except (openai.APIConnectionError, openai.APIStatusError) as error:
                tried.add(member)
                if isinstance(error, openai.APITimeoutError):
                    with self._lock:
                        member.halve()
                if not self._rest(member, error) or not self._awake(tried):
                    raise
            else:
                member.failures, member.rests_until = 0, 0.0
                with self._lock:
                    member.most = min(self._concurrency, member.most + 1 / member.most)
                return made
            finally:
                with self._freed:
                    member.busy -= 1
                    self._freed.notify_all()

    def _hear(self, member: _Member, response: Any) -> None:
        if response.status_code in _OVERLOADED:
            with self._lock:
                member.halve()

    def _take(self, tried: Collection[_Member]) -> tuple[_Member, bool]:
        """The least busy available server, once one has room, and whether there is no other."""
        with self._freed:
            while (awake := self._awake(tried)) and not any(member.has_room for member in awake):
                self._freed.wait()
            free = [member for member in awake if member.has_room]
            # If all rest, the one whose rest ends first.
            found = min(free or self._members, key=lambda member: member.busy if free else member.rests_until)
            found.busy += 1
            return found, len(awake) < 2

    def _awake(self, tried: Collection[_Member]) -> list[_Member]:
        return [member for member in self._members if member not in tried and member.awake]

    def _rest(self, member: _Member, error: APIError) -> bool:
        """Skip a server for a while; False if the error is not a reason to."""
        status = getattr(error, "status_code", None)
        if status is not None and status < 500 and status not in _PASSING:
            return False
        with self._lock:
            now = time.monotonic()
            if now < member.rests_until:  # a request in progress when it failed
                return True
            if not member.failures and len(self._members) > 1:
                others = "the other servers are asked until it answers again"
                say(f"Judge's server {member.address}: {' '.join(str(error).split())[:200]}; {others}.")
            rest = min(FIRST_REST * 2**member.failures, LONGEST_REST)
            member.failures += 1
            member.rests_until = now + max(rest, _asked_for(error))
        return True


def _asked_for(error: APIError) -> float:
    """Seconds to wait that a server asks for (Retry-After); 0 if it does not."""
    response = getattr(error, "response", None)
    text = response.headers.get("retry-after", "") if response is not None else ""
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else 0.0
