"""A Hugging Face Hub on the loopback interface: as much of its protocol as streaming a parquet data set takes."""

from __future__ import annotations

import hashlib
import io
import json
import socket
import threading
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq

Files = Mapping[str, bytes]
Repositories = Mapping[str, Mapping[str, Files]]
"""Repository -> revision -> path -> content."""


def parquet(column: str, rows: Sequence[str | None]) -> bytes:
    """A parquet file of one column of text."""
    file = io.BytesIO()
    pq.write_table(pa.table({column: pa.array(rows, pa.string())}), file)
    return file.getvalue()


Faults = dict[str, list[str]]
"""Path -> what goes wrong, request by request, when its content is asked for: "closes" in mid-file, "hangs", "short" (a
length that the content does not have), or a status such as "503"; behind the last one all is well, unless that ends in "*".
"""


@contextmanager
def serve(repositories: Repositories, faults: Faults | None = None) -> Iterator[str]:
    """A hub of `repositories`; the value is its endpoint."""
    handler = type("Handler", (HubHandler,), {"repositories": repositories, "faults": faults or {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


HANG_SECONDS = 3.0
"""How long a request hangs; clients of the tests wait for less."""


@contextmanager
def hanging() -> Iterator[str]:
    """An endpoint that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def dripping() -> Iterator[str]:
    """An endpoint that answers with one byte of a header now and then, so that no single read times out."""
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            try:
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                    while not stop.wait(0.2):
                        connection.sendall(b"x")
            except OSError:
                pass  # the listener or the other side has closed

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            stop.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def refusing() -> str:
    """An endpoint where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def commit(repository: str, revision: str) -> str:
    """The commit that a revision points to."""
    return hashlib.sha1(f"{repository}@{revision}".encode()).hexdigest()


def describe(path: str, content: bytes) -> dict[str, object]:
    """A file as the tree and the path listings show it."""
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


class HubHandler(BaseHTTPRequestHandler):
    """Answers for repositories of data sets."""

    protocol_version = "HTTP/1.1"
    repositories: Repositories = {}
    faults: Faults = {}

    def log_message(self, *_: object) -> None:
        """Be quiet."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        """Find the repository that a path names, then answer for what the rest of it asks."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/").split("/")
        api = parts[0] == "api"
        if parts[int(api)] != "datasets" or len(parts) < int(api) + 3:
            return self.send_error_code(404, "nothing here")
        repository = "/".join(parts[int(api) + 1 : int(api) + 3])
        if repository not in self.repositories:
            return self.send_error_code(404, "RepoNotFound")
        what, *rest = [*parts[int(api) + 3 :], ""] if len(parts) == int(api) + 3 else parts[int(api) + 3 :]
        found = self.revision(repository, "/".join(rest) or "main")
        if found is None:
            return self.send_error_code(404, "RevisionNotFound")
        revision, path = found
        files = self.repositories[repository][revision]
        sha = commit(repository, revision)
        if what == "resolve":
            return self.send_file(files, path, sha)
        if what == "tree":
            return self.send_json(self.tree(files, path))
        if what == "paths-info":
            wanted = self.wanted(body)
            return self.send_json([describe(name, files[name]) for name in wanted if name in files])
        return self.send_json(
            {"id": repository, "sha": sha, "private": False, "siblings": [{"rfilename": n} for n in files]}
        )

    def revision(self, repository: str, rest: str) -> tuple[str, str] | None:
        """The revision that `rest` starts with, by its name or commit, and the path behind it."""
        for revision in self.repositories[repository]:
            for name in (revision, commit(repository, revision)):
                if rest == name or rest.startswith(name + "/"):
                    return revision, rest[len(name) + 1 :]
        return None

    def tree(self, files: Files, folder: str) -> list[dict[str, object]]:
        """All files and folders below `folder`."""
        prefix = folder + "/" if folder else ""
        below = [name for name in files if name.startswith(prefix)]
        folders = {name[:i] for name in below for i in range(len(prefix), len(name)) if name[i] == "/"}
        shown = [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(folders)]
        return [*shown, *(describe(name, files[name]) for name in below)]

    def wanted(self, body: bytes) -> list[str]:
        """The paths that a request for information names, as JSON or as a form."""
        try:
            return list(json.loads(body)["paths"])
        except ValueError:
            return urllib.parse.parse_qs(body.decode())["paths"]

    def send_json(self, value: object) -> None:
        """Answer with JSON."""
        self.send_body(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send_error_code(self, status: int, code: str) -> None:
        """Answer with an error as the Hub marks it."""
        self.send_body(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def send_file(self, files: Files, path: str, sha: str) -> None:
        """Answer with a file or the range of it that was asked for."""
        if path not in files:
            return self.send_body(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        content = files[path]
        fault = self.fault(path)
        if fault.isdigit():
            return self.send_body(int(fault), b"{}", {"X-Error-Message": "try again later"})
        if fault == "hangs":
            threading.Event().wait(HANG_SECONDS)
            self.close_connection = True
            return None
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        if not asked:
            return self.send_body(200, content, headers, fault)
        first, last = asked.removeprefix("bytes=").split("-")
        stop = min(int(last) + 1, len(content)) if last else len(content)
        headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(content)}"
        return self.send_body(206, content[int(first) : stop], headers, fault)

    def fault(self, path: str) -> str:
        """What goes wrong with this request, "" for nothing."""
        planned = self.faults.get(path) if self.command == "GET" else None
        if not planned:
            return ""
        return planned[0].removesuffix("*") if planned[0].endswith("*") else planned.pop(0)

    def send_body(self, status: int, body: bytes, headers: Mapping[str, str], fault: str = "") -> None:
        """Answer, without the body where only the head was asked for."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) - 10 * (fault == "short")))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault:
            self.wfile.write(body[: len(body) // 2 if fault == "closes" else -10])
            self.close_connection = True
        else:
            self.wfile.write(body)
