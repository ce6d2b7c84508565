"""A proxy in front of an S3 endpoint that fails at times: bursts of 503, silence, and answers cut in the middle."""

import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

SILENCE = 20.0  # seconds: longer than the client waits between two pieces of an answer
BURST = 20  # requests that are refused in a row
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code></Error>"


class Faults(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    target: str  # host:port of the endpoint
    draw: random.Random
    counts: Counter[str]
    lock: threading.Lock
    refusing = 0  # requests of a burst that are still to come

    def choose(self) -> str:
        kind = type(self)
        with kind.lock:
            if kind.refusing:
                kind.refusing -= 1
                fault = "burst"
            else:
                chance = kind.draw.random()
                fault = "burst" if chance < 0.01 else "cut" if chance < 0.06 else "silence" if chance < 0.065 else ""
                kind.refusing = BURST if fault == "burst" else 0
            kind.counts[fault or "served"] += 1
        return fault

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.choose()
        if fault == "burst":
            return self.reply(503, [("Content-Type", "application/xml")], SLOW_DOWN)
        if fault == "silence":
            time.sleep(SILENCE)
            self.close_connection = True
            return None
        connection = http.client.HTTPConnection(self.target, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        kept = [
            (name, value)
            for name, value in answer.getheaders()
            if name.lower() not in ("connection", "transfer-encoding")
        ]
        self.reply(answer.status, kept, data, cut=fault == "cut")
        return None

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = pass_on

    def reply(self, status: int, headers: list[tuple[str, str]], data: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        names = {name.lower() for name, _ in headers}
        for name, value in headers:
            self.send_header(name, value)
        if "content-length" not in names and status != 204:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if cut:  # an answer without a body is lost in its last line
            self.close_connection = True
            data = data[: len(data) // 2]
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *words: Any) -> None:
        pass


@contextmanager
def fault_proxy(endpoint: str, seed: int) -> Iterator[tuple[str, Counter[str]]]:
    """Its address, and how often it did what."""

    class Handler(Faults):
        target, draw, counts, lock = urlsplit(endpoint).netloc, random.Random(seed), Counter(), threading.Lock()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", Handler.counts
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
