"""A stand-in for the hub's HTTP API on this machine: it accepts commits and keeps the files."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """As a context manager, a server. `files` maps a path in the repository to its bytes, as last committed."""

    def __init__(self):
        self.files: dict[str, bytes] = {}

    def __enter__(self) -> Hub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                if self.path.startswith("/api/whoami"):
                    return self.answer({"name": "me", "type": "user", "orgs": [], "auth": {}})
                if self.path.startswith("/api/models/me/adapter"):
                    return self.answer(
                        {"id": "me/adapter", "sha": "0" * 40, "siblings": [], "tags": [], "private": False}
                    )
                self.answer({"error": f"no GET {self.path}"}, 404)

            do_HEAD = do_GET

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.path.startswith("/api/repos/create"):
                    return self.answer({"url": f"{hub.url}/me/adapter", "name": "me/adapter"})
                if "/preupload/" in self.path:
                    paths = [file["path"] for file in json.loads(body)["files"]]
                    regular = [
                        {"path": p, "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                        for p in paths
                    ]
                    return self.answer({"files": regular})
                if "/commit/" in self.path:
                    for line in map(json.loads, body.splitlines()):
                        if line["key"] == "file":
                            hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    sha = "1" * 40
                    return self.answer(
                        {"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/me/adapter/commit/{sha}"}
                    )
                if self.path.startswith("/api/validate-yaml"):
                    return self.answer({"errors": [], "warnings": []})
                self.answer({"error": f"no POST {self.path}"}, 404)

            def answer(self, content, status=200):
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
