"""As much of the Hugging Face Hub as uploads and downloads need, on a port of this machine: LFS, commits, revisions."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN = "hf_" + "thisIsASecretOfTheTests"


@dataclass
class Hub:
    """What the server holds; every request but those of blobs must carry the token."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)  # files by repository and revision
    visibility: dict[str, str | None] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, str]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    refuse: tuple[str, int, str] | None = None  # part of a path, status, message


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A server for the time of a block."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def answer(self, content: object, status: int = 200, message: str = "") -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if message:
                self.send_header("X-Error-Message", message)
            self.end_headers()
            self.wfile.write(body)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found

        def refused(self) -> bool:
            hub.requests.append(f"{self.command} {self.path}")
            if hub.refuse is not None and hub.refuse[0] in self.path:
                self.answer({"error": hub.refuse[2]}, hub.refuse[1], hub.refuse[2])
                return True
            if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not self.path.startswith("/blobs/"):
                self.answer({"error": "Invalid username or password."}, 401, "Invalid username or password.")
                return True
            return False

        def do_POST(self) -> None:
            body = self.body()
            if self.refused():
                return
            path = self.path.partition("?")[0]
            if path == "/api/repos/create":
                given = json.loads(body)
                name = f"{given['organization'] or 'me'}/{given['name']}"
                content = {"url": f"{hub.url}/{name}", "name": name, "id": "1"}
                if name in hub.repositories:
                    self.answer({**content, "error": "You already created this model repo"}, 409)
                    return
                hub.repositories[name], hub.visibility[name] = {}, given.get("visibility")
                self.answer(content)
            elif path == "/api/validate-yaml":  # the card's metadata
                self.answer({"errors": [], "warnings": []})
            elif path.endswith("/preupload/main"):
                files = [
                    {
                        "path": each["path"],
                        "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for each in json.loads(body)["files"]
                ]
                self.answer({"files": files})
            elif path.endswith(".git/info/lfs/objects/batch"):
                objects = [
                    {**each, "actions": {"upload": {"href": f"{hub.url}/blobs/{each['oid']}", "header": {}}}}
                    for each in json.loads(body)["objects"]
                ]
                self.answer({"transfer": "basic", "objects": objects})
            elif path.endswith("/commit/main"):
                self.commit(path.removeprefix("/api/models/").removesuffix("/commit/main"), body)
            else:
                self.answer({"error": "no such endpoint"}, 404)

        def commit(self, name: str, body: bytes) -> None:
            files, summary, deleted = {}, "", []
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    summary = value["summary"]
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.blobs[value["oid"]]
                elif line["key"] == "deletedFile":
                    deleted.append(value["path"])
            for path in deleted:
                del hub.repositories[name][path]
            hub.repositories[name] |= files
            hub.commits.append((name, summary))
            self.answer({"success": True, "commitOid": "abc123", "commitUrl": f"{hub.url}/{name}/commit/abc123"})

        def do_PUT(self) -> None:
            content = self.body()
            if self.refused():
                return
            oid = self.path.rpartition("/")[2]
            assert hashlib.sha256(content).hexdigest() == oid
            hub.blobs[oid] = content
            self.answer({})

        def do_GET(self) -> None:
            if self.refused():
                return
            path = unquote(self.path.partition("?")[0])
            if "/resolve/" in path:
                self.file(*path[1:].split("/resolve/"), body=True)
                return
            name, tree, revision = path.removeprefix("/api/models/").partition("/tree/")
            if not tree:
                name, _, revision = name.partition("/revision/")
            files = self.files(name, revision or "main")
            if files is not None and tree:
                self.answer([{"type": "file", "path": each, "size": len(files[each]), "oid": "1"} for each in files])
            elif files is not None:
                siblings = [{"rfilename": each} for each in files]
                sha = "abc123" if revision in ("", "main") else revision
                self.answer({"id": name, "modelId": name, "sha": sha, "siblings": siblings, "tags": []})
            else:
                self.answer({"error": "Repository not found"}, 404, "Repository not found")

        def do_HEAD(self) -> None:
            hub.requests.append(f"HEAD {self.path}")
            name, _, place = unquote(self.path.partition("?")[0])[1:].partition("/resolve/")
            self.file(name, place, body=False)

        def files(self, name: str, revision: str) -> dict[str, bytes] | None:
            if revision in ("main", "abc123"):
                return hub.repositories.get(name)
            return hub.branches.get((name, revision))

        def file(self, name: str, place: str, body: bool) -> None:
            revision, _, path = place.partition("/")
            content = (self.files(name, revision) or {}).get(path)
            self.send_response(404 if content is None else 200)
            self.send_header("X-Repo-Commit", revision)
            self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if body and content is not None:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
