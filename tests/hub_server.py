"""A stand-in for the Hugging Face hub on this machine: what its client asks for while it uploads a folder."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_standin"


class Hub(ThreadingHTTPServer):
    """Repositories of one user, ``me``; others' may not be written to.

    Attributes:
        repositories: path and content of each file, and whether the repository is private.
        broken: a status that every commit is answered with.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.stored: dict[str, bytes] = {}  # large files by their sha256, before a commit names them
        self.broken = 0
        self.endpoint = f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/")
        if not self._known():
            return
        if name.endswith("/auth-check/write"):
            mine = name.startswith("me/")
            self._answer(200 if mine else 403, {} if mine else {"error": "You have no right to write here"})
        else:
            self._answer(200 if name in self.server.repositories else 404, {"id": name})

    def do_PUT(self) -> None:
        content = self._body()
        assert self.path == f"/stored/{hashlib.sha256(content).hexdigest()}"
        self.server.stored[self.path.rpartition("/")[2]] = content
        self._answer(200, {})

    def do_POST(self) -> None:
        body, hub = self._body(), self.server
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if not self._known():
            return None
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{hub.endpoint}/stored/{one['oid']}"}}
            return self._answer(200, {"transfer": "basic", "objects": objects})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = ["lfs" if one["path"].endswith(".safetensors") else "regular" for one in files]
            return self._answer(
                200,
                {
                    "files": [
                        {"path": one["path"], "uploadMode": mode, "shouldIgnore": False}
                        for one, mode in zip(files, modes, strict=True)
                    ]
                },
            )
        repo = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
        return self._commit(repo, [json.loads(line) for line in body.splitlines()])

    def _create(self, asked: dict[str, Any]) -> None:
        user, hub = asked["organization"] or "me", self.server
        repo = f"{user}/{asked['name']}"
        if user != "me":
            return self._answer(403, {"error": f"You don't have the rights to create a model under {user!r}"})
        there = repo in hub.repositories
        if not there:
            hub.repositories[repo] = {}
            hub.private[repo] = asked.get("private", asked.get("visibility") == "private")
        return self._answer(409 if there else 200, {"url": f"{hub.endpoint}/{repo}"})

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        hub = self.server
        if hub.broken:
            return self._answer(hub.broken, {"error": "the disk of the hub is full"})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                hub.repositories[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.repositories[repo][value["path"]] = hub.stored[value["oid"]]
        url = f"{hub.endpoint}/{repo}/commit/{'0' * 40}"
        return self._answer(200, {"success": True, "commitUrl": url, "commitOid": "0" * 40})

    def _known(self) -> bool:
        known = self.headers.get("authorization") == f"Bearer {TOKEN}"
        if not known:
            self._answer(401, {"error": "Invalid username or password."})
        return known

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that runs meanwhile."""
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()
