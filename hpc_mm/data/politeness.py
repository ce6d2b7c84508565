"""How often a host is asked: a token bucket, a bound of connections, and the pauses that it asks for or needs."""

from __future__ import annotations

import asyncio
import re
import time
from collections import OrderedDict
from email.utils import parsedate_to_datetime

HOSTS = 10_000  # hosts whose state is kept, beside those in use
LONGEST_PAUSE = 86_400.0  # seconds
PATIENCE = 5  # failures to get a whole answer of a host, one after the other, until it is left alone


class HostPaused(Exception):
    """A host is left alone for longer than a URL has time: why, and when (unix seconds) to come again."""

    def __init__(self, reason: str, retry_at: int) -> None:
        super().__init__(reason)
        self.reason, self.retry_at = reason, retry_at


class Host:
    """What is known of one host. ``enter`` waits for its turn; each is followed by one ``leave``."""

    __slots__ = ("_free", "_paused", "_reason", "_slots", "_strikes", "rate", "users")

    def __init__(self, rate: float, connections: int) -> None:
        self.rate, self._slots = rate, asyncio.Semaphore(connections)  # requests per second
        self.users = 0  # calls between the beginning of enter and leave
        self._free = self._paused = 0.0  # monotonic seconds: of the next token, and of the end of a pause
        self._strikes, self._reason = 0, ""

    async def enter(self, patience: float) -> float:
        """Wait for a connection, for the end of a pause and for a token; return the seconds that pauses took.

        A pause beyond ``patience`` seconds raises HostPaused.
        """
        self.users += 1
        try:
            await self._slots.acquire()
        except BaseException:
            self.users -= 1
            raise
        try:
            waited = await self._wait_out(patience)
            if (delay := self._token()) > 0:
                await asyncio.sleep(delay)
                waited += await self._wait_out(patience - waited)
        except BaseException:
            self.leave()
            raise
        return waited

    def leave(self) -> None:
        self._slots.release()
        self.users -= 1

    async def _wait_out(self, patience: float) -> float:
        waited = 0.0
        while (pause := self._paused - time.monotonic()) > 0:
            if waited + pause > patience:
                raise HostPaused(self._reason, int(time.time() + pause) + 1)
            await asyncio.sleep(pause)
            waited += pause
        return waited

    def _token(self) -> float:
        """Take the next token; return the seconds until it is good. A second's worth may gather."""
        if not self.rate:
            return 0.0
        now = time.monotonic()
        start = max(self._free, now - 1)
        self._free = start + 1 / self.rate
        return start - now

    def answered(self) -> None:
        """A whole answer came, whatever it says."""
        self._strikes = 0

    def refused(self, reason: str, seconds: float) -> None:
        """It asks to be left alone for ``seconds``; with each time in a row for twice as long at least."""
        self._strike(reason, seconds, free=0)

    def unreachable(self, reason: str) -> None:
        """No whole answer came: after some times in a row it is left alone, each time for twice as long."""
        self._strike(reason, 0, free=PATIENCE - 1)

    def _strike(self, reason: str, seconds: float, free: int) -> None:
        now = time.monotonic()
        if now >= self._paused:  # what was under way when a pause began is no further strike
            self._strikes += 1
        if self._strikes > free:
            least = 2.0 ** min(self._strikes - free - 1, 20)
            self._paused = max(self._paused, now + min(max(seconds, least), LONGEST_PAUSE))
            self._reason = reason


class Hosts:
    """The hosts in use and those used last, by name."""

    def __init__(self, rate: float, connections: int) -> None:
        self._rate, self._connections = rate, connections
        self._hosts: OrderedDict[str, Host] = OrderedDict()

    def __len__(self) -> int:
        return len(self._hosts)

    def __getitem__(self, name: str) -> Host:
        host = self._hosts.get(name)
        if host is not None:
            self._hosts.move_to_end(name)
            return host
        for _ in range(2):  # more than one comes, so that one is forgotten even if others are in use
            if len(self._hosts) >= HOSTS:
                oldest, old = self._hosts.popitem(last=False)
                if old.users:
                    self._hosts[oldest] = old
        host = self._hosts[name] = Host(self._rate, self._connections)
        return host


def retry_after(value: str | None) -> float | None:
    """The seconds of a Retry-After header (RFC 9110: seconds or a date), at most a day; None if it says none."""
    if value is None:
        return None
    if re.fullmatch(r"[0-9]+", value.strip()):
        return min(float(value.strip()[:9]), LONGEST_PAUSE)
    try:
        seconds = parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(seconds, 0.0), LONGEST_PAUSE)
