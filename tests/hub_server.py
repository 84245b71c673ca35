"""The hub's interface for uploads, on this machine: repositories, preupload, LFS, commits, and faults."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_right"  # the one that is accepted
OID = "0123456789" * 4


@dataclass
class HubServer:
    """What a test sets and sees; `cut` uploads lose their connection before the hub has the file."""

    cut: int = 0
    refused: int | None = None  # the status of every write, for a token that may only read
    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)  # of each repository
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by repository@branch
    objects: dict[str, bytes] = field(default_factory=dict)  # of LFS
    commits: list[dict[str, Any]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    @contextmanager
    def running(self) -> Iterator[HubServer]:
        owner = self

        class Handler(_Handler):
            hub = owner

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, answer: Any, status: int = 200, **headers: str) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def _unknown(self) -> bool:
        """Whether the token is not accepted, which is answered then."""
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return False
        self._send({"error": "Invalid user token."}, 401)
        return True

    def do_GET(self) -> None:
        self.hub.requests.append(f"GET {self.path}")
        if self._unknown():
            return
        repo = self.path.partition("?")[0].removeprefix("/api/models/")
        if repo not in self.hub.private:
            self._send({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return
        self._send({"id": repo, "private": self.hub.private[repo], "sha": OID, "siblings": [], "tags": []})

    def do_PUT(self) -> None:
        self.hub.requests.append(f"PUT {self.path}")
        if self.hub.cut:
            self.hub.cut -= 1
            self.rfile.read(10)
            self.connection.close()
            self.close_connection = True
            return
        data, oid = self._body(), self.path.removeprefix("/lfs/")
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.objects[oid] = data
        self._send({})

    def do_POST(self) -> None:
        body, path = self._body(), self.path.partition("?")[0]
        self.hub.requests.append(f"POST {path}")
        if self._unknown():
            return
        if path == "/api/validate-yaml":
            self._send({"errors": [], "warnings": []})
        elif self.hub.refused is not None:
            self._send({"error": "You don't have the rights to write here"}, self.hub.refused)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        else:
            repo, action, revision = path.removeprefix("/api/models/").rsplit("/", 2)
            {"preupload": self._preupload, "commit": self._commit, "branch": self._branch}[action](
                repo, revision, body
            )

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.private[repo] = private
        self._send({"url": f"{self.hub.url}/{repo}"})

    def _branch(self, repo: str, revision: str, body: bytes) -> None:
        self.hub.files.setdefault(f"{repo}@{revision}", {})
        self._send({})

    def _preupload(self, repo: str, revision: str, body: bytes) -> None:
        files = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith((".safetensors", ".png"))
            files.append({"path": file["path"], "uploadMode": "lfs" if large else "regular",
                          "shouldIgnore": False, "oid": None})  # fmt: skip
        self._send({"files": files})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for item in asked["objects"]:
            href = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            objects.append({**item, **({} if item["oid"] in self.hub.objects else {"actions": href})})
        self._send({"transfer": "basic", "objects": objects})

    def _commit(self, repo: str, revision: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        content = self.hub.files.setdefault(f"{repo}@{revision}", {})
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                content[value["path"]] = base64.b64decode(value["content"])
            else:
                content[value["path"]] = self.hub.objects[value["oid"]]
        self.hub.commits.append({"repo": repo, "revision": revision, **lines[0]["value"]})
        self._send({"commitUrl": f"{self.hub.url}/{repo}/commit/{OID}", "commitOid": OID, "success": True})
