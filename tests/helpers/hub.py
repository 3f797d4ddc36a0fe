"""A fake Hub in this process, with as much of its API as pushing a model and loading it back needs."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
from huggingface_hub import constants

TOKEN = "hf_test"
USER = "me"


@dataclass
class Repo:
    """A repository: its visibility, its files, and the messages of its commits."""

    private: bool | None
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """The stored repositories, and the server's address."""

    endpoint: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)

    def environment(self, cache: Path) -> dict[str, str]:
        """Environment variables that point a new process at this server."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HOME": str(cache)}

    def join(self, monkeypatch: pytest.MonkeyPatch, cache: Path, token: str = TOKEN) -> None:
        """Point this process at the server; it has already read these environment variables."""
        known = {"ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(cache)}
        known["HUGGINGFACE_CO_URL_TEMPLATE"] = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in known.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # may point at an earlier server
        monkeypatch.setenv("HF_TOKEN", token)


@contextmanager
def fake_hub() -> Iterator[Hub]:
    """A server that stops at the end of the block."""
    hub = Hub()

    class Handler(_Handler):
        store = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    store: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        self._send(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def _known(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._json({"error": "Invalid username or password."}, 401)
        return False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self._known():
            return
        parts = urlparse(self.path).path.strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked.get('organization') or USER}/{asked['name']}"
            if name in self.store.repos:
                self._json({"error": "You already created this model repo", "url": self._url(name)}, 409)
                return
            visibility = asked.get("visibility")
            self.store.repos[name] = Repo(asked.get("private") if visibility is None else visibility == "private")
            self._json({"url": self._url(name), "name": name})
        elif parts == ["api", "validate-yaml"]:
            self._json({"errors": [], "warnings": []})
        else:
            _, _, user, name, what, *_ = parts
            if what == "preupload":
                files = [file["path"] for file in json.loads(body)["files"]]
                modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
                self._json({"files": modes})
            else:
                self._commit(f"{user}/{name}", [json.loads(line) for line in body.splitlines()])

    def _commit(self, name: str, operations: list[dict[str, Any]]) -> None:
        repo = self.store.repos[name]
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "header":
                repo.commits.append(value["summary"])
            elif operation["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert operation["key"] == "deletedFile"
                del repo.files[value["path"]]
        oid = hashlib.sha1(repr(repo).encode()).hexdigest()
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self._url(name)}/commit/{oid}"})

    def _url(self, name: str) -> str:
        return f"{self.store.endpoint}/{name}"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if not self._known():
            return
        parts = urlparse(self.path).path.strip("/").split("/")
        if parts[0] == "api":
            _, _, user, name, *what = parts
            files = self.store.repos[f"{user}/{name}"].files
            if what[0] != "tree" or what[2:]:  # a subfolder, which no repository has here
                self._json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
                return
            tree = [{"type": "file", "path": p, "size": len(x), "oid": _oid(x)} for p, x in files.items()]
            self._json(tree)
            return
        user, name, resolve, _, *path = parts
        assert resolve == "resolve"
        content = self.store.repos[f"{user}/{name}"].files.get("/".join(path))
        if content is None:
            self._json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        else:
            self._send(200, content, ETag=f'"{_oid(content)}"', X_Repo_Commit="0" * 40)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
