"""The rating page's server: loopback only, and protected by a token in its address."""

from __future__ import annotations

import base64
import getpass
import hashlib
import hmac
import json
import re
import secrets
import sys
import threading
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from trl_rlaif.errors import RunError, UserError
from trl_rlaif.pipeline import artifacts
from trl_rlaif.progress import say
from trl_rlaif.rating.pairs import of_set, read_comparisons
from trl_rlaif.rating.session import Session
from trl_rlaif.rating.votes import VoteFile
from trl_rlaif.report.formatting import count

# The page's own requests have about 40 bytes.
MAX_BODY = 4096
# Host names by which a browser may address this machine. Any other belongs to a foreign site that resolves to it (DNS
# rebinding). The port is not checked: through an SSH tunnel it differs.
HOSTS = ("127.0.0.1", "localhost")
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def rate_run(
    run: str | Path, *, rater: str | None = None, only: str | None = None, port: int = 0, browser: bool = True
) -> None:
    """Serve the rating page of a run until Ctrl-C; votes are saved in the run's ``votes.jsonl``.

    Args:
        run: The run's folder.
        rater: The rater's name; None: the user's name on this machine.
        only: The only set to rate; None: all.
        port: Port on 127.0.0.1; 0: a free one.
        browser: Whether to open the page.

    Raises:
        UserError: The folder has nothing to rate, there is no such set, the port cannot be used, or the rater's name is
        empty or too long.
        RunError: A file of the run was edited by hand and cannot be read.
    """
    rater = _user() if rater is None else rater.strip()
    if not rater or len(rater) > 100:
        raise UserError("A rater's name has 1 to 100 characters.", where="--rater")
    session = Session(of_set(read_comparisons(run), only), VoteFile(Path(run) / artifacts.VOTES), rater)
    if not len(session):
        return say("There is nothing to rate: in every pair, both responses are equal.")
    try:
        server = RatingServer(session, port)
    except OSError as error:
        raise UserError(
            f"Port {port} cannot be used: {error.strerror}.", where="--port", fix="Leave out --port to use a free one."
        ) from None
    with server:
        equal = f" {count(session.equal, 'more pair')} with equal responses: ties, unasked." if session.equal else ""
        say(f"Rate {count(len(session), 'pair')} as {rater}: {server.address}{equal}")
        say("Each vote is saved at once. Press Ctrl-C to stop.")
        if browser:  # in a thread: a browser in the terminal would keep the server from starting
            threading.Thread(target=webbrowser.open, args=(server.opening,), daemon=True).start()
        with suppress(KeyboardInterrupt):
            server.serve_forever()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "rater"


class RatingServer(ThreadingHTTPServer):
    """Serves the page and its requests on 127.0.0.1.

    Args:
        session: The rating session.
        port: The port; 0: a free one.

    Raises:
        OSError: The port cannot be used.
    """

    def __init__(self, session: Session, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.session = session
        self.token, self._ticket = secrets.token_urlsafe(32), secrets.token_urlsafe(32)

    @property
    def address(self) -> str:
        """Address of the page."""
        return f"http://127.0.0.1:{self.server_port}/{self.token}/"

    @property
    def opening(self) -> str:
        """A one-time address that redirects to the page.

        A browser's arguments are visible to every user of the machine, so it is not started with the token.
        """
        return f"http://127.0.0.1:{self.server_port}/{self._ticket}"

    def take_ticket(self, path: str) -> bool:
        """Whether this is the opening address, unused so far."""
        if not _equal(path, f"/{self._ticket}"):
            return False
        self._ticket = secrets.token_urlsafe(32)
        return True

    @cached_property
    def page(self) -> tuple[bytes, str]:
        """The page, and a content security policy that allows only its own script and style."""
        text = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
        digests = {}
        for tag in ("script", "style"):
            [content] = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
            digests[tag] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        policy = (
            f"default-src 'none'; script-src 'sha256-{digests['script']}'; style-src 'sha256-{digests['style']}'; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        return text.encode(), policy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a browser that disconnects during a response."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def _equal(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode("utf-8", "replace"), other.encode("utf-8", "replace"))


class _Handler(BaseHTTPRequestHandler):
    server: RatingServer
    timeout = 10  # seconds that a client may keep a thread waiting

    def do_GET(self) -> None:
        if self._is_ours() and self.server.take_ticket(self.path):
            return self._send(303, b"", "text/plain", {"Location": f"/{self.server.token}/"})
        name = self._admitted()
        if name == "":
            page, policy = self.server.page
            self._send(200, page, "text/html; charset=utf-8", {"Content-Security-Policy": policy})
        elif name == "state":
            self._send_json(200, self.server.session.state())
        elif name is not None:
            self._refuse(404, "There is nothing here.")

    def do_POST(self) -> None:
        name, session = self._admitted(), self.server.session
        actions: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "vote": lambda body: session.vote(body.get("pair"), body.get("choice")),
            "skip": lambda body: session.skip(body.get("pair")),
            "undo": lambda body: session.undo(),
        }
        if name is None:
            return
        if name not in actions:
            return self._refuse(404, "There is nothing here.")
        body = self._body()
        if body is None:
            return
        try:
            state = actions[name](body)
        except ValueError as error:
            return self._refuse(400, str(error))
        except (OSError, RunError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            return self._refuse(500, f"This could not be kept: {reason}")
        self._send_json(200, state)

    # ---- Access and request bodies ------------------------------------------------------------------------

    def _is_ours(self) -> bool:
        """Whether the request is addressed to this machine, by one of its own names."""
        hosts = self.headers.get_all("Host", [])
        return len(hosts) == 1 and re.sub(r":\d+$", "", hosts[0]) in HOSTS

    def _admitted(self) -> str | None:
        """The path after the token in the address; None, after sending 403, if host or token do not match."""
        _, token, *rest = self.path.split("/", 2) if self.path.startswith("/") else ("", "")
        if rest and self._is_ours() and _equal(token, self.server.token):
            return rest[0]
        self._refuse(403, "Open the address that trl-rlaif printed.")
        return None

    def _body(self) -> dict[str, Any] | None:
        """The JSON object sent; None, after sending an error, if it is not one or too large."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            self._refuse(411, "A length is needed.")
            return None
        if len(length) > 9 or int(length) > MAX_BODY:
            self._refuse(413, "This is too large.")
            return None
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            body = None
        if isinstance(body, dict):
            return body
        self._refuse(400, "A JSON object is needed.")
        return None

    # ---- Responses ----------------------------------------------------------------------------------------

    def _refuse(self, status: int, reason: str) -> None:
        self._send_json(status, {"error": reason})

    def _send_json(self, status: int, content: dict[str, Any]) -> None:
        self._send(status, json.dumps(content).encode(), "application/json")

    def _send(self, status: int, content: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        all_headers = {"Content-Type": kind, "Content-Length": str(len(content)), **HEADERS, **(headers or {})}
        for name, value in all_headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def version_string(self) -> str:
        return "trl-rlaif"

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the terminal belongs to the rater."""
