"""As much of the Hugging Face Hub as an upload needs, on a port of this machine: repositories, LFS, commits."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_" + "thisIsASecretOfTheTests"


@dataclass
class Hub:
    """What the server holds; every request but those of blobs must carry the token."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
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
            path = self.path.partition("?")[0].removeprefix("/api/models/")
            name, tree, _ = path.partition("/tree/")
            if tree and name in hub.repositories:
                files = hub.repositories[name].items()
                self.answer([{"type": "file", "oid": "0", "size": len(each), "path": path} for path, each in files])
                return
            name = path.partition("/revision/")[0]
            if name in hub.repositories:
                siblings = [{"rfilename": each} for each in hub.repositories[name]]
                self.answer({"id": name, "modelId": name, "sha": "abc123", "siblings": siblings, "tags": []})
            else:
                self.answer({"error": "Repository not found"}, 404, "Repository not found")

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
