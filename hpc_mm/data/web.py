"""One URL to its bytes: politely, within a deadline and bounds of memory, and from public addresses only."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from io import BytesIO
from ipaddress import ip_network
from typing import Annotated, Literal

from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, DummyCookieJar
from aiohttp.abc import AbstractResolver
from aiohttp.client_exceptions import (
    ClientConnectorDNSError,
    ClientPayloadError,
    ClientResponseError,
    ClientSSLError,
    InvalidURL,
)
from pydantic import Field, field_validator
from yarl import URL

from hpc_mm.config import Part, Positive
from hpc_mm.data import robots
from hpc_mm.data.addresses import AddressRefused, CheckedResolver, Network, SystemResolver, is_nothing, refused
from hpc_mm.data.connections import Connector
from hpc_mm.data.politeness import Host, HostPaused, Hosts, retry_after

LONGEST_URL = 8192  # characters
LONGEST_HEADER = 16_384  # bytes; aiohttp takes 128 of them
READ = 65_536  # bytes that are read ahead of the one who takes them
FIRST_PAUSE = 1.0  # seconds after a 429 that names none
FAIR = 0.5  # of the deadline: with less time, what was not done in time says nothing about a host

Status = Literal["ok", "gone", "retry", "blocked", "poison"]

# Why a URL has no bytes -> what that means: gone = not there and not coming back; retry = may mend by itself;
# blocked = we must not; poison = what is there is of no use. Reasons are classes in ledgers and tables: keep them.
MEANING: dict[str, Status] = {
    "timeout": "retry",
    "dns": "retry",
    "connection": "retry",  # refused, reset, closed before the end of the body
    "tls": "retry",  # certificates are renewed
    "address": "blocked",  # private, loopback, metadata, ...
    "robots": "blocked",
    "noai": "blocked",
    "bad_url": "poison",
    "redirects": "poison",  # too many
    "too_large": "poison",
    "empty": "poison",
    "encoded": "poison",  # compressed, though it was asked for as it is
    "malformed": "poison",  # not HTTP, or headers beyond the bounds
}
HTTP_MEANING: dict[int, Status] = {
    401: "blocked",
    402: "blocked",
    403: "blocked",
    451: "blocked",
    408: "retry",
    425: "retry",
    429: "retry",
}
NOT_AN_IMAGE = "not_an_image"  # the reason of a poison that only decoding finds
MISSING = "missing"  # no reason of ours: images that were fetched and have been lost from their store since
REDIRECTS = {301, 302, 303, 307, 308}
BUSY = {429, 503}

# First match counts.
ERRORS: tuple[tuple[type[Exception], str], ...] = (
    (TimeoutError, "timeout"),
    (AddressRefused, "address"),
    (ClientConnectorDNSError, "dns"),
    (ClientSSLError, "tls"),
    (ssl.SSLError, "tls"),
    (InvalidURL, "bad_url"),
    (ClientPayloadError, "connection"),
    (ClientResponseError, "malformed"),
    (ClientError, "connection"),
    (OSError, "connection"),
    (ValueError, "bad_url"),  # a host name that no DNS query can hold
)
UNREACHABLE = {"timeout", "dns", "connection", "tls"}  # these say something about the host


def meaning(reason: str) -> Status:
    """What a reason of an outcome means."""
    if not reason.startswith("http_"):
        return MEANING[reason]
    status = int(reason.removeprefix("http_"))
    if status in HTTP_MEANING:
        return HTTP_MEANING[status]
    return "retry" if status >= 500 else "gone" if status >= 400 else "poison"


class Web(Part):
    """How images are downloaded."""

    deadline: Annotated[float, Field(gt=0)] = Field(
        20.0, description="seconds per URL: lookups, robots.txt, redirects, body; waiting for its host's turn is free"
    )
    max_mb: Annotated[float, Field(gt=0)] = Field(32.0, description="size limit of one body, MB")
    buffers_mb: Annotated[float, Field(gt=0)] = Field(128.0, description="size limit of all unfinished bodies, MB")
    max_redirects: int = Field(5, ge=0, description="redirects that are followed for one URL")
    connections: Positive = Field(256, description="connections at once, per process")
    host_connections: Positive = Field(4, description="connections to one host at once, per process")
    host_rate: float = Field(20.0, ge=0, description="requests per second to one host, over all tasks; 0 = no limit")
    come_back: float = Field(
        600.0,
        ge=0,
        description="seconds, when a task has done all else, in which hosts that asked for a pause (429, 503 with "
        "Retry-After) are asked again when it is over; 0 = not before the next run",
    )
    robots: bool = Field(True, description="obey robots.txt")
    noai: bool = Field(True, description="obey X-Robots-Tag: noai, noimageai, noindex, noimageindex")
    user_agent: str = Field(
        "hpc_mm/0.1",
        pattern=r"^[A-Za-z_-]+(/[!-~]+( [ -~]+)?)?$",
        description="who asks: the name that robots.txt files know, then /version and, best, an address",
    )
    allow: tuple[str, ...] = Field((), description="networks that may be reached though they are not public")

    @field_validator("allow")
    @classmethod
    def networks_are_networks(cls, allow: tuple[str, ...]) -> tuple[str, ...]:
        for network in allow:
            ip_network(network)
        return allow

    @property
    def agent(self) -> str:
        """The product token of RFC 9309."""
        return self.user_agent.partition("/")[0]

    @property
    def networks(self) -> tuple[Network, ...]:
        return tuple(ip_network(network) for network in self.allow)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one URL. ``data`` is there if and only if ``status`` is ok."""

    status: Status
    reason: str  # a key of MEANING, http_NNN, or ok
    data: bytes | None
    host: str  # that was asked last; empty if none was
    requests: int  # made for it, robots.txt left out
    received: int  # bytes of bodies
    retry_at: int | None = None  # unix seconds before which its host is not to be asked


class Unfetched(Exception):
    """No bytes: the reason, and when to come again if the host has said so."""

    def __init__(self, reason: str, retry_at: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.retry_at = reason, retry_at


@dataclass(frozen=True)
class Want:
    """What is asked for: a body of ``limit`` bytes at most (``cut`` there, or refused), under robots' rules or not."""

    limit: int
    robots: bool
    noai: bool
    cut: bool = False


@dataclass(eq=False, slots=True)
class Trip:
    """What one URL still has and has used."""

    left: float  # seconds
    host: str = ""
    requests: int = 0
    received: int = 0
    held: float = 0.0  # seconds in which others' bodies left no room for its own
    moved: bool = False  # by a redirect, to a host that other processes may ask too


class Buffers:
    """The bytes of all unfinished bodies. At ``limit`` only the oldest goes on, so that one always does."""

    def __init__(self, limit: int) -> None:
        self._limit, self._total = limit, 0
        self._held: dict[Trip, int] = {}
        self._waiting: list[asyncio.Future[None]] = []

    async def take(self, trip: Trip, size: int) -> None:
        self._held.setdefault(trip, 0)
        while self._total + size > self._limit and next(iter(self._held)) is not trip:
            loop = asyncio.get_running_loop()
            freed, started = loop.create_future(), loop.time()
            self._waiting.append(freed)
            try:
                await freed
            finally:
                trip.held += loop.time() - started
        self._held[trip] += size
        self._total += size

    def give_back(self, trip: Trip) -> None:
        self._total -= self._held.pop(trip, 0)
        for freed in self._waiting:
            if not freed.done():
                freed.set_result(None)
        self._waiting.clear()


class Fetcher:
    """Fetches URLs, many at once. Use it as an asynchronous context manager; ``resolver`` replaces the system's.

    More calls of ``fetch`` than ``connections`` may be under way: those that wait for their host cost little.
    ``tasks``: processes that may be redirected to the same hosts, of whose rate each takes its share.
    """

    def __init__(self, settings: Web, resolver: AbstractResolver | None = None, tasks: int = 1) -> None:
        self.settings, self._given = settings, resolver
        self._networks = settings.networks
        self._image = Want(int(settings.max_mb * 1e6), settings.robots, settings.noai)
        self._robots_file = Want(robots.LARGEST, robots=False, noai=False, cut=True)
        self._hosts = Hosts(settings.host_rate / tasks, settings.host_connections)
        self._rules = robots.RulesCache()
        self._asking: dict[str, asyncio.Task[tuple[robots.Rules | Unfetched, float]]] = {}
        self._buffers = Buffers(int(settings.buffers_mb * 1e6))
        self._busy = asyncio.Semaphore(settings.connections)
        self.room = asyncio.Event()  # cleared by one who has more bodies than can be stored: nothing is asked for then
        self.room.set()

    async def __aenter__(self) -> Fetcher:
        self._resolver = CheckedResolver(self._given or SystemResolver(self.settings.connections), self._networks)
        self._session = ClientSession(
            connector=Connector(self._resolver),
            headers={
                "User-Agent": self.settings.user_agent,
                "Accept": "image/*,*/*;q=0.5",
                "Accept-Encoding": "identity",
            },
            cookie_jar=DummyCookieJar(),
            timeout=ClientTimeout(total=None, sock_connect=None),  # the deadline is ours
            auto_decompress=False,
            read_bufsize=READ,
            max_line_size=LONGEST_HEADER,
            max_field_size=LONGEST_HEADER,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._asking.values():
            task.cancel()
        await asyncio.gather(*self._asking.values(), return_exceptions=True)
        await self._session.close()
        await self._resolver.close()

    async def fetch(self, url: str) -> Outcome:
        """What became of ``url``: always an outcome, within the deadline and the time that its hosts make it wait."""
        trip = Trip(self.settings.deadline)
        try:
            data = await self._follow(url, trip, self._image)
        except Unfetched as why:
            status = meaning(why.reason)
            return Outcome(status, why.reason, None, trip.host, trip.requests, trip.received, why.retry_at)
        return Outcome("ok", "ok", data, trip.host, trip.requests, trip.received)

    async def _follow(self, text: str, trip: Trip, want: Want) -> bytes:
        """The body at ``text`` or where its redirects lead."""
        url = self._checked(text)
        for _ in range(self.settings.max_redirects + 1):
            if want.robots:
                await self._permitted(url, trip)
            found: bytes | str | None = None
            while found is None:
                found = await self._in_turn(url, trip, want)
            if isinstance(found, bytes):
                return found
            url, trip.moved = self._checked(found, url), True
        raise Unfetched("redirects")

    def _checked(self, text: str, base: URL | None = None) -> URL:
        """The URL that ``text`` spells, below ``base``; a wrong one, or one of an address we must not reach, raises."""
        try:
            if len(text) > LONGEST_URL:
                raise ValueError
            url = URL(text.strip())
            url = base.join(url) if base else url
            url = url.with_fragment(None) if url.raw_fragment else url
            host = url.raw_host
        except ValueError:
            raise Unfetched("bad_url") from None
        if url.scheme not in ("http", "https") or not host or not url.port or url.user or url.password:
            raise Unfetched("bad_url")
        if is_nothing(host):
            raise Unfetched("bad_url")
        if refused(host, self._networks):
            raise Unfetched("address")
        return url

    async def _in_turn(self, url: URL, trip: Trip, want: Want) -> bytes | str | None:
        """One request when it is the URL's turn at its host: the body, where a redirect leads, or None to ask again."""
        name = trip.host = url.raw_host or ""
        host = self._hosts[name]
        if not trip.moved:
            host.rate = self.settings.host_rate  # all of its URLs are ours
        try:
            trip.left -= await host.enter(trip.left)
        except HostPaused as pause:
            raise Unfetched(pause.reason, pause.retry_at) from None
        try:
            await self._busy.acquire()
            try:
                await self.room.wait()
                return await self._request(url, host, trip, want)
            finally:
                self._free(url)
        finally:
            host.leave()

    def _free(self, url: URL) -> None:
        """Give a connection's place back; one whose lookup outlives it when that is over, as its thread is until then.

        So a thread is free for every request that begins, and none is charged for others' dead names.
        """
        lookup = self._resolver.under_way.get((url.raw_host or "", url.port or 0))
        if lookup is None:
            self._busy.release()
        else:
            lookup.add_done_callback(lambda _: self._busy.release())

    async def _request(self, url: URL, host: Host, trip: Trip, want: Want) -> bytes | str | None:
        clock = asyncio.get_running_loop().time
        started = clock()
        trip.requests += 1
        try:
            async with asyncio.timeout(trip.left), self._session.get(url, allow_redirects=False) as response:
                wait = self._asks_to_wait(response)
                if wait is not None:
                    host.refused(f"http_{response.status}", wait)
                    return None
                location = response.headers.get("Location") if response.status in REDIRECTS else None
                found = location or await self._body(response, trip, want)
                host.answered()  # not before the body came: a host may stall after its headers
                return found
        except Unfetched:  # an answer that is of no use is one all the same
            host.answered()
            raise
        except tuple(kind for kind, _ in ERRORS) as error:
            reason = next(reason for kind, reason in ERRORS if isinstance(error, kind))
            had_time = clock() - started - trip.held >= FAIR * self.settings.deadline
            if reason in UNREACHABLE and (had_time or reason != "timeout"):
                host.unreachable(reason)
            raise Unfetched(reason) from None
        finally:
            self._buffers.give_back(trip)
            trip.left -= clock() - started

    @staticmethod
    def _asks_to_wait(response: ClientResponse) -> float | None:
        """Seconds for which a 429, or a 503 that says so, wants no further requests."""
        if response.status not in BUSY:
            return None
        wait = retry_after(response.headers.get("Retry-After"))
        return FIRST_PAUSE if wait is None and response.status == 429 else wait

    async def _body(self, response: ClientResponse, trip: Trip, want: Want) -> bytes:
        """The body, read piece by piece within the bounds."""
        headers = response.headers
        if response.status != 200:
            raise Unfetched(f"http_{response.status}")
        if want.noai and robots.forbids(headers.getall("X-Robots-Tag", ()), self.settings.agent):
            raise Unfetched("noai")
        if headers.get("Content-Encoding", "identity").strip().lower() not in ("identity", ""):
            raise Unfetched("encoded")
        if not want.cut and (response.content_length or 0) > want.limit:
            raise Unfetched("too_large")
        body = BytesIO()  # not a list of pieces, as each may be one byte
        while piece := await response.content.readany():
            trip.received += len(piece)
            body.write(piece)
            if body.tell() > want.limit:
                if want.cut:
                    break
                raise Unfetched("too_large")
            await self._buffers.take(trip, len(piece))
        if not body.tell():
            raise Unfetched("empty")
        body.truncate(want.limit)
        return body.getvalue()

    async def _permitted(self, url: URL, trip: Trip) -> None:
        """Return if the robots.txt of the URL's site allows it; what keeps us from that file keeps us from the URL."""
        site = f"{url.scheme}://{url.raw_authority}"
        rules = self._rules.get(site) or await self._asked(site, trip)
        if isinstance(rules, Unfetched):
            trip.host = url.raw_host or ""
            raise Unfetched(rules.reason, rules.retry_at)
        if not rules.allow(str(url)):
            raise Unfetched("robots")

    async def _asked(self, site: str, trip: Trip) -> robots.Rules | Unfetched:
        """What ``_ask`` finds, asked once for all who wait; the URL is charged for no more than it waited."""
        started = asyncio.get_running_loop().time()
        task = self._asking.get(site)
        if task is None:
            task = self._asking[site] = asyncio.create_task(self._ask(site, trip.moved))
        rules, spent = await asyncio.shield(task)
        trip.left -= min(spent, asyncio.get_running_loop().time() - started)
        return rules

    async def _ask(self, site: str, moved: bool) -> tuple[robots.Rules | Unfetched, float]:
        """The rules of a site, or why they cannot be had now; and the seconds of its deadline that this took.

        As RFC 9309 says: a file that is not there (or of no use) allows everything, one that may come forbids.
        """
        trip = Trip(self.settings.deadline, moved=moved)
        text = b""
        try:
            text = await self._follow(f"{site}/robots.txt", trip, self._robots_file)
        except Unfetched as why:
            if meaning(why.reason) == "retry" or why.reason == "address":
                return why, self.settings.deadline - trip.left
        finally:
            del self._asking[site]
        rules = robots.Rules(text.decode("utf-8", "replace"), self.settings.agent)
        self._rules.put(site, rules)
        return rules, self.settings.deadline - trip.left
