"""The fetch stage: the URLs of a plan's parts become images in a store, and a line of the ledger each."""

from __future__ import annotations

import asyncio
import ctypes
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby

from aiohttp.abc import AbstractResolver

from hpc_mm.data.ledger import OK, POISON, RETRY, Ledger, Line
from hpc_mm.data.pictures import MAX_PIXELS, UnreadableImage
from hpc_mm.data.recode import Recode, Room, StoredImage, recode
from hpc_mm.data.schema import image_key
from hpc_mm.data.store import MissingKey, Store, StoreError
from hpc_mm.data.wanted import Part, host_of, read_urls
from hpc_mm.data.web import MISSING, NOT_AN_IMAGE, UNREACHABLE, Fetcher, Web
from hpc_mm.deadline import ended_in_order, terminate

PENDING = 2000  # URLs of a part that are under way or wait for their host's turn
AT_ONCE = 4  # groups of parts, so that the last slow hosts of one do not hold up the others
WRITES = 32  # images being decoded or written to the store
MOST_HELD = 32 * 2**20  # bytes of bodies that wait for a thread
M_MMAP_THRESHOLD, LARGE = -3, 8 * 2**20  # of malloc.h; bytes of memory that goes back to the system once it is freed
FLUSH = 5.0  # seconds between two writes of a ledger: what a kill makes us look for in the store again
CLOCKS = 0.1  # seconds by which two clocks may disagree on the length of a sleep
REPORT = 15.0  # seconds between two lines of progress


@dataclass
class Tally:
    """What a task has done, for its lines of progress."""

    total: int = 0  # URLs of its parts that were to do
    done: Counter[str] = field(default_factory=Counter)  # by status, or status and reason
    bytes: int = 0
    started: float = field(default_factory=time.monotonic)

    def add(self, line: Line, times: int = 1) -> None:
        """Count a line; ``times`` = -1 takes one back whose URL is asked again."""
        self.done[line.status if line.status == OK else f"{line.status}: {line.reason}"] += times
        self.bytes += times * line.bytes

    def text(self) -> str:
        """Share, rate, errors by class, time left."""
        done, seconds = self.done.total(), time.monotonic() - self.started
        rate = done / max(seconds, 1e-9)
        left = (self.total - done) / rate if done else 0.0
        classes = ", ".join(f"{count} {name}" for name, count in self.done.most_common() if count)
        megabytes = self.bytes / 1e6 / max(seconds, 1e-9)
        return f"{done} of {self.total} URLs, {rate:.0f}/s, {megabytes:.1f} MB/s, {left:.0f} s left: {classes}"


class Download:
    """One process that fetches groups of parts.

    ``retry``: classes of failures to fetch again, or ``missing``, which is no failure; none = what is due.
    """

    def __init__(self, fetcher: Fetcher, out: Store, images: Store, recoding: Recode, retry: Sequence[str]) -> None:
        self.fetcher, self.out, self.images = fetcher, out, images
        self.recoding, self.retry = recoding, frozenset(retry)
        self.threads = ThreadPoolExecutor(WRITES, "image")
        # Pictures that are decoded at once: more than cores would only cost memory. Together they have no more pixels
        # than one may have, so that decoding takes 1.3 GB at the very most, however many cores there are.
        self.decoders = threading.Semaphore(len(os.sched_getaffinity(0)))
        self.room = Room(MAX_PIXELS)
        self.tally = Tally()
        self.held = 0  # bytes
        self.lost: set[str] = set()  # keys of images that were stored once
        self.later: dict[Part, float] = {}  # what hosts have put off, and the first end of a pause in unix seconds

    async def parts(self, parts: Sequence[Part]) -> Tally:
        """Fetch these parts, and then again what hosts have put off."""
        self.tally.total = sum(part.urls for part in parts)
        reporter = asyncio.create_task(self.report())
        try:
            await self.each(parts, self.part)
            await self.come_back(parts)
        finally:
            reporter.cancel()
            self.threads.shutdown(cancel_futures=True)
        return self.tally

    async def each(self, parts: Sequence[Part], work: Callable[[Part], Awaitable[None]]) -> None:
        """Do the parts of a group one after the other, since they share hosts."""
        slots = asyncio.Semaphore(AT_ONCE)

        async def group(members: Sequence[Part]) -> None:
            async with slots:
                for part in members:
                    await work(part)

        async with asyncio.TaskGroup() as tasks:
            for _, members in groupby(parts, key=lambda part: part.group):
                tasks.create_task(group(list(members)))

    async def come_back(self, parts: Sequence[Part]) -> None:
        """Ask hosts again when the pauses are over that they asked for, as long as a task is to go on for that.

        A pause gets longer each time, so a host that never mends is asked a few times only.
        """
        end = time.time() + self.fetcher.settings.come_back
        while self.later and (start := min(self.later.values())) <= end:
            wait = max(start - time.time(), 0.0) + CLOCKS
            print(f"hosts of {len(self.later)} parts asked for a pause, the first for {wait:.0f} s more", flush=True)
            await asyncio.sleep(wait)
            due = [part for part in parts if self.later.get(part, math.inf) <= time.time()]
            await self.each(due, partial(self.part, again=True))

    async def part(self, part: Part, again: bool = False) -> None:
        """Fetch what is to do of a part; ``again``: only what its hosts have put off."""
        ledger = await asyncio.to_thread(Ledger, self.out, part.name)
        urls = await asyncio.to_thread(read_urls, self.out, part)
        if MISSING in self.retry and not again:
            self.lost |= await self.lost_of(ledger)
        now = time.time()
        todo = [url for url in urls if self.wants(ledger.lines.get(image_key(url)), now, again)]
        if again:
            for url in todo:
                self.tally.add(ledger.lines[image_key(url)], -1)
        else:
            late = [line for line in ledger.lines.values() if self.is_put_off(line) and (line.retry_at or 0.0) > now]
            for line in late:
                self.tally.add(line)
            self.tally.total -= len(urls) - len(todo) - len(late)
        if todo or ledger.begun:
            await self.work(todo, ledger, len(urls))
        pauses = [line.retry_at or 0.0 for line in ledger.lines.values() if self.is_put_off(line)]
        self.later.pop(part, None)
        if pauses:
            self.later[part] = min(pauses)

    async def work(self, todo: Sequence[str], ledger: Ledger, urls: int) -> None:
        """Fetch these of the part's so many URLs."""
        unsure = ledger.begun  # what was stored in the seconds before a process died has no line yet
        await asyncio.to_thread(ledger.flush)
        over, waiting = asyncio.Event(), iter(todo)
        async with asyncio.TaskGroup() as both:  # so a ledger that cannot be written ends the fetching
            flusher = both.create_task(self.flushing(ledger, over))
            try:
                async with asyncio.TaskGroup() as tasks:
                    for _ in range(min(PENDING, len(todo))):
                        tasks.create_task(self.some(waiting, ledger, unsure))
            finally:
                over.set()
                await asyncio.wait([flusher])
        whole = len(ledger.lines) == urls
        await asyncio.to_thread(ledger.finish if whole else ledger.flush)

    async def lost_of(self, ledger: Ledger) -> set[str]:
        """Keys of lines that are ok though the store has no such image any more: it is asked once for each."""
        loop, keys = asyncio.get_running_loop(), [line.key for line in ledger.lines.values() if line.status == OK]
        sizes = await asyncio.gather(*(loop.run_in_executor(self.threads, self.images.size, key) for key in keys))
        return {key for key, size in zip(keys, sizes, strict=True) if size is None}

    def wants(self, line: Line | None, now: float, again: bool) -> bool:
        if line is None:
            return not self.retry
        if (line.retry_at or 0.0) > now:
            return False
        if again:
            return self.is_put_off(line)
        if line.status == OK:
            return line.key in self.lost
        return line.status == RETRY if not self.retry else line.reason in self.retry

    def is_put_off(self, line: Line) -> bool:
        """Whether a host that answers has asked for a pause, so that it may mend while this task runs."""
        asked = line.status == RETRY and line.retry_at is not None and line.reason not in UNREACHABLE
        return asked and (not self.retry or line.reason in self.retry or line.key in self.lost)

    async def some(self, urls: Iterator[str], ledger: Ledger, unsure: bool) -> None:
        for url in urls:
            known = ledger.lines.get(image_key(url))
            attempts = known.attempts if known else 0
            line = await self.found(url) if unsure and known is None else None
            line = line or await self.one(url, attempts)
            ledger.add(line)
            self.tally.add(line)

    async def found(self, url: str) -> Line | None:
        """The line of an image that is in the store already."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, self.line_of_stored, url)

    def line_of_stored(self, url: str) -> Line | None:
        key = image_key(url)
        try:
            data = self.images.read(key)
        except MissingKey:
            return None
        with self.decoders, self.room.lease() as wait:
            try:
                image = recode(data, Recode(), wait)
            except UnreadableImage:  # not ours: fetched anew
                return None
        line = with_image(Line(key, OK, "", 1, host=host_of(url), time=time.time()), image)
        if self.recoding.resize == "none":
            return line
        return replace(line, original_width=0, original_height=0)  # only the process knew that died

    async def one(self, url: str, attempts: int) -> Line:
        """Fetch, check, perhaps re-encode, store."""
        outcome = await self.fetcher.fetch(url)
        asked = outcome.requests or outcome.retry_at is None  # else its host was paused before its turn
        line = Line(
            image_key(url),
            outcome.status,
            "" if outcome.status == OK else outcome.reason,
            attempts + 1 if asked else attempts,
            bytes=outcome.received,
            host=outcome.host,
            time=time.time(),
            retry_at=outcome.retry_at,
        )
        if outcome.data is None:
            return line
        self.hold(len(outcome.data))
        try:
            return await asyncio.get_running_loop().run_in_executor(self.threads, self.keep, line, outcome.data)
        finally:
            self.hold(-len(outcome.data))

    def hold(self, size: int) -> None:
        """Count bytes that wait to be stored; nothing more is asked for while they are too many."""
        self.held += size
        if self.held > MOST_HELD:
            self.fetcher.room.clear()
        else:
            self.fetcher.room.set()

    def keep(self, line: Line, data: bytes) -> Line:
        with self.decoders, self.room.lease() as wait:
            try:
                image = recode(data, self.recoding, wait)
            except UnreadableImage:  # has the picture as long as it is handled: so the room is given back after that
                return replace(line, status=POISON, reason=NOT_AN_IMAGE)
        size = f"{image.original_width}x{image.original_height}"
        self.images.write(line.key, image.data, {"sha256": image.sha256, "original-size": size})
        return with_image(line, image)

    async def flushing(self, ledger: Ledger, over: asyncio.Event) -> None:
        while not over.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), FLUSH)
            try:
                await asyncio.to_thread(ledger.flush)
            except StoreError as error:  # may pass: its lines stay for the next time; at the end a failure counts
                print(f"the ledger waits: {error}", flush=True)

    async def report(self) -> None:
        while True:
            await asyncio.sleep(REPORT)
            print(self.tally.text(), flush=True)


def first(error: BaseException) -> BaseException:
    """One of the errors of tasks that ran side by side; the others are of the same store, or follow from it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def with_image(line: Line, image: StoredImage) -> Line:
    return replace(
        line,
        stored=len(image.data),
        sha256=image.sha256,
        width=image.width,
        height=image.height,
        original_width=image.original_width,
        original_height=image.original_height,
    )


def give_back_freed_memory() -> None:
    """Have glibc keep no large memory for later: else each thread would, of all pictures that it has decoded."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)


def fetch(
    parts: Sequence[Part],
    out: Store,
    images: Store,
    web: Web,
    recoding: Recode,
    retry: Sequence[str] = (),
    resolver: AbstractResolver | None = None,
    tasks: int = 1,
) -> Tally:
    """Fetch what is to do of these parts; what it came to. A store that fails raises, and what is stored stays.

    ``tasks``: processes that share a plan's parts. SIGTERM is SystemExit (143) after the ledgers are written.
    """

    give_back_freed_memory()

    async def run() -> Tally:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        with ended_in_order(partial(loop.call_soon_threadsafe, task.cancel)):
            async with Fetcher(web, resolver, tasks) as fetcher:
                return await Download(fetcher, out, images, recoding, retry).parts(parts)

    try:
        return asyncio.run(run())
    except asyncio.CancelledError:
        terminate()
    except BaseExceptionGroup as errors:
        raise first(errors) from errors
