"""A Hub on this machine: repositories of files in memory, behind the calls that an upload makes."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import huggingface_hub.constants
import pytest


class FakeHub:
    """What was uploaded, by repository and path; `failures` commits are refused first.

    `role` is what its token may do, `None` for a token that is not valid, and `scopes` what a fine-grained one may do
    with each user, organization or repository; `sent` has the paths of every commit.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.sent: list[set[str]] = []
        self.role: str | None = "write"
        self.scopes: dict[str, list[str]] | None = None
        self.failures = 0
        self.url = ""
        self.calls: list[str] = []

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        self.calls.append(path)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if not self._may_write(name):
                return 403, {"error": f"You don't have the rights to create a model under the namespace {name}"}
            if name in self.files:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            self.files[name] = {}
            if asked.get("visibility") == "private":
                self.private.add(name)
            return 200, {"url": f"{self.url}/{name}", "id": name, "name": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/whoami-v2":
            if self.role is None:
                return 401, {"error": "Invalid credentials in Authorization header"}
            return 200, {"name": "me", "auth": {"type": "access_token", "accessToken": self._token()}}
        repo = "/".join(path.partition("?")[0].split("/")[3:5])
        if path.partition("?")[0] == f"/api/models/{repo}":
            if repo not in self.files:
                return 404, {"error": "Repository not found"}
            files = [{"rfilename": name, "size": len(data)} for name, data in self.files[repo].items()]
            return 200, {"id": repo, "private": repo in self.private, "siblings": files}
        if "/preupload/" in path:
            # "regular" files come inside of the commit.
            return 200, {"files": [self._mode(repo, entry["path"]) for entry in json.loads(body)["files"]]}
        if "/commit/" in path:
            if self.failures:
                self.failures -= 1
                return 403, {"error": "Storage is full"}
            files = [entry["value"] for entry in map(json.loads, body.splitlines()) if entry["key"] == "file"]
            self.files[repo] |= {file["path"]: base64.b64decode(file["content"]) for file in files}
            self.sent.append({file["path"] for file in files})
            return 200, {"commitUrl": f"{self.url}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
        return 404, {"error": f"nothing at {path}"}

    def _may_write(self, name: str) -> bool:
        owner = name.partition("/")[0]
        if self.role == "fineGrained":
            scopes = self.scopes or {}
            return any("repo.write" in scopes.get(entity, ()) for entity in (owner, name))
        return self.role == "write" and owner in ("me", "ours")

    def _token(self) -> dict[str, Any]:
        """The token as `whoami` of the Hub describes it."""
        if self.scopes is None:
            return {"role": self.role}
        types = {0: "user", 1: "model"}
        scoped = [
            {"entity": {"type": types[name.count("/")], "name": name}, "permissions": permissions}
            for name, permissions in self.scopes.items()
        ]
        return {"role": self.role, "fineGrained": {"canReadGatedRepos": True, "global": [], "scoped": scoped}}

    def _mode(self, repo: str, path: str) -> dict[str, Any]:
        """How to send a file, and what the repository has in its place (as git names it)."""
        there = self.files[repo].get(path)
        oid = {} if there is None else {"oid": hashlib.sha1(b"blob %d\0" % len(there) + there).hexdigest()}
        return {"path": path, "uploadMode": "regular", "shouldIgnore": False, **oid}


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A running `FakeHub` that `HfApi` calls."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, answer = hub.answer(self.path, self._body())
            self._send(status, answer)

        def do_GET(self) -> None:
            self._send(*hub.answer(self.path, b""))

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _send(self, status: int, answer: Any) -> None:
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_fake")
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()
