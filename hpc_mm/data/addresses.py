"""Which addresses a download may connect to, and a resolver that answers with no others."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from aiohttp.abc import AbstractResolver, ResolveResult

Network = IPv4Network | IPv6Network

# IANA's registries of special-purpose addresses; RFC numbers of each.
REFUSED_4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this host, 791
        "10.0.0.0/8",  # private, 1918
        "100.64.0.0/10",  # carrier-grade NAT, 6598
        "127.0.0.0/8",  # loopback, 1122
        "169.254.0.0/16",  # link-local and clouds' metadata, 3927
        "172.16.0.0/12",  # private, 1918
        "192.0.0.0/24",  # protocol assignments, 6890
        "192.0.2.0/24",  # documentation, 5737
        "192.88.99.0/24",  # 6to4 relays, 7526
        "192.168.0.0/16",  # private, 1918
        "198.18.0.0/15",  # benchmarks, 2544
        "198.51.100.0/24",  # documentation, 5737
        "203.0.113.0/24",  # documentation, 5737
        "224.0.0.0/4",  # multicast, 5771
        "240.0.0.0/4",  # reserved and broadcast, 1112
    )
)
UNICAST_6 = IPv6Network("2000::/3")  # all that is assigned to the internet, 4291
REFUSED_6 = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments and Teredo, 2928
        "2001:db8::/32",  # documentation, 3849
        "3fff::/20",  # documentation, 9637
    )
)
NAT64 = IPv6Network("64:ff9b::/96")  # 6052


class AddressRefused(Exception):
    """A host is, or a name leads to, an address that downloads must not reach."""


def literal(host: str) -> IPv4Address | IPv6Address | None:
    """The address that a host of a URL spells, in decimal, octal, hexadecimal or short forms too; None for a name."""
    try:
        return ip_address(host)
    except ValueError:
        pass
    if not host[:1].isdigit():
        return None
    try:
        return IPv4Address(socket.inet_aton(host))
    except OSError:
        return None


def may_connect(address: IPv4Address | IPv6Address, allow: tuple[Network, ...] = ()) -> bool:
    """Whether ``address`` is public or in one of ``allow``; an IPv4 address inside of an IPv6 one decides for it."""
    if any(address.version == network.version and address in network for network in allow):
        return True
    if isinstance(address, IPv4Address):
        return not any(address in network for network in REFUSED_4)
    inner = address.ipv4_mapped or address.sixtofour
    if address in NAT64:
        inner = IPv4Address(int(address) & 0xFFFFFFFF)
    if inner is not None:
        return may_connect(inner, allow)
    return address.scope_id is None and address in UNICAST_6 and not any(address in network for network in REFUSED_6)


def is_nothing(host: str) -> bool:
    """Whether a host is neither an address nor a name, as 127.0.0.1. and 1.2.3.4.5: no name ends in a number (WHATWG's
    URL standard), but resolvers may take such a host for an address."""
    last = host.rstrip(".").rpartition(".")[2]
    return literal(host) is None and re.fullmatch(r"[0-9]+|0[xX][0-9a-fA-F]*", last) is not None


@lru_cache(maxsize=4096)  # a host comes again with each of its URLs
def refused(host: str, allow: tuple[Network, ...] = ()) -> bool:
    """Whether a URL's host is an address, in any spelling, that must not be reached. Names are checked as resolved."""
    address = literal(host)
    return address is not None and not may_connect(address, allow)


class SystemResolver(AbstractResolver):
    """The operating system's resolver (files, DNS): so many ``lookups`` at once, each in a thread of its own."""

    def __init__(self, lookups: int = 1) -> None:
        self._threads = ThreadPoolExecutor(lookups, "lookup")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        look_up = partial(
            socket.getaddrinfo, host, port, family=family, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
        )
        found = await asyncio.get_running_loop().run_in_executor(self._threads, look_up)
        return [answer(host, str(place[0]), port, kind) for kind, _, _, _, place in found]

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def answer(name: str, address: str, port: int, family: socket.AddressFamily) -> ResolveResult:
    """One address of a name, as aiohttp takes it."""
    numeric = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    return ResolveResult(hostname=name, host=address, port=port, family=family, proto=socket.IPPROTO_TCP, flags=numeric)


class CheckedResolver(AbstractResolver):
    """Checks what ``resolver`` answers. aiohttp connects to these very answers, so a name cannot change its mind.

    A name with even one refused address raises AddressRefused. A lookup goes on when nobody waits for it any more.
    """

    def __init__(self, resolver: AbstractResolver, allow: Sequence[Network] = ()) -> None:
        self._resolver, self._allow = resolver, tuple(allow)
        self.under_way: dict[tuple[str, int], asyncio.Future[None]] = {}  # the ends of lookups, by host and port

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        over = self.under_way[host, port] = asyncio.get_running_loop().create_future()
        try:
            answers = await self._resolver.resolve(host, port, family)
        finally:
            self.under_way.pop((host, port), None)
            over.set_result(None)
        for found in answers:
            address = literal(found["host"])
            if address is None or not may_connect(address, self._allow):
                raise AddressRefused(f"{host} is at {found['host']}")
        return answers

    async def close(self) -> None:
        await self._resolver.close()
