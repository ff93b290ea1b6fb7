# SPDX-License-Identifier: Apache-2.0
"""A Hub on loopback, in memory: as many of its calls as pushing and loading models take, and faults on demand."""

import base64
import functools
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_" + "marker" * 6
LARGE = 1 << 20


@dataclass
class Blob:
    """One file of one commit."""

    content: bytes
    lfs: bool

    @functools.cached_property  # the demo pushes half a gigabyte
    def oid(self) -> str:
        """As the Hub tells it: SHA-256 of a large file, git's own hash of another."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Commit:
    """A tree of files and what it came from."""

    files: dict[str, Blob]
    title: str
    parent: str | None

    @property
    def oid(self) -> str:
        """Forty hex digits that depend on everything in it."""
        tree = {name: blob.oid for name, blob in sorted(self.files.items())}
        return hashlib.sha1(json.dumps([tree, self.title, self.parent]).encode()).hexdigest()


@dataclass
class Repo:
    """Its branches (pull requests among them, as `refs/pr/N`) and all commits."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def add(self, branch: str, commit: Commit) -> str:
        """Put `commit` on top of `branch`."""
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit.oid

    def find(self, revision: str) -> Commit | None:
        """The commit of a branch or id."""
        return self.commits.get(self.branches.get(revision, revision))


@dataclass
class Request:
    """What a client asked."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


# Called before each request is answered: None lets it pass, a number is the status to answer with, "cut" closes the
# connection, "cut after" does what was asked and then closes it.
Fault = Callable[[Request], "int | str | None"]


class Hub(ThreadingHTTPServer):
    """The server and all that it knows."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.fault: Fault | None = None
        self.xet: Path | None = None  # where the Xet client stores large files
        self.echo = False  # repeat, in the error, what the client sent to prove who it is
        self.lock = threading.RLock()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error of the server."""

    def state(self) -> dict[str, Any]:
        """All that a client could see, to be compared."""
        return {name: [repo.private, dict(repo.branches)] for name, repo in self.repos.items()}

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The content of a branch."""
        commit = self.repos[repo].find(revision)
        assert commit is not None
        return {name: blob.content for name, blob in commit.files.items()}

    def make(self, name: str, private: bool = False, files: dict[str, bytes] | None = None) -> Repo:
        """A repository with its first commit."""
        blobs = {path: Blob(content, False) for path, content in (files or {}).items()}
        repo = self.repos[name] = Repo(private)
        repo.add(
            "main", Commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n", False), **blobs}, "initial", None)
        )
        return repo


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _run(self) -> None:
        body = self._body()
        request = Request(self.command, self.path, dict(self.headers), body)
        with self.server.lock:
            self.server.requests.append(request)
            fault = self.server.fault(request) if self.server.fault else None
            if fault == "cut":
                self.close_connection = True
                self.connection.close()
                return
            try:
                if isinstance(fault, int):
                    code = "RepoNotFound" if fault == 404 else ""
                    raise Refusal(
                        fault, f"injected {request.headers.get('authorization') if self.server.echo else ''}", code
                    )
                self.answer = self._answer(request)
            except KeyError as error:
                self.answer = (500, {}, f"the server lacks {error}".encode())
            except Refusal as refusal:
                headers = {"X-Error-Message": str(refusal)} | ({"X-Error-Code": refusal.code} if refusal.code else {})
                self.answer = (refusal.status, headers, json.dumps({"error": str(refusal)}).encode())
        if fault == "cut after":
            self.close_connection = True
            self.connection.close()
            return
        status, headers, content = self.answer
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _run

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, request: Request) -> tuple[int, dict[str, str], bytes]:
        parts = urlsplit(request.path)
        path, query = parts.path, parse_qs(parts.query)
        for method, shape, handle in ROUTES:
            match = re.fullmatch(shape, path)
            if match and request.method in method.split("|"):
                found = handle(self, request, query, *(unquote(group or "") for group in match.groups()))
                return found if isinstance(found, tuple) else (200, {}, json.dumps(found).encode())
        raise Refusal(404, f"no such call: {request.method} {path}")

    def _may_write(self, request: Request) -> None:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            raise Refusal(401, "Invalid credentials in Authorization header")

    def _repo(self, request: Request, name: str) -> Repo:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and request.headers.get("authorization") != f"Bearer {TOKEN}"):
            raise Refusal(401 if repo else 404, "Repository not found", "RepoNotFound")
        return repo

    def _commit(self, request: Request, name: str, revision: str) -> Commit:
        commit = self._repo(request, name).find(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def create(self, request: Request, _query: Any) -> Any:
        self._may_write(request)
        wanted = json.loads(request.body)
        name = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        if name in self.server.repos:
            there = {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}
            return 409, {}, json.dumps(there).encode()
        self.server.make(name, wanted.get("visibility") == "private")
        return {"url": f"{self.server.url}/{name}"}

    def delete(self, request: Request, _query: Any) -> Any:
        self._may_write(request)
        wanted = json.loads(request.body)
        del self.server.repos[f"{wanted['organization']}/{wanted['name']}"]
        return {}

    def validate_yaml(self, request: Request, _query: Any) -> Any:
        content = json.loads(request.body)["content"]
        try:
            found = yaml.safe_load(content.split("---\n")[1])
        except (yaml.YAMLError, IndexError) as error:
            raise Refusal(400, f"bad metadata: {error}") from None
        if isinstance(found.get("license"), str) and not re.fullmatch(r"[a-z0-9.-]+", found["license"]):
            return 400, {}, json.dumps({"errors": [{"message": '"license" must be one of'}], "warnings": []}).encode()
        return {"errors": [], "warnings": []}

    def info(self, request: Request, _query: Any, name: str, revision: str = "main") -> Any:
        commit = self._commit(request, name, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        private = self.server.repos[name].private
        return {"_id": "1", "id": name, "sha": commit.oid, "private": private, "siblings": siblings, "tags": []}

    def branch(self, request: Request, _query: Any, name: str, branch: str) -> Any:
        self._may_write(request)
        repo = self._repo(request, name)
        if request.method == "DELETE":
            del repo.branches[branch]
        elif branch in repo.branches:
            raise Refusal(409, "Reference already exists")
        else:
            repo.branches[branch] = repo.branches["main"]
        return {}

    def preupload(self, request: Request, _query: Any, name: str, revision: str) -> Any:
        self._may_write(request)
        commit = self._commit(request, name, revision)
        files = []
        for entry in json.loads(request.body)["files"]:
            lfs = entry["path"].endswith(".safetensors") or entry["size"] > LARGE
            there = commit.files.get(entry["path"])
            files.append(
                {
                    "path": entry["path"],
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": False,
                    "oid": there.oid if there else None,
                }
            )
        return {"files": files}

    def lfs_batch(self, request: Request, _query: Any, _name: str) -> Any:
        self._may_write(request)
        objects = []
        for entry in json.loads(request.body)["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/large/{entry['oid']}", "header": {}}}
            actions = {} if entry["oid"] in self.server.large else {"actions": upload}
            objects.append({"oid": entry["oid"], "size": entry["size"]} | actions)
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, request: Request, _query: Any, oid: str) -> Any:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refusal(400, "the content has another hash")
        self.server.large[oid] = request.body
        return {}

    def xet_token(self, request: Request, _query: Any, name: str, _revision: str) -> Any:
        """The Xet client takes a folder in the place of a storage server (hf-xet 1.8; not documented)."""
        self._may_write(request)
        self._repo(request, name)
        if self.server.xet is None:
            raise Refusal(404, "no Xet here")
        url, access, ends = f"local://{self.server.xet}", "xet-access", 4102444800
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": access, "X-Xet-Token-Expiration": str(ends)}
        return 200, headers, json.dumps({"casUrl": url, "accessToken": access, "exp": ends}).encode()

    def commit(self, request: Request, query: dict[str, list[str]], name: str, revision: str) -> Any:
        self._may_write(request)
        repo, head = self._repo(request, name), self._commit(request, name, revision)
        files, title, parent = dict(head.files), "", None
        for line in request.body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                title, parent = value["summary"], value.get("parentCommit")
            elif entry["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.server.large and self.server.xet is None:
                    raise Refusal(400, "the large file was not uploaded")
                # What Xet stored is only known by its hash here: enough to push, not to pull.
                files[value["path"]] = Blob(self.server.large.get(value["oid"], value["oid"].encode()), True)
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, f"unknown operation {entry['key']}")
        if parent is not None and parent != head.oid:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        pull_request = f"refs/pr/{1 + sum(branch.startswith('refs/pr') for branch in repo.branches)}"
        asked = "create_pr" in query
        oid = repo.add(pull_request if asked else revision, Commit(files, title, head.oid))
        url = {"pullRequestUrl": f"{self.server.url}/{name}/discussions/{pull_request[8:]}"} if asked else {}
        return {"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid, **url}

    def resolve(self, request: Request, _query: Any, name: str, revision: str, path: str) -> Any:
        commit = self._commit(request, name, revision)
        blob = commit.files.get(path)
        if blob is None:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        if wanted is None:
            return 200, headers, blob.content
        start, end = int(wanted[1]), int(wanted[2] or len(blob.content) - 1)
        content = blob.content[start : end + 1]
        place = {"Content-Range": f"bytes {start}-{start + len(content) - 1}/{len(blob.content)}"}
        return 206, headers | place, content

    def tree(self, request: Request, _query: Any, name: str, revision: str, _folder: str = "") -> Any:
        commit = self._commit(request, name, revision)
        return [
            {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
            | ({"lfs": {"oid": blob.oid, "size": len(blob.content), "pointerSize": 130}} if blob.lfs else {})
            for path, blob in commit.files.items()
        ]


ID = r"([\w.-]+/[\w.-]+)"
REVISION = r"([^/]+)"
ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("POST", "/api/repos/create", Handler.create),
    ("DELETE", "/api/repos/delete", Handler.delete),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", f"/api/models/{ID}", Handler.info),
    ("GET", f"/api/models/{ID}/revision/{REVISION}", Handler.info),
    ("POST|DELETE", f"/api/models/{ID}/branch/{REVISION}", Handler.branch),
    ("POST", f"/api/models/{ID}/preupload/{REVISION}", Handler.preupload),
    ("GET", f"/api/models/{ID}/xet-write-token/{REVISION}", Handler.xet_token),
    ("POST", f"/api/models/{ID}/commit/{REVISION}", Handler.commit),
    ("GET", f"/api/models/{ID}/tree/{REVISION}(?:/(.*))?", Handler.tree),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/large/([0-9a-f]{64})", Handler.lfs_put),
    ("GET|HEAD", f"/{ID}/resolve/{REVISION}/(.+)", Handler.resolve),
)
