"""Runs to rate, a rating server, and a real Chromium to view the page."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from trl_rlaif.rating.pairs import read_comparisons
from trl_rlaif.rating.server import RatingServer
from trl_rlaif.rating.session import Session
from trl_rlaif.rating.votes import VoteFile


def sample(number: int, **changes) -> dict:
    return {
        "set": "test",
        "id": f"p{number}",
        "prompt": f"Question {number}?",
        "category": "code",
        "start": f"start {number}",
        "trained": f"trained {number}",
        "p_trained": 0.8,
    } | changes


@pytest.fixture
def make_run(tmp_path):
    """Writes a run's folder with these samples, or with this many plain ones."""

    def make(samples: list[dict] | int, name: str = "run") -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "recipe.yaml").write_text("run: {name: tiny}\n")
        rows = [sample(number) for number in range(samples)] if isinstance(samples, int) else samples
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    make.sample = sample
    return make


def session_of(folder: Path, rater: str = "ann") -> Session:
    return Session(read_comparisons(folder), VoteFile(folder / "votes.jsonl"), rater)


class Client:
    """An HTTP client for a rating page."""

    def __init__(self, address: str) -> None:
        self.address, url = address, urlsplit(address)
        self.port, self.path = url.port, url.path

    def ask(self, path: str, body: object = None, *, method: str = "", **headers: str) -> tuple[int, dict, bytes]:
        """Status, headers and content; a body other than bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(connection):
            connection.request(method or ("GET" if body is None else "POST"), path, data, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()

    def state(self) -> dict:
        return json.loads(self.ask(self.path + "state")[2])

    def post(self, action: str, **body: object) -> tuple[int, dict]:
        status, _, content = self.ask(self.path + action, body)
        return status, json.loads(content)


@pytest.fixture
def connect():
    """Makes a client for a page's address."""
    return Client


@pytest.fixture
def serve():
    """Starts a server for a folder and a rater; returns it with its client."""
    with contextlib.ExitStack() as stack:

        def start(folder: Path, rater: str = "ann") -> tuple[RatingServer, Client]:
            server = stack.enter_context(RatingServer(session_of(folder, rater)))
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            stack.callback(server.shutdown)
            return server, Client(server.address)

        yield start


class Chromium:
    """A headless Chromium, driven over its DevTools pipe: JSON messages, each terminated by a zero byte."""

    def __init__(self, profile: Path) -> None:
        (read, self._write), (self._read, write) = os.pipe(), os.pipe()
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "bash", *command, "--remote-debugging-pipe"],
            pass_fds=(read, write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read)
        os.close(write)
        self._number, self._rest, self._session = 0, b"", ""
        self.complaints: list[dict] = []

    @contextlib.contextmanager
    def tab(self) -> Iterator[Chromium]:
        """A fresh tab, without complaints; if it hangs, the browser is killed."""
        timer = threading.Timer(60, self._process.kill)
        timer.start()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.complaints.clear()
        yield self
        self._session = ""
        self.call("Target.closeTarget", targetId=target)
        timer.cancel()

    def _receive(self) -> dict:
        while b"\0" not in self._rest:
            data = os.read(self._read, 1 << 16)
            assert data, "Chromium has ended"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **params: object) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            message = self._receive()
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            if message.get("method") in (
                "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Page.javascriptDialogOpening",
            ):  # fmt: skip
                self.complaints.append(message)

    def evaluate(self, expression: str) -> object:
        """The awaited value of an expression."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until the page is loaded and the condition holds."""
        for _ in range(200):
            if self.evaluate(f"document.readyState === 'complete' && Boolean({condition})"):
                return
            self.evaluate("new Promise(resolve => setTimeout(resolve, 50))")
        raise AssertionError(f"never: {condition}")

    def open(self, address: str, width: int = 1100, height: int = 900, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=address)
        self.wait("!document.getElementById('pair')?.hidden || !document.getElementById('done')?.hidden")

    def press(self, key: str, **more: object) -> None:
        """Press a key once the page accepts it."""
        self.wait("!busy && performance.now() - shownAt > UNSEEN")
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **more)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)
        self.wait("!busy")

    def text(self, id_: str) -> str:
        return self.evaluate(f"document.getElementById('{id_}').textContent")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    if not shutil.which("chromium"):
        pytest.skip("there is no chromium here")
    with contextlib.closing(Chromium(tmp_path_factory.mktemp("profile"))) as browser:
        yield browser


@pytest.fixture
def chromium(browser):
    """A tab of a real browser."""
    with browser.tab() as tab:
        yield tab
