"""A small Hugging Face hub on loopback: repositories in memory, one valid token, faults on request.

It speaks the part of the hub's HTTP interface that creating, uploading to and downloading from a model repository
takes, so that the real client library is what is tested.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_localtesttoken0123456789"  # noqa: S105 - it opens nothing but this server
LFS_ABOVE_BYTES = 4096


def _oid(data: bytes) -> str:
    """40 hex digits, as git's; nobody checks how they were made."""
    return hashlib.sha256(data).hexdigest()[:40]


@dataclass
class Repository:
    """One model repository with a linear history."""

    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b""})
    commits: list[str] = field(default_factory=lambda: [_oid(b"initial")])

    def commit(self) -> str:
        listing = sorted((name, hashlib.sha256(data).hexdigest()) for name, data in self.files.items())
        self.commits.append(_oid(repr((self.commits[-1], listing)).encode()))
        return self.commits[-1]


@dataclass
class LocalHub:
    """State of the server.

    `faults` maps a regular expression on "METHOD /path" to HTTP statuses answered to the next matching requests.
    """

    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    faults: dict[str, list[int]] = field(default_factory=dict)


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """Serve on a free port until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = LocalHub(f"http://127.0.0.1:{server.server_address[1]}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    routes: tuple[tuple[str, str], ...] = (
        (r"POST /api/repos/create", "create"),
        (r"POST /api/validate-yaml", "validate"),
        (r"POST /api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>.+)", "preupload"),
        (r"POST /(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        (r"POST /api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>.+)", "commit"),
        (r"PUT /blobs/(?P<oid>[0-9a-f]{64})", "put_blob"),
        (r"GET /api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/.*)?", "tree"),
        (r"GET /api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>.+))?", "info"),
        (r"(GET|HEAD) /(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    @property
    def hub(self) -> LocalHub:
        return self.server.hub  # type: ignore[attr-defined, no-any-return]

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Quiet."""

    def _dispatch(self) -> None:
        line = f"{self.command} {unquote(urlsplit(self.path).path)}"
        body = self._body()
        self.hub.requests.append(line)
        for pattern, statuses in self.hub.faults.items():
            if statuses and re.search(pattern, line):
                self._answer(statuses.pop(0), {"error": "fault on request"})
                return
        if not line.startswith("PUT /blobs") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
            return
        for pattern, name in self.routes:
            if found := re.fullmatch(pattern, line):
                handler: Callable[..., None] = getattr(self, f"_{name}")
                handler(body, **{key: value for key, value in found.groupdict().items() if value is not None})
                return
        self._answer(404, {"error": f"no route for {line}"})

    do_GET = do_HEAD = do_POST = do_PUT = _dispatch  # noqa: N815 - the base class calls them so

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline().strip(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, record: Any = None, *, raw: bytes | None = None, **headers: str) -> None:
        data = json.dumps(record).encode() if raw is None else raw
        self.send_response(status)
        named = {"Content-Type": "application/json" if raw is None else "application/octet-stream"}
        for name, value in {**named, **{key.replace("_", "-"): value for key, value in headers.items()}}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _repository(self, repo: str, revision: str = "main") -> Repository | None:
        found = self.hub.repositories.get(repo)
        if found is None:
            self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif revision != "main" and revision != found.commits[-1]:
            self._answer(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
            return None
        return found

    def _create(self, body: bytes) -> None:
        record = json.loads(body)
        repo = f"{record.get('organization') or 'tester'}/{record['name']}"
        status = 409 if repo in self.hub.repositories else 200
        private = record.get("private", record.get("visibility") == "private")
        self.hub.repositories.setdefault(repo, Repository(bool(private)))
        self._answer(status, {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo})

    def _validate(self, body: bytes) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        if (found := self._repository(repo, revision)) is None:
            return
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] > LFS_ABOVE_BYTES else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": files, "commitOid": found.commits[-1]})

    def _lfs_batch(self, body: bytes, repo: str) -> None:
        objects = []
        for asked in json.loads(body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.blobs:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/blobs/{asked['oid']}", "header": {}}}
            objects.append(entry)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _put_blob(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._answer(400, {"error": "digest"})
            return
        self.hub.blobs[oid] = body
        self._answer(200, {})

    def _commit(self, body: bytes, repo: str, revision: str) -> None:
        if (found := self._repository(repo, revision)) is None:
            return
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                found.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                found.files[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                found.files.pop(value["path"], None)
        oid = found.commit()
        self._answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})

    def _info(self, body: bytes, repo: str, revision: str = "main") -> None:
        if (found := self._repository(repo, revision)) is not None:
            siblings = [{"rfilename": name} for name in sorted(found.files)]
            record = {"id": repo, "modelId": repo, "sha": found.commits[-1], "private": found.private, "tags": []}
            self._answer(200, {**record, "siblings": siblings})

    def _tree(self, body: bytes, repo: str, revision: str) -> None:
        if (found := self._repository(repo, revision)) is not None:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
                for name, data in sorted(found.files.items())
            ]
            self._answer(200, entries)

    def _resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        if (found := self._repository(repo, revision)) is None:
            return
        commit = found.commits[-1]
        if path not in found.files:
            self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        data = found.files[path]
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        self._answer(200, raw=data, ETag=etag, X_Repo_Commit=commit, Accept_Ranges="bytes")
