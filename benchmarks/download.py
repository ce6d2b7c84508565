"""Images per second from URLs to shards, beside img2dataset, from the same loopback server in the same minutes.

    python benchmarks/download.py [images=6000] [peer=.venv-peers/img2dataset/bin/img2dataset] [rounds=3]

Both are timed as a user runs them: from starting the command to its end, with everything in files on this disk;
memory is the largest sum of the pages that all of their processes have for themselves. img2dataset writes tars; ours
writes every image under its key, then tars with an index, and checks them (plan, fetch, pack, verify).
Cases: every image resized so that its shorter side is 256 pixels (JPEG quality 95), and as it is.
"""

import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import ClassVar

import pyarrow
import pyarrow.csv
from loader import photo

from hpc_mm.config import parse_arguments

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = 64  # different ones
SIZE, QUALITY = 256, 95


class Answers(asyncio.Protocol):
    """HTTP/1.1 with connections that stay: /N is photo N modulo PHOTOS; robots.txt is not there."""

    photos: ClassVar[list[bytes]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while b"\r\n\r\n" in self.buffer:
            request, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
            path = request.split(b" ", 2)[1].lstrip(b"/")
            if path.isdigit():
                self.transport.write(self.photos[int(path) % PHOTOS])  # type: ignore[attr-defined]
            else:
                self.transport.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")  # type: ignore[attr-defined]


async def serve() -> None:
    for seed in range(PHOTOS):
        body = photo(seed, 640, 480)
        Answers.photos.append(
            b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
    server = await asyncio.get_running_loop().create_server(Answers, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


class Memory(threading.Thread):
    """The largest resident memory of a process and all below it, in MB, looked at ten times a second."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.process, self.peak, self.over = process, 0.0, threading.Event()

    def run(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE") / 1e6
        while not self.over.wait(0.1):
            self.peak = max(self.peak, page * sum(map(resident, family(self.process))))


def family(process: int) -> list[int]:
    try:
        below = [
            int(word) for file in Path(f"/proc/{process}/task").glob("*/children") for word in file.read_text().split()
        ]
    except OSError:
        return []
    return [process, *(member for child in below for member in family(child))]


def resident(process: int) -> int:
    """Pages of its own: shared ones are counted once, in the process that they are largest in, so not here."""
    try:
        words = Path(f"/proc/{process}/statm").read_text().split()
    except OSError:
        return 0
    return int(words[1]) - int(words[2])


def timed(words: list[str], folder: Path) -> tuple[float, float]:
    """Seconds and MB of a command."""
    started = time.perf_counter()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            words, stdout=log, stderr=log, cwd=ROOT, env={**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
        )
        memory = Memory(process.pid)
        memory.start()
        code = process.wait()
    memory.over.set()
    if code:
        sys.exit(f"{words} failed:\n{(folder / 'log').read_text()[-2000:]}")
    return time.perf_counter() - started, memory.peak


def ours(urls: Path, folder: Path, resize: bool) -> tuple[float, float, int]:
    words = [sys.executable, "data_prep/cc3m.py", f"source={urls}", f"out={folder}/out", f"images={folder}/images"]
    words += ["columns=url,caption", "cluster=local", "web.allow=127.0.0.0/8", "web.host_rate=0"]
    words += ["web.host_connections=64", "web.connections=64"]
    if resize:
        words += ["recode.resize=keep_ratio", f"recode.size={SIZE}", f"recode.quality={QUALITY}"]
    seconds, memory = timed(words, folder)
    return seconds, memory, stored(folder)


def theirs(peer: str, urls: Path, folder: Path, resize: bool) -> tuple[float, float, int]:
    words = [
        peer,
        f"--url_list={urls.with_suffix('.csv')}",
        "--input_format=csv",
        "--url_col=url",
        "--caption_col=caption",
    ]
    words += [f"--output_folder={folder}/out", "--output_format=webdataset", "--processes_count=2", "--thread_count=32"]
    words += ["--resize_mode=keep_ratio" if resize else "--resize_mode=no", f"--image_size={SIZE}"]
    words += [f"--encode_quality={QUALITY}", "--number_sample_per_shard=1000", "--enable_wandb=False", "--retries=0"]
    seconds, memory = timed(words, folder)
    return seconds, memory, stored(folder)


def stored(folder: Path) -> int:
    """Images in the tars."""
    found = 0
    for path in (folder / "out").glob("*.tar"):
        with tarfile.open(path) as tar:
            found += sum(name.endswith(".jpg") for name in tar.getnames())
    return found


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    if arguments.get("what") == "serve":
        asyncio.run(serve())
        return
    count, rounds = int(arguments.get("images", 6000)), int(arguments.get("rounds", 3))
    peer = str(Path(arguments.get("peer", ".venv-peers/img2dataset/bin/img2dataset")).absolute())
    server = subprocess.Popen([sys.executable, __file__, "what=serve"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        with tempfile.TemporaryDirectory() as root:
            urls = Path(root, "urls.tsv")
            table = [(f"http://127.0.0.1:{port}/{number}", f"caption {number}") for number in range(count)]
            urls.write_text("".join(f"{url}\t{caption}\n" for url, caption in table))
            columns = {"url": [url for url, _ in table], "caption": [caption for _, caption in table]}
            pyarrow.csv.write_csv(pyarrow.table(columns), urls.with_suffix(".csv"))
            for name, resize in (("shorter side 256, quality 95", True), ("no re-encoding", False)):
                compare(name, Path(root), urls, peer, resize, count, rounds)
    finally:
        server.kill()
        server.wait()


def compare(name: str, root: Path, urls: Path, peer: str, resize: bool, count: int, rounds: int) -> None:
    times: dict[str, list[tuple[float, float]]] = {"img2dataset": [], "hpc_mm": []}
    for number in range(rounds):
        for side in times:
            folder = root / f"{side}-{resize}-{number}"
            folder.mkdir()
            run = theirs(peer, urls, folder, resize) if side == "img2dataset" else ours(urls, folder, resize)
            if run[2] != count:
                sys.exit(f"{side} has {run[2]} of {count} images:\n{(folder / 'log').read_text()[-2000:]}")
            times[side].append(run[:2])
            shutil.rmtree(folder)
    print(f"{name}: {count} images")
    base = statistics.median(seconds for seconds, _ in times["img2dataset"])
    for side, found in times.items():
        seconds = statistics.median(seconds for seconds, _ in found)
        runs = " ".join(f"{count / seconds:.0f}" for seconds, _ in found)
        memory = max(memory for _, memory in found)
        print(
            f"  {side:12}{count / seconds:7.0f} images/s{base / seconds:7.2f}x{memory:8.0f} MB   rounds {runs}",
            flush=True,
        )


if __name__ == "__main__":
    main()
