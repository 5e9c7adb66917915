"""A hub on this machine: as much of the Hugging Face protocol as downloading and pushing need."""

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
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_these_tests"
LFS_SUFFIX = ".safetensors"


@dataclass
class Repo:
    """``revisions``: name → files; ``gated``: only the token lets in."""

    revisions: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    gated: bool = False
    private: bool = False
    messages: list[str] = field(default_factory=list)

    def sha(self, revision: str) -> str:
        digest = hashlib.sha1()
        for name, content in sorted(self.revisions[revision].items()):
            digest.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\0".encode())
        return digest.hexdigest()

    def at(self, revision: str) -> dict[str, bytes] | None:
        for name, files in self.revisions.items():
            if revision in (name, self.sha(name)):
                return files
        return None


@dataclass
class Hub:
    """What it holds, what it was asked, and how it misbehaves."""

    address: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    # (method, path)
    asked: list[tuple[str, str]] = field(default_factory=list)
    # file → byte at which its connection is closed, and how often
    cuts: dict[str, tuple[int, int]] = field(default_factory=dict)
    # uploads of objects that are let through; None: all
    puts_left: int | None = None

    def fetched(self) -> list[str]:
        """Files whose content was asked for, in order."""
        return [
            path.split("/", 5)[5]
            for method, path in self.asked
            if method == "GET" and "/resolve/" in path
        ]

    def uploads(self) -> int:
        return sum(method == "PUT" for method, _ in self.asked)

    def add(self, repo_id: str, folder: Path, *, revision: str = "main", **extra: bytes) -> Repo:
        """Put a folder there; ``extra`` files have "/" written "__"."""
        files = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        files |= {name.replace("__", "/"): content for name, content in extra.items()}
        repo = self.repos.setdefault(repo_id, Repo())
        repo.revisions[revision] = files
        return repo


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._file(with_content=False) if "/resolve/" in self.path else self._refuse(404, "")

    def do_GET(self) -> None:
        if "/resolve/" in self.path:
            return self._file(with_content=True)
        parts = self._parts()
        if parts[:2] == ["api", "models"] and len(parts) >= 6:
            repo_id, what, revision = "/".join(parts[2:4]), parts[4], parts[5]
            if (repo := self._repo(repo_id)) is None:
                return None
            files = repo.at(revision)
            if files is None:
                return self._refuse(404, "RevisionNotFound")
            if what == "revision":
                names = [{"rfilename": name} for name in files]
                name = next(one for one in repo.revisions if repo.at(revision) is repo.at(one))
                told = {"id": repo_id, "sha": repo.sha(name), "siblings": names, "private": False}
                return self._json(told)
            if what == "tree":
                return self._json([_entry(name, content) for name, content in files.items()])
        return self._refuse(404, "")

    def do_POST(self) -> None:
        parts, body = self._parts(), self._body()
        if parts == ["api", "validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(401, "", "Invalid username or password.")
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            repo_id = f"{asked['organization']}/{asked['name']}"
            told = {"url": f"{self.hub.address}/{repo_id}", "name": repo_id}
            if repo_id in self.hub.repos:
                return self._json({**told, "error": "it is there"}, status=409)
            private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.repos[repo_id] = Repo(private=bool(private))
            return self._json(told)
        if parts[-3:] == ["lfs", "objects", "batch"]:
            objects = [self._lfs(one) for one in json.loads(body)["objects"]]
            return self._json({"transfer": "basic", "objects": objects})
        if parts[0] == "verify":
            return self._json(
                {}, status=200 if json.loads(body)["oid"] in self.hub.objects else 404
            )
        if parts[4:5] == ["preupload"]:
            return self._json({"files": [_mode(one) for one in json.loads(body)["files"]]})
        if parts[4:5] == ["commit"]:
            return self._commit("/".join(parts[2:4]), body)
        return self._refuse(404, "")

    def do_PUT(self) -> None:
        body = self._body()
        if self.hub.puts_left == 0:
            return self._refuse(403, "", "not today")
        if self.hub.puts_left is not None:
            self.hub.puts_left -= 1
        oid = self._parts()[-1]
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        return self._send(200, b"", {})

    def _lfs(self, asked: dict) -> dict:
        found = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in self.hub.objects:
            upload = {"href": f"{self.hub.address}/objects/{asked['oid']}"}
            found["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.address}/verify"}}
        return found

    def _commit(self, repo_id: str, body: bytes) -> None:
        repo = self.hub.repos[repo_id]
        files = dict(repo.revisions["main"])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repo.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repo.revisions["main"] = files
        url = f"{self.hub.address}/{repo_id}/commit/{repo.sha('main')}"
        self._json({"commitUrl": url, "commitOid": repo.sha("main")})

    def _file(self, *, with_content: bool) -> None:
        org, name, _, revision, file = self._parts(splits=4)
        if (repo := self._repo(f"{org}/{name}")) is None:
            return None
        if repo.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(403, "GatedRepo")
        content = (repo.at(revision) or {}).get(file)
        if content is None:
            return self._refuse(404, "EntryNotFound")
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {"ETag": etag, "X-Repo-Commit": revision, "Accept-Ranges": "bytes"}
        start, status = 0, 200
        if wanted := self.headers.get("Range"):
            start, status = int(wanted.removeprefix("bytes=").rstrip("-")), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        at, times = self.hub.cuts.get(file, (0, 0))
        if with_content and times:
            self.hub.cuts[file] = (at, times - 1)
            self._headers(status, {**headers, "Content-Length": str(len(content) - start)})
            self.wfile.write(content[start:at])
            self.close_connection = True
            return None
        return self._send(status, content[start:], headers, with_content=with_content)

    def _repo(self, repo_id: str) -> Repo | None:
        repo = self.hub.repos.get(repo_id)
        if repo is None:
            self._refuse(401, "RepoNotFound", "Invalid username or password.")
        return repo

    def _parts(self, splits: int = -1) -> list[str]:
        return [unquote(one) for one in urlsplit(self.path).path.strip("/").split("/", splits)]

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _refuse(self, status: int, code: str, message: str = "") -> None:
        headers = {"X-Error-Code": code} if code else {}
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _json(self, content: object, status: int = 200) -> None:
        headers = {"Content-Type": "application/json"}
        self._send(status, json.dumps(content).encode(), headers)

    def _send(
        self, status: int, content: bytes, headers: dict[str, str], *, with_content: bool = True
    ) -> None:
        self._headers(status, {**headers, "Content-Length": str(len(content))})
        if with_content and self.command != "HEAD":
            self.wfile.write(content)

    def _headers(self, status: int, headers: dict[str, str]) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _entry(name: str, content: bytes) -> dict:
    found = {"type": "file", "path": name, "size": len(content)}
    found["oid"] = hashlib.sha1(content).hexdigest()
    if name.endswith(LFS_SUFFIX):
        oid = hashlib.sha256(content).hexdigest()
        found["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
    return found


def _mode(asked: dict) -> dict:
    mode = "lfs" if asked["path"].endswith(LFS_SUFFIX) else "regular"
    return {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}
