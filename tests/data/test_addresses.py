import asyncio
import socket
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address, ip_network

import pytest
from hostile import Names
from hypothesis import given
from hypothesis import strategies as st

from hpc_mm.data.addresses import (
    AddressRefused,
    CheckedResolver,
    SystemResolver,
    is_nothing,
    literal,
    may_connect,
    refused,
)

INNER = [
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16",
    "224.0.0.0/4", "240.0.0.0/4", "255.255.255.255/32", "169.254.169.254/32",
]  # fmt: skip
inner = st.sampled_from(INNER).flatmap(
    lambda network: st.integers(0, IPv4Network(network).num_addresses - 1).map(lambda n: IPv4Network(network)[n])
)


def spellings(address: IPv4Address) -> list[str]:
    """All that resolvers take for the address, as a URL's host."""
    number, (a, b, c, d) = int(address), address.packed
    return [
        str(address), str(number), hex(number), f"0{number:o}", f"{a}.{number & 0xFFFFFF}",
        f"{a}.{b}.{number & 0xFFFF}",
        f"{a:#x}.{b:#x}.{c:#x}.{d:#x}", f"0{a:o}.0{b:o}.0{c:o}.0{d:o}", f"{a:#X}.{b}.0{c:o}.{d}",
    ]  # fmt: skip


def embeddings(address: IPv4Address) -> list[str]:
    """IPv6 addresses that lead to it: mapped, compatible, 6to4, NAT64."""
    number = int(address)
    return [
        f"::ffff:{address}", f"::{address}", f"64:ff9b::{address}", f"64:ff9b:1::{address}",
        str(IPv6Address((0x2002 << 112) | (number << 80) | 1)),
    ]  # fmt: skip


@given(inner)
def test_private_addresses_are_refused_in_all_spellings(address: IPv4Address) -> None:
    for spelling in spellings(address):
        assert literal(spelling) == address
        assert refused(spelling)
    for spelling in embeddings(address):
        assert refused(spelling), spelling
    assert not refused(str(address), (ip_network(address),))


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6), st.ip_addresses(v=6, network="2000::/3")))
def test_no_more_is_allowed_than_pythons_ipaddress_calls_global(address: IPv4Address | IPv6Address) -> None:
    if may_connect(address):
        inside = isinstance(address, IPv6Address) and (address.ipv4_mapped or address.sixtofour)
        assert ((inside or address).is_global and not (inside or address).is_multicast) or "64:ff9b::" in str(address)


PUBLIC = (
    "8.8.8.8 1.1.1.1 172.15.0.1 172.32.0.1 100.63.0.1 100.128.0.1 223.255.255.255 192.0.1.1 "
    "2606:4700:4700::1111 64:ff9b::8.8.8.8 ::ffff:8.8.8.8"
)
NOT_PUBLIC = (
    ":: ::1 fe80::1 fe80::1%eth0 2606:4700::1%eth0 fc00::1 fd00:ec2::254 fec0::1 ff02::1 2001::1 "
    "2001:db8::1 3fff::1 100::1 5f00::1 4000::1 192.0.0.1 198.18.0.1"
)


@pytest.mark.parametrize("address", PUBLIC.split())
def test_public_addresses_are_allowed(address: str) -> None:
    assert may_connect(ip_address(address))


@pytest.mark.parametrize("address", NOT_PUBLIC.split())
def test_what_is_not_public_is_refused(address: str) -> None:
    assert not may_connect(ip_address(address))


@pytest.mark.parametrize(
    "host", ["example.org", "1.example.org", "127.0.0.1.example.org", "1.2.3.4.5", "0x", "256.1.1.1"]
)
def test_names_are_no_addresses(host: str) -> None:
    assert literal(host) is None and not refused(host)


@pytest.mark.parametrize(
    ("host", "nothing"),
    [
        ("127.0.0.1.", True),
        ("1.2.3.4.5", True),
        ("256.1.1.1", True),
        ("name.0x7f", True),
        ("0x", True),
        ("127.0.0.1", False),
        ("2130706433", False),
        ("::1", False),
        ("example.org.", False),
        ("1.example.org", False),
        ("a.b2", False),
    ],
)
def test_what_is_neither_an_address_nor_a_name(host: str, nothing: bool) -> None:
    assert is_nothing(host) == nothing


def test_every_answer_of_a_resolver_is_checked() -> None:
    names = Names()
    names.answers = {"good": [["127.0.0.2"]], "mixed": [["127.0.0.2", "127.0.0.3"]], "bad": [["10.0.0.1"]]}
    resolver = CheckedResolver(names, [ip_network("127.0.0.2/32")])
    assert [answer["host"] for answer in asyncio.run(resolver.resolve("good", 80))] == ["127.0.0.2"]
    for name, said in (("mixed", "mixed is at 127.0.0.3"), ("bad", "bad is at 10.0.0.1")):
        with pytest.raises(AddressRefused, match=said):
            asyncio.run(resolver.resolve(name, 80))


def test_the_systems_resolver() -> None:
    async def look_up() -> None:
        resolver = SystemResolver()
        found = await resolver.resolve("localhost", 80, socket.AF_INET)
        assert [(answer["host"], answer["port"]) for answer in found] == [("127.0.0.1", 80)]
        with pytest.raises(AddressRefused):
            await CheckedResolver(resolver).resolve("localhost", 80, socket.AF_INET)
        await resolver.close()

    asyncio.run(look_up())
