"""A server that speaks as much of the hub's API as uploading and downloading repositories needs, on 127.0.0.1.

Written after the hub's client (huggingface_hub 2.4.0, its LFS protocol, and what datasets 5.2.0 asks for): it creates
repositories, says which files are large, takes large files one by one, takes commits; it names commits, lists trees, serves
files and ranges of them. Everything is in memory. Tests may have it hang in the middle of a file, refuse, or fail every request
a few times before it answers.
"""

import base64
import hashlib
import json
import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "hf_not_a_real_token_but_a_secret"
LARGE = (".pt", ".safetensors", ".png", ".zst")  # what the hub's .gitattributes calls large


class Hub:
    """Use as a context manager.

    `repositories`: {name, or "datasets/" and the name: {"name", "private", "files": {path: content}, "commits": [message],
    "commit": SHA-1}}.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}  # large files that have arrived, by SHA-256, in a commit or not
        self.received: list[str] = []  # SHA-256 of each large file as it arrives
        self.hang_after: int | None = None  # so many large files; the next one is never answered
        self.hang_at: str | None = None  # requests for files of this name are never answered
        self.hanging = threading.Event()
        self.refuse: int | None = None  # HTTP status for everything
        self.licenses: set[str] | None = None  # all that a card may name; None: any
        self.faults: tuple[str, ...] = ()  # what happens to each request before it is answered: "429", "503", "cut", "die"
        self.failed: Counter[str] = Counter()  # how often, by method and address
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # clients are killed
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._release = threading.Event()

    def publish(self, name: str, files: dict[str, bytes], commit: str) -> None:
        """A public repository whose branch main is this commit."""
        self.repositories[name] = {"name": name, "private": False, "files": files, "commits": ["Add"], "commit": commit}

    def environment(self, home: Path) -> dict[str, str]:
        """Of a process without a token that takes this server for the hub; its client hardly waits."""
        home.mkdir(exist_ok=True)
        waits = "import time\n_sleep = time.sleep\ntime.sleep = lambda seconds: _sleep(seconds / 500)\n"
        (home / "sitecustomize.py").write_text(waits, encoding="utf-8")
        kept = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
        return kept | {
            "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": f"{home}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._release.set()
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_POST(self) -> None:
                body = self._body()
                if not hub._fail(self):
                    hub._answer(self, body)

            do_GET = do_HEAD = do_PUT = do_POST

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") == "chunked":
                    parts = []
                    while size := int(self.rfile.readline(), 16):
                        parts.append(self.rfile.read(size))
                        self.rfile.readline()
                    self.rfile.readline()
                    return b"".join(parts)
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        return Handler

    def _fail(self, request: Any) -> bool:
        """Whether this request meets a fault: each address meets all of them once, one at a time."""
        key = f"{request.command} {request.path} {request.headers.get('Range', '')}"
        n, self.failed[key] = self.failed[key], self.failed[key] + 1
        if n >= len(self.faults):
            return False
        match self.faults[n]:
            case "cut":
                _hang_up(request)
            case "die":  # in the middle of the answer
                request.wfile = _Dying(request)
                return False
            case status:
                _reply(request, int(status), {"error": "try again"}, {"Retry-After": "0"})
        return True

    def _answer(self, request: Any, body: bytes) -> None:
        path = unquote(urlsplit(request.path).path)
        if path.startswith("/objects/"):  # a storage of its own, which is sent no token
            return self._take_object(request, path.rpartition("/")[2], body)
        if self.refuse is not None:
            return _reply(request, self.refuse, {"error": f"refused {request.headers.get('Authorization')}"})
        kind, _, rest = path.removeprefix("/api/").partition("/")
        dataset = "datasets/" if kind == "datasets" or path.startswith("/datasets/") else ""
        parts = (rest if path.startswith("/api/") else path.removeprefix(f"/{dataset}").strip("/")).split("/")
        repository = self.repositories.get(dataset + "/".join(parts[:2]))
        reads = request.command in ("GET", "HEAD") or parts[2:3] == ["paths-info"]
        public = repository is not None and not repository["private"] and reads
        if not public and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return _reply(request, 401, {"error": "Invalid username or password."})
        if path == "/api/validate-yaml":
            about = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            if self.licenses is None or about["license"] in self.licenses:
                return _reply(request, 200, {"errors": [], "warnings": []})
            return _reply(request, 400, {"errors": [{"message": '"license" must be one of these'}], "warnings": []})
        if path == "/api/repos/create":
            return self._create(request, json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(request, json.loads(body))
        if repository is None:
            return _reply(request, 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        action, commit, file = parts[2] if parts[2:] else "revision", parts[3] if parts[3:] else "main", "/".join(parts[4:])
        if reads and commit not in ("main", repository["commit"]):
            return _reply(request, 404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        if action == "resolve":
            return self._serve(request, repository, file)
        answers = {
            "preupload": self._preupload, "commit": self._commit, "revision": self._info, "tree": self._tree,
            "paths-info": self._paths,
        }  # fmt: skip
        return answers[action](request, repository, body)

    def _create(self, request: Any, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        answer = {"url": f"{self.url}/{name}", "name": name}
        if name in self.repositories:
            return _reply(request, 409, answer | {"error": "You already created this model repo"})
        private = asked.get("private", asked.get("visibility") == "private")
        self.repositories[name] = {"name": name, "private": private, "files": {}, "commits": [], "commit": "0" * 40}
        return _reply(request, 200, answer)

    def _preupload(self, request: Any, repository: dict[str, Any], body: bytes) -> None:
        files = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular", "shouldIgnore": False}
            for f in json.loads(body)["files"]
        ]
        _reply(request, 200, {"files": files})

    def _batch(self, request: Any, asked: dict[str, Any]) -> None:
        objects = []
        for o in asked["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.url}/objects/{o['oid']}", "header": {}}}}
            objects.append({"oid": o["oid"], "size": o["size"]} | ({} if o["oid"] in self.objects else upload))
        _reply(request, 200, {"transfer": "basic", "objects": objects})

    def _take_object(self, request: Any, oid: str, body: bytes) -> None:
        if self.hang_after is not None and len(self.received) >= self.hang_after:
            self.hanging.set()
            self._release.wait(60)
            return
        assert hashlib.sha256(body).hexdigest() == oid
        self.objects[oid] = body
        self.received.append(oid)
        _reply(request, 200, {})

    def _commit(self, request: Any, repository: dict[str, Any], body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository["commits"].append(value["summary"])
            elif line["key"] == "lfsFile":
                repository["files"][value["path"]] = self.objects[value["oid"]]
            else:
                assert line["key"] == "file"
                repository["files"][value["path"]] = base64.b64decode(value["content"])
        oid = f"{len(repository['commits']):040x}"
        _reply(
            request,
            200,
            {"commitUrl": f"{self.url}/{repository['name']}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None},
        )

    def _info(self, request: Any, repository: dict[str, Any], body: bytes) -> None:
        siblings = [{"rfilename": path} for path in sorted(repository["files"])]
        name = repository["name"].removeprefix("datasets/")
        facts = {"id": name, "sha": repository["commit"], "private": repository["private"], "siblings": siblings}
        _reply(request, 200, facts | {"downloads": 0, "likes": 0, "tags": [], "gated": False, "disabled": False})

    def _tree(self, request: Any, repository: dict[str, Any], body: bytes) -> None:
        """Everything below a folder, or what lies in it."""
        url = urlsplit(request.path)
        below = unquote(url.path).partition("/tree/")[2].partition("/")[2]
        recursive = parse_qs(url.query).get("recursive", ["False"])[0].lower() in ("true", "1")
        prefix = f"{below}/" if below else ""
        inside = [path for path in repository["files"] if path.startswith(prefix)]
        if below and not inside:
            return _reply(request, 404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"})
        entries = [_entry(repository, path) for path in inside if recursive or "/" not in path.removeprefix(prefix)]
        folders = [{"type": "directory", "path": f, "oid": "0" * 40} for f in _folders(inside, prefix, recursive)]
        _reply(request, 200, entries + folders)

    def _paths(self, request: Any, repository: dict[str, Any], body: bytes) -> None:
        asked = parse_qs(body.decode()).get("paths", []) if not body.startswith(b"{") else json.loads(body)["paths"]
        folders = set(_folders(list(repository["files"]), "", True))
        entries = [_entry(repository, path) for path in asked if path in repository["files"]]
        _reply(request, 200, entries + [{"type": "directory", "path": p, "oid": "0" * 40} for p in asked if p in folders])

    def _serve(self, request: Any, repository: dict[str, Any], path: str) -> None:
        commit = {"X-Repo-Commit": repository["commit"]}
        if path not in repository["files"]:
            return _reply(request, 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", **commit})
        if self.hang_at == path:
            self.hanging.set()
            self._release.wait(60)
            return _hang_up(request)
        content = repository["files"][path]
        first, last = _range(request.headers.get("Range"), len(content))
        request.send_response(206 if "Range" in request.headers else 200)
        for name, value in {
            "Content-Length": str(last - first), "Content-Range": f"bytes {first}-{last - 1}/{len(content)}",
            "ETag": f'"{_git_hash(content)}"', "Accept-Ranges": "bytes", **commit,
        }.items():  # fmt: skip
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(content[first:last])


class _Dying:
    """A connection that breaks in the middle of an answer's body, or after its head where it has none."""

    def __init__(self, request: Any) -> None:
        self._request, self._file, self._head = request, request.wfile, True

    def write(self, data: bytes) -> int:
        if self._head:
            self._file.write(data)
            self._head = False
            if self._request.command == "HEAD":
                _hang_up(self._request)
        else:
            self._file.write(data[: len(data) // 2])
            _hang_up(self._request)
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _hang_up(request: Any) -> None:
    request.close_connection = True
    request.wfile.flush()
    request.connection.shutdown(socket.SHUT_RDWR)


def _range(header: str | None, size: int) -> tuple[int, int]:
    if header is None:
        return 0, size
    first, _, last = header.removeprefix("bytes=").partition("-")
    return int(first), min(int(last) + 1, size) if last else size


def _entry(repository: dict[str, Any], path: str) -> dict[str, Any]:
    content = repository["files"][path]
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


def _folders(paths: list[str], prefix: str, recursive: bool) -> Iterator[str]:
    below = {str(folder) for path in paths for folder in Path(path).parents if str(folder) != "."}
    yield from sorted(f for f in below if f.startswith(prefix) and (recursive or "/" not in f.removeprefix(prefix)))


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _reply(request: Any, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
    content = json.dumps(answer).encode()
    request.send_response(status)
    for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}.items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(content)
