"""A Hub on this machine: repositories of files in memory, behind the calls that an upload makes."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import huggingface_hub.constants
import pytest


class FakeHub:
    """What was uploaded, by repository and path; `failures` commits are refused first."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.failures = 0
        self.url = ""
        self.calls: list[str] = []

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        self.calls.append(path)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.files.setdefault(name, {})
            return 200, {"url": f"{self.url}/{name}", "id": name, "name": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        repo = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            # "regular" files come inside of the commit.
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if "/commit/" in path:
            if self.failures:
                self.failures -= 1
                return 403, {"error": "Storage is full"}
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return 200, {"commitUrl": f"{self.url}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
        return 404, {"error": f"nothing at {path}"}


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
