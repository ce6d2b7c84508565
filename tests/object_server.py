"""An S3 endpoint in memory, for what needs no real one: whole objects, one page of a list, and an outage."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code></Error>"
ABSENT = b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>"


class ObjectServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Objects)
        self.objects: dict[str, bytes] = {}  # by bucket and key
        self.lasts: int | None = None  # writes until it is down
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def down(self, writing: bool) -> bool:
        with self.lock:
            if self.lasts and writing:
                self.lasts -= 1
                return False
            return self.lasts == 0


class Objects(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ObjectServer

    def answer(self) -> None:
        parts = urlsplit(self.path)
        name, query = unquote(parts.path).lstrip("/"), parse_qs(parts.query)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        objects = self.server.objects
        if self.server.down(writing=self.command == "PUT"):
            return self.reply(503, SLOW_DOWN)
        if self.command == "PUT":
            objects[name] = body
            return self.reply(200, b"")
        if self.command == "DELETE":
            objects.pop(name, None)
            return self.reply(204, b"")
        if "list-type" in query:
            return self.reply(200, self.page(f"{name}/", query.get("prefix", [""])[0]))
        return self.reply(200, objects[name]) if name in objects else self.reply(404, ABSENT)

    do_GET = do_PUT = do_DELETE = do_HEAD = answer

    def page(self, bucket: str, prefix: str) -> bytes:
        found = sorted(name for name in self.server.objects if name.startswith(bucket + prefix))
        rows = "".join(
            f"<Contents><Key>{escape(name.removeprefix(bucket))}</Key>"
            f"<Size>{len(self.server.objects[name])}</Size>"
            f"<ETag>{hashlib.md5(self.server.objects[name]).hexdigest()}</ETag></Contents>"
            for name in found
        )
        return f"<?xml version='1.0'?><ListBucketResult>{rows}</ListBucketResult>".encode()

    def reply(self, status: int, body: bytes) -> None:
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD" and status != 204:
            self.wfile.write(body)

    def log_message(self, *words: Any) -> None:
        pass


@contextmanager
def object_server() -> Iterator[ObjectServer]:
    server = ObjectServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
