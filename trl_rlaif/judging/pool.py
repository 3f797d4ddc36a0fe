"""Interchangeable servers of one model: each request goes to the least busy, and a dead one is left out for a while."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from trl_rlaif.errors import UserError
from trl_rlaif.progress import say

if TYPE_CHECKING:
    from openai import APIError, OpenAI

    from trl_rlaif.judging.server import Server

# Seconds that a server is left out after a failure; twice as long after each further one.
FIRST_REST, LONGEST_REST = 1.0, 60.0
# Of the answers that say no, those that the same request may not get again, or not from another server.
_PASSING = (408, 409, 429)

T = TypeVar("T")


@dataclass(eq=False)
class _Member:
    """A server, with its requests under way and its failures since it last answered."""

    client: OpenAI
    busy: int = 0
    failures: int = 0
    rests_until: float = 0.0

    @property
    def awake(self) -> bool:
        """Whether it may be asked. One that has failed is asked once at a time until it answers."""
        return time.monotonic() >= self.rests_until and not (self.failures and self.busy)

    @property
    def address(self) -> str:
        return str(self.client.base_url)


class ServerPool:
    """The servers of a judge.

    Args:
        server: With their addresses.

    Raises:
        UserError: The package openai is not installed, or a key is needed and not set.
    """

    def __init__(self, server: Server) -> None:
        try:
            from openai import OpenAI
        except ImportError:
            raise UserError(
                "A judge on a server needs the package openai.", fix="pip install 'trl-rlaif[openai]'"
            ) from None
        key = os.environ.get(server.api_key_env)
        if key is None and not (server.base_url or os.environ.get("OPENAI_BASE_URL")):
            raise UserError(f"The environment variable {server.api_key_env} holds no key for the judge's server.")
        addresses = (
            [server.base_url] if server.base_url is None or isinstance(server.base_url, str) else server.base_url
        )
        options = {"timeout": server.timeout, "max_retries": server.max_retries}
        self._members = [_Member(OpenAI(base_url=url, api_key=key or "none", **options)) for url in addresses]
        self._lock = threading.Lock()

    @property
    def addresses(self) -> list[str]:
        """Where the servers are."""
        return [member.address for member in self._members]

    def origin(self, error: APIError) -> OpenAI | None:
        """The client whose request an error came of."""
        url = str(error.request.url)
        return next((member.client for member in self._members if url.startswith(member.address)), None)

    def request(self, send: Callable[[OpenAI], T]) -> T:
        """What one of the servers answers.

        What a retry may mend, such as a dropped connection, leaves the server out for a while, and the next one is
        asked. The last that is left retries as often as the client is told to.

        Args:
            send: Makes the request.

        Raises:
            APIError: None has answered, or one has refused the request itself.
        """
        import openai

        tried: set[_Member] = set()
        while True:
            member, alone = self._take(tried)
            try:
                made = send(member.client if alone else member.client.with_options(max_retries=0))
            except (openai.APIConnectionError, openai.APIStatusError) as error:
                tried.add(member)
                if not self._rest(member, error) or not self._awake(tried):
                    raise
            else:
                member.failures, member.rests_until = 0, 0.0
                return made
            finally:
                with self._lock:
                    member.busy -= 1

    def _take(self, tried: Collection[_Member]) -> tuple[_Member, bool]:
        """The least busy of those that may be asked, and whether there is no other."""
        with self._lock:
            awake = self._awake(tried)
            # Where all rest, the one whose rest ends first.
            found = min(awake or self._members, key=lambda member: member.busy if awake else member.rests_until)
            found.busy += 1
            return found, len(awake) < 2

    def _awake(self, tried: Collection[_Member]) -> list[_Member]:
        return [member for member in self._members if member not in tried and member.awake]

    def _rest(self, member: _Member, error: APIError) -> bool:
        """Leave a server out for a while; False where the error is no reason to."""
        status = getattr(error, "status_code", None)
        if status is not None and status < 500 and status not in _PASSING:
            return False
        with self._lock:
            now = time.monotonic()
            if now < member.rests_until:  # what was under way when it failed
                return True
            if not member.failures and len(self._members) > 1:
                others = "the other servers are asked until it answers again"
                say(f"Judge's server {member.address}: {' '.join(str(error).split())[:200]}; {others}.")
            rest = min(FIRST_REST * 2**member.failures, LONGEST_REST)
            member.failures += 1
            member.rests_until = now + max(rest, _asked_for(error))
        return True


def _asked_for(error: APIError) -> float:
    """Seconds that a server asks to be left alone for (Retry-After); 0 where it does not."""
    response = getattr(error, "response", None)
    text = response.headers.get("retry-after", "") if response is not None else ""
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else 0.0
