"""A server that speaks as much of the hub's API as uploading and downloading a repository needs, on 127.0.0.1.

Written after the hub's client (huggingface_hub 2.4.0, its LFS protocol): it creates repositories, says which files are large,
takes large files one by one, takes commits, lists trees, serves files. Everything is in memory. Tests may have it hang in the
middle of a file, or refuse.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_not_a_real_token_but_a_secret"
LARGE = (".pt", ".safetensors", ".png")  # what the hub's .gitattributes calls large


class Hub:
    """Use as a context manager. `repositories`: {name: {"name", "private", "files": {path: content}, "commits": [message]}}."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}  # large files that have arrived, by SHA-256, in a commit or not
        self.received: list[str] = []  # SHA-256 of each large file as it arrives
        self.hang_after: int | None = None  # so many large files; the next one is never answered
        self.hanging = threading.Event()
        self.refuse: int | None = None  # HTTP status for everything
        self.licenses: set[str] | None = None  # all that a card may name; None: any
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._release = threading.Event()

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
                hub._answer(self, self._body())

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

    def _answer(self, request: Any, body: bytes) -> None:
        path = unquote(urlsplit(request.path).path)
        if path.startswith("/objects/"):  # a storage of its own, which is sent no token
            return self._take_object(request, path.rpartition("/")[2], body)
        if self.refuse is not None:
            return _reply(request, self.refuse, {"error": f"refused {request.headers.get('Authorization')}"})
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return _reply(request, 401, {"error": "Invalid username or password."})
        if path == "/api/validate-yaml":
            about = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            if self.licenses is None or about["license"] in self.licenses:
                return _reply(request, 200, {"errors": [], "warnings": []})
            return _reply(request, 400, {"errors": [{"message": '"license" must be one of these'}], "warnings": []})
        if path == "/api/repos/create":
            return self._create(request, json.loads(body))
        if path.startswith("/api/models/"):
            owner, name, *rest = path.removeprefix("/api/models/").split("/")
            if f"{owner}/{name}" not in self.repositories:
                return _reply(request, 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            answers = {"preupload": self._preupload, "commit": self._commit, "tree": self._tree}
            return answers[rest[0]](request, self.repositories[f"{owner}/{name}"], body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(request, json.loads(body))
        owner, name, _, _, *file = path.strip("/").split("/")
        return self._serve(request, self.repositories[f"{owner}/{name}"]["files"], "/".join(file))

    def _create(self, request: Any, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        answer = {"url": f"{self.url}/{name}", "name": name}
        if name in self.repositories:
            return _reply(request, 409, answer | {"error": "You already created this model repo"})
        private = asked.get("private", asked.get("visibility") == "private")
        self.repositories[name] = {"name": name, "private": private, "files": {}, "commits": []}
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

    def _tree(self, request: Any, repository: dict[str, Any], body: bytes) -> None:
        entries = []
        for path, content in repository["files"].items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        _reply(request, 200, entries)

    def _serve(self, request: Any, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            code = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "0" * 40}
            return _reply(request, 404, {"error": "Entry not found"}, code)
        request.send_response(200)
        for name, value in (
            ("Content-Length", len(files[path])), ("ETag", f'"{_git_hash(files[path])}"'), ("X-Repo-Commit", "0" * 40),
        ):  # fmt: skip
            request.send_header(name, str(value))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(files[path])


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
