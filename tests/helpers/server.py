"""A scripted server for OpenAI's API in a separate process: it answers by a rule, and fails on demand.

The text of a request controls its answer, with marks that a test puts into a prompt or a response:
``[[fault=500 times=2]]`` fails twice and recovers, ``[[mass=0.9 p=0.7]]`` sets the probabilities. See ``Script``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

# A rationale continues with this, although it was asked not to.
ENDING = "Preferred Response="
WORD = "good"
# Other tokens the model may generate, with their shares of the probability mass that is not on the candidates.
OTHERS = {"I": 0.6, "The": 0.4}

_MARK = re.compile(r"\[\[(.+?)\]\]")
_PAIR = re.compile(r"Response 1:\n(.*?)\n\nResponse 2:\n(.*?)(?:\n\n|$)", re.DOTALL)
_DRAW = re.compile(r"Draw (\d+):")


# ---- The rule ---------------------------------------------------------------------------------------------


def share(first: str, second: str) -> float:
    """Probability of the response shown first: its share of the occurrences of ``WORD``, plus one for each response."""
    one, two = first.count(WORD) + 1, second.count(WORD) + 1
    return one / (one + two)


def ratings(text: str) -> list[float]:
    """Probabilities of 1 to 10; the more often ``text`` contains ``WORD``, the higher the likeliest rating."""
    weights = [1 / (1 + abs(rating - 1 - 3 * text.count(WORD))) for rating in range(1, 11)]
    return [weight / sum(weights) for weight in weights]


@dataclass(frozen=True)
class Script:
    """How one request is answered, from the marks in its text; values must not contain spaces.

    Args:
        fault: 400, 401, 403, 404, 429, 500: that status; drop, hang, half, html, json, empty, blank, nan: see
            ``_Handler._fail``; refuse: 400 only if log-probabilities are requested.
        times: How many requests with exactly these marks fail.
        after: Seconds in Retry-After.
        p: Probability of the first candidate within the candidates' mass; by default ``share``.
        mass: The total probability of the candidates.
        spellings: A candidate's probability is divided between two tokens: a quarter with a leading space, the rest
            without.
        split: "10" is two tokens.
        ten: The only ratings are 1 and 10, and 10 has this probability.
        logprobs: 0 leaves them out.
        usage: 0 leaves out the token counts: words of the text, and one per choice.
        say: Sampled answers, separated by bars and chosen by the request's seed; "_" is a space.
        one: How requests for several choices are treated: "ignored" or "refused".
        most: Requests for more top log-probabilities are refused.
        begun: How a partial answer to continue is treated: "continued", "refused", "ignored" (a new answer is started)
            or "repeated" before the continuation, as llama.cpp's server does.
        finish: The finish reason: length if the text is cut off, stop if it is complete.
        think: If set, the model thinks first, unless ``enable_thinking`` is false. "tags" leaves the thoughts in the
            text; any other word is the name of the field for them.
    """

    fault: str = ""
    times: int = 1_000_000
    after: float = 0.0
    p: float | None = None
    mass: float = 1.0
    spellings: int = 0
    split: int = 0
    ten: float | None = None
    logprobs: int = 1
    usage: int = 1
    say: str = "1"
    one: str = ""
    most: int = 1000
    begun: str = "continued"
    finish: str = "length"
    think: str = ""

    @classmethod
    def of(cls, text: str) -> Script:
        """The script from the marks of a text; later marks override earlier ones."""
        types = {"times": int, "after": float, "p": float, "mass": float, "spellings": int, "split": int}
        types |= {"logprobs": int, "usage": int, "ten": float, "most": int}
        values = dict(item.split("=", 1) for mark in _MARK.findall(text) for item in mark.split())
        unknown = values.keys() - {f.name for f in fields(cls)}
        assert not unknown, unknown
        return cls(**{name: types.get(name, str)(value) for name, value in values.items()})

    def next_token(self, text: str, rest: str) -> dict[str, float]:
        """The model's next-token distribution after a text.

        Args:
            text: The whole text sent, including a partial answer.
            rest: The last character so far: if ``split``, "1" may be followed by "0".
        """
        shown = _PAIR.findall(text)
        if shown:
            draws = [int(n) for n in _DRAW.findall(text)]
            p = share(*shown[-1]) if self.p is None else self.p
            p = p / (2 + draws[-1]) if draws else p  # the rationale matters
            found = {"1": p, "2": 1 - p}
        else:
            found = {str(i): p for i, p in enumerate(ratings(text), 1)}
            if self.ten is not None:
                found = {"1": 1 - self.ten, "10": self.ten}
            if self.split:
                ten, one = found.pop("10"), found["1"]
                if rest == "1":
                    return {"0": ten / (one + ten), "\n": one / (one + ten)}
                found["1"] = one + ten
        tokens = {text: p * self.mass for text, p in found.items()}
        if self.spellings:
            tokens = {s + t: p * w for t, p in tokens.items() for s, w in ((" ", 0.25), ("", 0.75))}
        if self.mass < 1:
            tokens |= {text: (1 - self.mass) * w for text, w in OTHERS.items()}
        return tokens


# ---- Server side ------------------------------------------------------------------------------------------


@dataclass
class _State:
    lock: threading.Lock = field(default_factory=threading.Lock)
    delay: float = 0.0
    healed: bool = False
    names: bool = False
    room: int = 1_000_000
    crowded: int = 429
    now: int = 0
    most: int = 0
    turned_away: int = 0
    requests: list[dict[str, Any]] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)

    def begin(self, path: str, key: str | None, body: dict[str, Any]) -> bool:
        """Record a request if there is room for it; returns whether there is."""
        with self.lock:
            if self.now >= self.room:
                self.turned_away += 1
                return False
            self.now += 1
            self.most = max(self.most, self.now)
            self.requests.append({"time": time.monotonic(), "path": path, "key": key, "body": body})
            return True

    def end(self) -> None:
        with self.lock:
            self.now -= 1

    def fault(self, script: Script, text: str) -> str:
        """The fault for this request; empty for none."""
        mark = str(_MARK.findall(text))
        with self.lock:
            if self.healed or self.faults[mark] >= script.times:
                return ""
            self.faults[mark] += bool(script.fault)
        return script.fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: _State

    def log_message(self, *args: Any) -> None:
        """Keep the output of tests clean."""

    def do_GET(self) -> None:
        """The requests so far, or the models."""
        if self.path == "/v1/models":
            models = [{"id": name, "object": "model"} for name in ("scripted-9b", "other")]
            return self._send(200, {"object": "list", "data": models})
        if self.path.startswith("/models"):
            return self._send(404, {"error": {"message": "no such page"}})
        with self.state.lock:
            seen = {name: getattr(self.state, name) for name in ("most", "turned_away", "requests")}
        self._send(200, seen)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/control":
            with self.state.lock:
                self.state.delay = body.get("delay", self.state.delay)
                self.state.healed = body.get("healed", self.state.healed)
                self.state.names = body.get("names", self.state.names)
                self.state.room = body.get("room", self.state.room)
                self.state.crowded = body.get("crowded", self.state.crowded)
                self.state.most = 0
            return self._send(200, {})
        if self.path == "/tokenize" and self.state.names:
            return self._send(200, {"tokens": tokenized(body)})
        if not self.path.startswith("/v1/"):
            return self._send(404, {"error": {"message": "no such page"}})
        if not self.state.names:  # servers other than vLLM ignore them
            body.pop("logprob_token_ids", None)
        if not self.state.begin(self.path, self.headers.get("Authorization"), body):
            return self._send(self.state.crowded, {"error": {"message": "too many at once"}}, {"Retry-After": "0.05"})
        chat = self.path == "/v1/chat/completions"
        text = "\n\n".join(m["content"] for m in body["messages"]) if chat else body["prompt"]
        script = Script.of(text)
        fault = self.state.fault(script, text)
        time.sleep(self.state.delay)
        # Counted off before the answer is sent: afterwards, the client's next request may arrive first.
        if fault != "hang":
            self.state.end()
        if fault == "refuse":
            fault = "400" if body.get("logprobs") else ""
        refused = _refused(body, script)
        if refused:
            return self._send(400, {"error": {"message": refused, "type": "scripted"}})
        if fault:
            return self._fail(fault, script, _answer(body, script, text, chat))
        self._send(200, _answer(body, script, text, chat))

    def _fail(self, fault: str, script: Script, answer: dict[str, Any]) -> None:
        """Send anything but the right answer."""
        right = json.dumps(answer).encode()
        if fault.isdigit():
            message = {"400": "the context is too long", "401": "wrong key", "404": "no such model"}.get(fault, "sorry")
            headers = {"Retry-After": str(script.after)} if script.after else {}
            self._send(int(fault), {"error": {"message": message, "type": "scripted"}}, headers)
        elif fault == "hang":
            time.sleep(3)
            self.state.end()
            self.close_connection = True
        elif fault == "drop":
            self.close_connection = True  # without sending a byte
        elif fault == "half":
            self._send_bytes(200, right[: len(right) // 2], len(right), "application/json")
            self.close_connection = True
        elif fault == "html":
            page = b"<html>a proxy's login page</html>"
            self._send_bytes(200, page, len(page), "text/html")
        elif fault == "json":
            self._send_bytes(200, right[:-9], len(right) - 9, "application/json")
        elif fault == "empty":
            self._send(200, answer | {"choices": []})
        elif fault == "blank":
            self._send(200, answer | {"choices": [{"index": 0}]})
        elif fault == "nan":
            top = [{"token": token, "logprob": math.nan} for token in "12"]
            content = [{"token": "1", "logprob": 0.0, "top_logprobs": top}]
            self._send(200, answer | {"choices": [answer["choices"][0] | {"logprobs": {"content": content}}]})
        else:
            raise ValueError(fault)

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self._send_bytes(status, data, len(data), "application/json", headers)

    def _send_bytes(
        self, status: int, data: bytes, length: int, kind: str, headers: dict[str, str] | None = None
    ) -> None:
        with contextlib.suppress(ConnectionError):  # the client may have disconnected
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(length), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)


def _refused(body: dict[str, Any], script: Script) -> str:
    """Why this server refuses a request; empty if it accepts it."""
    if script.one == "refused" and body.get("n", 1) > 1:
        return "n must be 1"
    if script.begun == "refused" and body.get("continue_final_message"):
        return "unknown field continue_final_message"
    if body.get("top_logprobs", 0) > script.most:
        return f"top_logprobs must be at most {script.most}"
    return ""


def tokenized(body: dict[str, Any]) -> list[int]:
    """Token ids of a text. A token is a character, or a whole number unless ``split`` is set."""
    text = "\n\n".join(m["content"] for m in body["messages"]) if "messages" in body else body["prompt"]
    split = r"(?s)." if Script.of(text).split else r"(?s)\d+|."
    return [_id(token) for token in re.findall(split, text)]


def _id(token: str) -> int:
    return int.from_bytes(token.encode())


def _answer(body: dict[str, Any], script: Script, text: str, chat: bool) -> dict[str, Any]:
    said = body["messages"][-1]["content"] if chat and body["messages"][-1]["role"] == "assistant" else ""
    rest = (text if not chat else said)[-1:]
    thinks = script.think if body.get("chat_template_kwargs", {}).get("enable_thinking") is not False else ""
    tokens = sorted(script.next_token(text, rest).items(), key=lambda item: -item[1])
    choices = []
    if script.begun == "ignored" and body.get("continue_final_message"):
        tokens = [("Pre", 0.999), ("The", 0.001)]
    for i in range(1 if script.one == "ignored" else body.get("n", 1)):
        seed = body.get("seed", 0) + i
        if body["max_tokens"] > 4:
            content = f" Draw {seed}: the {WORD} one wins.\n{ENDING}1, I think"
        elif body["max_tokens"] > 1:
            answers = script.say.split("|")
            content = answers[seed % len(answers)].replace("_", " ")
        else:
            content = tokens[0][0]
        content = said + content if script.begun == "repeated" else content
        if thinks:
            tokens = [("Okay", 0.9), ("Hm", 0.1)]
        wanted = script.logprobs and body.get("logprobs")
        choice = _choice(i, content, tokens, body, chat) if wanted else _choice(i, content, [], body, chat)
        choice["finish_reason"] = script.finish
        choices.append(_thoughtful(choice, thinks, body["max_tokens"]) if thinks else choice)
    kind = "chat.completion" if chat else "text_completion"
    answer = {"id": "x", "object": kind, "created": 0, "model": body["model"], "choices": choices}
    counts = [len(text.split()), len(choices)]
    usage = dict(zip(("prompt_tokens", "completion_tokens", "total_tokens"), (*counts, sum(counts)), strict=True))
    return answer | ({"usage": usage} if script.usage else {})


def _choice(
    index: int, content: str, tokens: list[tuple[str, float]], body: dict[str, Any], chat: bool
) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": index, "finish_reason": "length", "logprobs": None}
    count = body.get("top_logprobs", 0) if chat else body.get("logprobs") or 0
    if named := body.get("logprob_token_ids"):
        tokens = tokens[:1] + [(token, p) for token, p in tokens[1:] if _id(token) in named]
    if named and body.get("return_tokens_as_token_ids"):
        tokens = [(f"token_id:{_id(token)}", p) for token, p in tokens]
    top = {token: math.log(p) for token, p in tokens[:count] if p > 0}
    if not chat:
        if tokens:
            first = list(top.values())[:1]
            choice["logprobs"] = {
                "tokens": [content], "token_logprobs": first, "top_logprobs": [top], "text_offset": [0],
            }  # fmt: skip
        return choice | {"text": content}
    if tokens:
        entries = [{"token": token, "logprob": value, "bytes": list(token.encode())} for token, value in top.items()]
        choice["logprobs"] = {"content": [{**entries[0], "top_logprobs": entries}]}
    return choice | {"message": {"role": "assistant", "content": content}}


def _thoughtful(choice: dict[str, Any], field: str, budget: int) -> dict[str, Any]:
    """The answer of a model that thinks first; a small budget is used up by thinking."""
    said = choice["message"]["content"] if budget > 9 else None
    if field == "tags":
        said = f"<think>\nOkay, the word.\n</think>\n\n{said}" if said else "<think>\nOkay,"
        return choice | {"message": {"role": "assistant", "content": said}}
    return choice | {"message": {"role": "assistant", "content": said, field: "Okay, the word.\n"}}


def _serve() -> None:
    _Handler.state = _State()
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), _Handler)
    print(server.server_address[1], flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()  # returns when the parent process ends, however it ends
    os._exit(0)


# ---- Client side ------------------------------------------------------------------------------------------


class ScriptedServer:
    """A running server.

    Args:
        port: Its port on loopback.
        process: Its process.
    """

    def __init__(self, port: int, process: subprocess.Popen[str]) -> None:
        self.port, self._process = port, process
        self.root = f"http://127.0.0.1:{port}"
        self.base_url = f"{self.root}/v1"
        self._start = 0
        self._opener = build_opener(ProxyHandler({}))

    def _call(self, body: dict[str, Any] | None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        with self._opener.open(Request(f"{self.root}/control", data), timeout=10) as answer:
            return json.load(answer)

    def set(self, **values: Any) -> None:
        """``delay``: seconds before every answer. ``healed``: no more faults. ``names``: vLLM's token-id extensions.
        ``room``: above this many concurrent requests, the status is ``crowded``. Also resets ``most``."""
        self._call(values)

    def kill(self) -> None:
        """Kill it, as a power cut would; a new server may then use its port."""
        self._process.kill()
        self._process.wait()

    def forget(self) -> None:
        """Clear ``requests``."""
        self._start = len(self._call(None)["requests"])

    @property
    def requests(self) -> list[dict[str, Any]]:
        """Requests in order of arrival: time (seconds), path, key, body."""
        return self._call(None)["requests"][self._start :]

    @property
    def most(self) -> int:
        """The most concurrent requests so far."""
        return self._call(None)["most"]

    @property
    def turned_away(self) -> int:
        """Number of requests turned away for lack of room."""
        return self._call(None)["turned_away"]


@contextlib.contextmanager
def scripted_server(port: int = 0) -> Iterator[ScriptedServer]:
    """A new server process, killed at the end; 0 means any free port."""
    process = subprocess.Popen(
        [sys.executable, "-I", __file__, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield ScriptedServer(int(process.stdout.readline()), process)
    finally:
        process.kill()
        process.wait()


def batch_answers(server: ScriptedServer, file: Path) -> list[dict[str, Any]]:
    """The server's answers to a file of batch requests, in random order."""
    opener, rows = build_opener(ProxyHandler({})), []
    for line in map(json.loads, file.read_text().splitlines()):
        assert line["method"] == "POST"
        request = Request(server.root + line["url"], json.dumps(line["body"]).encode())
        with opener.open(request, timeout=10) as answer:
            response = {"status_code": 200, "request_id": "r", "body": json.load(answer)}
        rows.append({"id": "b", "custom_id": line["custom_id"], "response": response, "error": None})
    random.Random(3).shuffle(rows)
    return rows


if __name__ == "__main__":
    _serve()
