"""As much of the Hugging Face hub's HTTP API as ``snapshot_download`` asks for, on loopback."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubHandler(BaseHTTPRequestHandler):
    """One repository, ``org/name``; another is unknown; ``org/gated`` is gated."""

    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/models/org/name/"):
            if "/tree/" in path:
                tree = [{"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                        for n, c in self.files.items()]  # fmt: skip
                self._answer(200, json.dumps(tree).encode())
            else:
                siblings = [{"rfilename": name} for name in self.files]
                info = {"id": "org/name", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
                self._answer(200, json.dumps(info).encode())
        elif path.startswith(f"/org/name/resolve/{COMMIT}/"):
            name = path.rpartition(f"{COMMIT}/")[2]
            if self.command == "GET":
                self.asked.append(name)
            self._answer(200, self.files[name], ETag=f'"{hashlib.sha1(self.files[name]).hexdigest()}"')
        elif "org/gated" in path:
            self._answer(403, b"{}", **{"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        else:
            self._answer(
                404, b"{}", **{"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such repository"}
            )

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def hub_server(files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Serve one repository; gives the address and the names of files fetched."""
    asked: list[str] = []
    handler = type("Handler", (HubHandler,), {"files": files, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
