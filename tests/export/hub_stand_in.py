"""A Hub on this machine for the calls that an upload makes: create a repository, ask how files are sent, LFS, commit.

What arrives is kept as the Hub would serve it: path to bytes. Not a test module.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OID = "a" * 40


class Hub:
    """The server and what it was given.

    Attributes:
        repos: by id what `create_repo` sent; ``commits``: the parsed lines of each commit.
        objects: LFS contents by sha256; ``calls``: (method, path, authorization) of every request.
        refuse: (part of a path) -> (status, message) that it answers with.
        cas: where xet contents go (a ``local://`` folder); None: files are sent by LFS.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.commits: list[list[dict[str, Any]]] = []
        self.objects: dict[str, bytes] = {}
        self.calls: list[tuple[str, str, str]] = []
        self.refuse: dict[str, tuple[int, str]] = {}
        self.cas: str | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: Any) -> None:
                pass

            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.calls.append((self.command, self.path, self.headers.get("Authorization", "")))
                status, value = hub.answer(self.command, self.path, body)
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                if status >= 400:
                    self.send_header("X-Error-Message", value["error"])
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = _answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self.server.shutdown()
        self.server.server_close()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Return status and JSON."""
        for part, (status, message) in self.refuse.items():
            if part in path:
                return status, {"error": message}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return 200, {"files": [{"path": f["path"], "uploadMode": _mode(f), "shouldIgnore": False} for f in files]}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._upload(one) for one in json.loads(body)["objects"]]}
        if path.startswith("/objects/") and method == "PUT":
            oid = path.rsplit("/", 1)[1]
            assert hashlib.sha256(body).hexdigest() == oid
            self.objects[oid] = body
            return 200, {}
        if "/xet-write-token/" in path:
            return 200, {"casUrl": self.cas, "exp": 4102444800, "accessToken": "cas"}
        if "/commit/" in path:
            self.commits.append([json.loads(line) for line in body.splitlines()])
            repo = path.removeprefix("/api/models/").split("/commit/")[0]
            return 200, {"success": True, "commitUrl": f"{self.url}/{repo}/commit/{OID}", "commitOid": OID}
        return (200, {}) if method == "GET" else (404, {"error": f"no such call: {method} {path}"})

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = {"url": f"{self.url}/{name}", "name": name}
        if name in self.repos:
            return 409, {**url, "error": "You already created this model repo"}
        self.repos[name] = asked
        return 200, url

    def _upload(self, one: dict[str, Any]) -> dict[str, Any]:
        return {**one, "actions": {"upload": {"href": f"{self.url}/objects/{one['oid']}"}}}

    def files(self) -> dict[str, bytes]:
        """Return what was committed; contents that came by xet are left empty."""
        found = {}
        for line in (line for commit in self.commits for line in commit):
            value = line["value"]
            if line["key"] == "file":
                found[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                found[value["path"]] = self.objects.get(value["oid"], b"")
        return found

    def oids(self) -> dict[str, str]:
        """Return path and sha256 of what is kept outside git."""
        lines = [line["value"] for commit in self.commits for line in commit if line["key"] == "lfsFile"]
        return {value["path"]: value["oid"] for value in lines}


def _mode(file: dict[str, Any]) -> str:
    return "lfs" if file["path"].endswith((".safetensors", ".gguf", ".png")) and file["size"] else "regular"
