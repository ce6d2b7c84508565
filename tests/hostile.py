"""A loopback web server that does what bad servers do, and a guard that no connection goes elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from aiohttp.abc import AbstractResolver, ResolveResult
from required import absent

SERVER = "127.0.0.2"  # the one address that tests allow
CANARY = "127.0.0.1"  # where the same server listens, and nothing may come
IMAGE = b"\xff\xd8\xff" + b"an image, as far as a fetcher knows" * 100
HTML = b"<html>not an image</html>"
Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


def head(status: str, *lines: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode()


def whole(status: str, body: bytes, *lines: str) -> bytes:
    return head(status, f"Content-Length: {len(body)}", *lines) + body


def redirect(target: str) -> bytes:
    return whole("302 Found", b"", f"Location: {target}")


async def drip(out: asyncio.StreamWriter, data: bytes) -> None:
    for byte in data * 100:
        out.write(bytes([byte]))
        await out.drain()
        await asyncio.sleep(1)


async def for_ever(out: asyncio.StreamWriter, data: bytes) -> None:
    while True:
        out.write(data)
        await out.drain()


async def slow_body(out: asyncio.StreamWriter) -> None:
    out.write(head("200 OK", "Content-Length: 1000"))
    await drip(out, b"x")


async def slow_headers(out: asyncio.StreamWriter) -> None:
    await drip(out, head("200 OK", "X-Slow: yes"))


async def silent(out: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


async def slow(out: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0.1)
    out.write(FIXED["ok"])


async def late_redirect(out: asyncio.StreamWriter) -> None:
    port = out.get_extra_info("sockname")[1]
    await asyncio.sleep(2)
    out.write(redirect(f"http://silent.test:{port}/silent"))


async def stalling(out: asyncio.StreamWriter) -> None:
    out.write(head("200 OK", "Content-Length: 8000000"))
    for _ in range(60):
        out.write(bytes(65536))
        await out.drain()
    await asyncio.sleep(60)


async def endless(out: asyncio.StreamWriter) -> None:
    out.write(head("200 OK", "Content-Type: image/jpeg"))
    await for_ever(out, bytes(65536))


async def endless_chunks(out: asyncio.StreamWriter) -> None:
    out.write(head("200 OK", "Transfer-Encoding: chunked"))
    await for_ever(out, b"10000\r\n" + bytes(65536) + b"\r\n")


async def tiny_chunks(out: asyncio.StreamWriter) -> None:
    out.write(head("200 OK", "Transfer-Encoding: chunked"))
    await for_ever(out, b"1\r\nx\r\n" * 10_000)


async def many_headers(out: asyncio.StreamWriter) -> None:
    out.write(b"HTTP/1.1 200 OK\r\n")
    await for_ever(out, b"X-More: yes\r\n" * 1000)


async def long_header(out: asyncio.StreamWriter) -> None:
    out.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    await for_ever(out, b"x" * 65536)


async def many_continues(out: asyncio.StreamWriter) -> None:
    await for_ever(out, head("100 Continue") * 1000)


async def unasked(out: asyncio.StreamWriter) -> None:
    """A good answer, and then, on the idle connection, answers without end."""
    out.write(whole("200 OK", IMAGE))
    await out.drain()
    await asyncio.sleep(0.1)
    await for_ever(out, whole("200 OK", b"") * 1000)


async def half_closed(out: asyncio.StreamWriter) -> None:
    out.write(head("200 OK", f"Content-Length: {len(IMAGE)}") + IMAGE[:100])
    out.write_eof()
    await asyncio.sleep(60)


async def cut_chunk(out: asyncio.StreamWriter) -> None:
    out.write(head("200 OK", "Transfer-Encoding: chunked") + b"100\r\nshort")


FIXED = {
    "ok": whole("200 OK", IMAGE, "Content-Type: image/jpeg"),
    "html": whole("200 OK", HTML, "Content-Type: image/jpeg"),
    "empty": whole("200 OK", b""),
    "no_content": head("204 No Content"),
    "gzip": whole("200 OK", gzip.compress(bytes(10_000_000)), "Content-Encoding: gzip"),
    "says_less": head("200 OK", "Content-Length: 5") + IMAGE,
    "says_much": head("200 OK", "Content-Length: 1000000000000000") + IMAGE,
    "says_nonsense": head("200 OK", "Content-Length: -5") + IMAGE,
    "says_twice": head("200 OK", "Content-Length: 5", "Content-Length: 6") + IMAGE,
    "garbage": b"\x00\x01\x02 this is not HTTP\r\n\r\n",
    "upgrade": head("101 Switching Protocols", "Upgrade: h2c", "Connection: Upgrade"),
    "loop": redirect("/loop"),
    "to_ok": redirect("ok#part"),
    "to_loopback": redirect(f"http://{CANARY}:PORT/ok"),
    "to_decimal": redirect("http://2130706433:PORT/ok"),
    "to_mapped": redirect(f"http://[::ffff:{CANARY}]:PORT/ok"),
    "to_metadata": redirect("http://169.254.169.254/latest/meta-data/"),
    "to_file": redirect("file:///etc/passwd"),
    "to_user": redirect("http://user:password@good.test:PORT/ok"),
    "to_nowhere": head("302 Found", "Content-Length: 0"),
    "storm": whole("429 Too Many Requests", b"slow down", "Retry-After: 1"),
    "storm_without": whole("429 Too Many Requests", b"slow down"),
    "later": whole("503 Service Unavailable", b"", "Retry-After: 3600"),
    "noai": whole("200 OK", IMAGE, "X-Robots-Tag: noimageindex, noai"),
    **{f"status_{code}": whole(f"{code} Status", b"") for code in (403, 404, 410, 418, 451, 408, 500, 503)},
}
ACTIVE: dict[str, Answer] = {
    function.__name__: function
    for function in (
        slow_body, slow_headers, silent, slow, late_redirect, stalling, endless, endless_chunks, tiny_chunks,
        many_headers, long_header, many_continues, unasked, half_closed, cut_chunk,
    )
}  # fmt: skip


# What a fetcher makes of a URL with such a path: status and reason.
EXPECTED = {
    "ok": ("ok", "ok"),
    "html": ("ok", "ok"),
    "to_ok": ("ok", "ok"),
    "unasked": ("ok", "ok"),
    "slow_body": ("retry", "timeout"),
    "slow_headers": ("retry", "timeout"),
    "silent": ("retry", "timeout"),
    "endless": ("poison", "too_large"),
    "endless_chunks": ("poison", "too_large"),
    "says_much": ("poison", "too_large"),
    "says_nonsense": ("poison", "malformed"),
    "says_twice": ("poison", "malformed"),
    "many_headers": ("poison", "malformed"),
    "long_header": ("poison", "malformed"),
    "garbage": ("poison", "malformed"),
    "upgrade": ("poison", "http_101"),
    "empty": ("poison", "empty"),
    "no_content": ("poison", "http_204"),
    "gzip": ("poison", "encoded"),
    "loop": ("poison", "redirects"),
    "to_file": ("poison", "bad_url"),
    "to_user": ("poison", "bad_url"),
    "to_nowhere": ("poison", "http_302"),
    "to_loopback": ("blocked", "address"),
    "to_decimal": ("blocked", "address"),
    "to_mapped": ("blocked", "address"),
    "to_metadata": ("blocked", "address"),
    "many_continues": ("retry", "connection"),
    "half_closed": ("retry", "connection"),
    "cut_chunk": ("retry", "connection"),
    "storm": ("retry", "http_429"),
    "storm_without": ("retry", "http_429"),
    "later": ("retry", "http_503"),
    "noai": ("blocked", "noai"),
    "status_403": ("blocked", "http_403"),
    "status_451": ("blocked", "http_451"),
    "status_404": ("gone", "http_404"),
    "status_410": ("gone", "http_410"),
    "status_418": ("gone", "http_418"),
    "status_408": ("retry", "http_408"),
    "status_500": ("retry", "http_500"),
    "status_503": ("retry", "http_503"),
}


class Server:
    """Answers ``/NAME`` as FIXED or ACTIVE say, else with IMAGE; ``/robots.txt`` as ``robots`` says for the host."""

    def __init__(self, certificate: Path | None = None, key: Path | None = None) -> None:
        self.robots: dict[str, bytes | Answer] = {}
        self.pages: dict[str, bytes] = {}  # by name, beside FIXED
        self.answers: dict[str, list[bytes]] = {}  # by path, one after the other, before what FIXED says
        self.requests: Counter[str] = Counter()  # by host and path
        self.peers: Counter[str] = Counter()  # connections accepted, by the address that was connected to
        self.busy = self.most_busy = 0
        self._loop = asyncio.new_event_loop()
        self._ssl = None
        if certificate:
            self._ssl = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._ssl.load_cert_chain(certificate, key)
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,))
        self._thread.start()
        started.wait()

    def _run(self, started: threading.Event) -> None:
        # What a fetcher does to a connection is no error here.
        self._loop.set_exception_handler(lambda loop, context: None)
        self._stop = asyncio.Event()
        self._loop.run_until_complete(self._serve(started))
        self._loop.close()

    async def _serve(self, started: threading.Event) -> None:
        first = await asyncio.start_server(self._talk, SERVER, 0, ssl=self._ssl)
        self.port = first.sockets[0].getsockname()[1]
        second = await asyncio.start_server(self._talk, SERVER, 0, ssl=self._ssl)
        self.other_port = second.sockets[0].getsockname()[1]
        canary = await asyncio.start_server(self._talk, CANARY, self.port)
        started.set()
        await self._stop.wait()
        for server in (first, second, canary):
            server.close()
        talks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in talks:
            task.cancel()
        await asyncio.gather(*talks, return_exceptions=True)
        await asyncio.sleep(0.01)  # connections end in a later turn of the loop

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _talk(self, reader: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        self.peers[out.get_extra_info("sockname")[0]] += 1
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                while await self._answer((await reader.readuntil(b"\r\n\r\n")).decode(), out):
                    pass
            out.close()
        except asyncio.CancelledError:
            out.transport.abort()

    async def _answer(self, request: str, out: asyncio.StreamWriter) -> bool:
        path = request.split(" ")[1]
        host = request.partition("Host: ")[2].partition("\r\n")[0].partition(":")[0]
        self.requests[f"{host}{path}"] += 1
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        try:
            found = self._found(host, path)
            if callable(found):
                await found(out)
                return False
            out.write(found.replace(b"PORT", str(self.port).encode()))
            await out.drain()
            return b"Content-Length: " in found
        finally:
            self.busy -= 1

    def _found(self, host: str, path: str) -> bytes | Answer:
        if path == "/robots.txt":
            return self.robots.get(host, FIXED["status_404"])
        if self.answers.get(path):
            return self.answers[path].pop(0)
        name = path.strip("/").partition("?")[0]
        return ACTIVE.get(name) or self.pages.get(name) or FIXED.get(name) or FIXED["ok"]


class Names(AbstractResolver):
    """Names of the tests: what ``answers`` says, one list after the other, else the server; ``*.nowhere`` is none."""

    def __init__(self) -> None:
        self.answers: dict[str, list[list[str]]] = {}
        self.asked: Counter[str] = Counter()

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_UNSPEC) -> list[ResolveResult]:
        self.asked[host] += 1
        if host.endswith(".nowhere"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        answers = self.answers.get(host)
        addresses = (answers.pop(0) if len(answers) > 1 else answers[0]) if answers else [SERVER]
        return [
            {"hostname": host, "host": address, "port": port, "family": family, "proto": 0, "flags": 0}
            for address in addresses
        ]

    async def close(self) -> None:
        pass


class Guard:
    """Sees every connection and lookup of this process, and blocks what does not go to SERVER."""

    def __init__(self) -> None:
        self.on, self.elsewhere = False, list[object]()
        sys.addaudithook(self._see)

    def _see(self, event: str, args: tuple[object, ...]) -> None:
        if not self.on or event not in ("socket.connect", "socket.getaddrinfo"):
            return
        target = args[1] if event == "socket.connect" else args
        host = target[0] if isinstance(target, tuple) else target
        if host != SERVER:
            self.elsewhere.append(target)
            raise PermissionError(f"a test connects to {target}")

    @contextlib.contextmanager
    def watching(self) -> Iterator[Guard]:
        self.on, self.elsewhere = True, []
        try:
            yield self
        finally:
            self.on = False


GUARD = Guard()


@contextlib.contextmanager
def guarded_server(*certificate: Path) -> Iterator[Server]:
    """A server for this process, which connects to nothing else. ``certificate``: its file, and that of its key."""
    server = Server(*certificate)
    try:
        with GUARD.watching() as guard:
            yield server
    finally:  # its thread would keep the process from ending
        server.close()
    assert guard.elsewhere == []
    assert server.peers[CANARY] == 0


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for tls.test that nobody trusts, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        absent("no openssl on PATH; it makes the certificate")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    words = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=tls.test"]
    words += ["-addext", "subjectAltName=DNS:tls.test", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([openssl, *words], check=True, capture_output=True)
    return certificate, key


def peak_mb() -> float:
    """The most memory since ``forget_peak``."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1000


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
