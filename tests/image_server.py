"""An HTTP server on several loopback addresses, in a process of its own so that it does not share our interpreter."""

import asyncio
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import samples

HOSTS = [f"127.0.0.{number}" for number in range(1, 9)]


class ImageServer:
    """``/N`` is image N modulo the images; while ``down`` is set, so many percent of the paths answer 503.

    After ``pause`` some hosts answer 429 for so many seconds from the next image that is asked for.
    """

    def __init__(self, port: int) -> None:
        self.port = port

    def url(self, number: int) -> str:
        return f"http://{HOSTS[number % len(HOSTS)]}:{self.port}/{number}"

    def down(self, percent: int) -> None:
        self._ask(f"down/{percent}")

    def pause(self, hosts: int, seconds: float, retry_after: int) -> None:
        self._ask(f"pause/{hosts}/{seconds}/{retry_after}")

    def requests(self) -> dict[int, int]:
        """Times that each image was asked for since the last call."""
        return {int(number): count for number, count in json.loads(self._ask("requests")).items()}

    def _ask(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/control/{path}", timeout=30) as answer:
            return str(answer.read().decode())


@contextmanager
def image_server(images: Path) -> Iterator[ImageServer]:
    """Serve the files of a folder in the order of their names."""
    process = subprocess.Popen([sys.executable, __file__, str(images)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield ImageServer(int(process.stdout.readline()))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def served_pictures(folder: Path) -> Iterator[ImageServer]:
    """A server of 16 different pictures."""
    for number in range(16):
        (folder / f"{number:02d}.jpg").write_bytes(samples.encoded(samples.picture(number)))
    with image_server(folder) as found:
        yield found


class Answers(asyncio.Protocol):
    images: ClassVar[list[bytes]] = []
    asked: ClassVar[dict[str, int]] = {}
    percent: ClassVar[int] = 0
    paused: ClassVar[list[str]] = []  # hosts
    seconds: ClassVar[float] = 0.0
    retry_after: ClassVar[str] = ""
    started: ClassVar[float] = 0.0  # monotonic seconds of the first image asked for since the pause was set

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.buffer = transport, b""
        self.host = transport.get_extra_info("sockname")[0]

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while b"\r\n\r\n" in self.buffer:
            request, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
            status, body = self.answer(request.split(b" ", 2)[1].decode().lstrip("/"))
            more = f"Retry-After: {self.retry_after}\r\n" if status == 429 else ""
            head = f"HTTP/1.1 {status} Word\r\nContent-Length: {len(body)}\r\n{more}\r\n"
            self.transport.write(head.encode() + body)  # type: ignore[attr-defined]

    def answer(self, path: str) -> tuple[int, bytes]:
        kind = type(self)
        if path.startswith("control/down/"):
            kind.percent = int(path.rpartition("/")[2])
            return 200, b""
        if path.startswith("control/pause/"):
            hosts, seconds, kind.retry_after = path.split("/")[2:]
            kind.paused, kind.seconds, kind.started = HOSTS[: int(hosts)], float(seconds), 0.0
            return 200, b""
        if path == "control/requests":
            asked, kind.asked = kind.asked, {}
            return 200, json.dumps(asked).encode()
        if not path.isdigit():
            return 404, b""  # robots.txt
        kind.asked[path] = kind.asked.get(path, 0) + 1
        kind.started = kind.started or time.monotonic()
        if self.host in kind.paused and time.monotonic() < kind.started + kind.seconds:
            return 429, b""
        if int(path) * 37 % 100 < kind.percent:
            return 503, b""
        return 200, kind.images[int(path) % len(kind.images)]


async def serve(folder: Path) -> None:
    Answers.images = [path.read_bytes() for path in sorted(folder.iterdir())]
    loop = asyncio.get_running_loop()
    first = await loop.create_server(Answers, HOSTS[0], 0)
    port = first.sockets[0].getsockname()[1]
    await loop.create_server(Answers, HOSTS[1:], port)
    print(port, flush=True)
    await first.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
