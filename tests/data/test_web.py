import asyncio
import socket
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hostile import (
    CANARY,
    EXPECTED,
    FIXED,
    HTML,
    IMAGE,
    SERVER,
    Names,
    Server,
    forget_peak,
    guarded_server,
    peak_mb,
    redirect,
    self_signed,
    slow_body,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hpc_mm.data import connections, web
from hpc_mm.data.politeness import PATIENCE
from hpc_mm.data.web import Buffers, Fetcher, Outcome, Trip, Web

DEADLINE = 2.0  # seconds
LONG = 6.0  # where 340 servers are asked at once, on a machine that may be busy


@pytest.fixture
def server() -> Iterator[Server]:
    with guarded_server() as server:
        yield server


def quick(**values: Any) -> Web:
    return Web(**{"deadline": DEADLINE, "max_mb": 4, "host_rate": 0, "allow": (f"{SERVER}/32",), **values})


def fetched(urls: list[str], names: Names | None = None, **values: Any) -> list[Outcome]:
    """The outcomes of URLs that are fetched at once."""

    async def all_of_them() -> list[Outcome]:
        async with Fetcher(quick(**values), names or Names()) as fetcher:
            return list(await asyncio.gather(*map(fetcher.fetch, urls)))

    return asyncio.run(all_of_them())


def with_fetcher(action: Callable[[Fetcher], Awaitable[None]], names: Names | None = None, **values: Any) -> None:
    async def run() -> None:
        async with Fetcher(quick(**values), names or Names()) as fetcher:
            await action(fetcher)

    asyncio.run(run())


# ---------------------------------------------------------------- hostile servers


def test_every_hostile_server_is_left_within_the_deadline() -> None:
    """In a new process: this one has a gigabyte of garbage of other tests, whose collection takes a second."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(all_hostile_servers_at_once).result()


def all_hostile_servers_at_once() -> None:
    with guarded_server() as server:
        leave_all(server)


def leave_all(server: Server) -> None:
    """One second beyond the deadline at most, and never more than 64 MB beyond what the process had."""
    cases = {name: f"http://{name}.test:{server.port}/{name}" for name in EXPECTED}
    cases |= {name: f"http://{name}.test:{server.port}/{name}" for name in ("tiny_chunks", "says_less")}
    server.robots["drip.test"] = slow_body
    cases["robots"] = f"http://drip.test:{server.port}/ok"
    cases |= {f"nowhere {number}": f"http://n{number}.nowhere/ok" for number in range(300)}
    found: dict[str, tuple[Outcome, float]] = {}

    async def timed(fetcher: Fetcher, name: str) -> None:
        started = time.monotonic()
        outcome = await fetcher.fetch(cases[name])
        found[name] = outcome, time.monotonic() - started

    async def all_cases(fetcher: Fetcher) -> None:
        await fetcher.fetch(cases["ok"])
        forget_peak()
        before = peak_mb()
        await asyncio.gather(*(timed(fetcher, name) for name in cases))
        await asyncio.sleep(0.3)  # for the one that floods the idle connection
        assert peak_mb() - before < 64

    with_fetcher(all_cases, deadline=LONG)
    assert {name: (found[name][0].status, found[name][0].reason) for name in EXPECTED} == EXPECTED
    assert found["tiny_chunks"][0].reason in ("too_large", "timeout")
    assert found["says_less"][0].reason in ("ok", "malformed"), "as the rest comes with the beginning, or later"
    assert found["says_less"][0].data in (IMAGE[:5], None)
    assert found["robots"][0].reason == "timeout"
    assert {found[f"nowhere {number}"][0].reason for number in range(300)} == {"dns"}
    assert max(seconds for _, seconds in found.values()) < LONG + 1
    assert all((outcome.data is not None) == (outcome.status == "ok") for outcome, _ in found.values())
    assert found["html"][0].data == HTML and found["unasked"][0].data == IMAGE


def test_the_numbers_of_an_outcome(server: Server) -> None:
    ok, moved, large, late = fetched(
        [f"http://{name}.test:{server.port}/{name}" for name in ("ok", "to_ok", "endless", "later")]
    )
    assert ok == Outcome("ok", "ok", IMAGE, "ok.test", 1, len(IMAGE))
    assert moved == Outcome("ok", "ok", IMAGE, "to_ok.test", 2, len(IMAGE))
    assert large.requests == 1 and 4_000_000 < large.received < 5_000_000
    assert late.retry_at is not None and 3500 < late.retry_at - time.time() < 3700


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    start=st.sampled_from([b"", b"HTTP/1.1 ", b"HTTP/1.1 200 OK\r\n", FIXED["gzip"][:90], FIXED["loop"][:40]]),
    noise=st.one_of(
        st.binary(max_size=200),
        st.lists(
            st.sampled_from(
                [
                    b"\r\n",
                    b": ",
                    b"\x00",
                    b"Content-Length: 3",
                    b"Content-Length: 9" + b"9" * 30,
                    b"Transfer-Encoding: chunked",
                    b"3\r\nabc",
                    b"Location: http://[",
                    b"Location: //",
                    b"Connection: close",
                ]
            ),
            max_size=12,
        ).map(b"".join),
    ),
)
def test_no_answer_of_a_server_is_an_exception(fuzzed: tuple[Server, Any], start: bytes, noise: bytes) -> None:
    server, fetch = fuzzed
    server.answers["/noise"] = [start + noise]
    outcome = fetch(f"http://noise.test:{server.port}/noise")
    assert outcome.status in ("ok", "gone", "retry", "blocked", "poison")


@pytest.fixture
def fuzzed(server: Server) -> Iterator[tuple[Server, Callable[[str], Outcome]]]:
    """A server, and one fetcher over all examples, which hangs up after a moment."""
    with asyncio.Runner() as runner:
        fetcher = Fetcher(quick(deadline=0.05, robots=False, host_connections=1), Names())

        def fetch(url: str) -> Outcome:
            fetcher._hosts._hosts.clear()  # no back-off from one example to the next
            return runner.run(fetcher.fetch(url))

        runner.run(fetcher.__aenter__())
        yield server, fetch
        runner.run(fetcher.__aexit__())


def test_a_server_ends_with_a_test_that_fails() -> None:
    with pytest.raises(RuntimeError), guarded_server() as server:
        raise RuntimeError
    assert not server._thread.is_alive()


# ---------------------------------------------------------------- addresses and names


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (f"http://{CANARY}:PORT/ok", "address"),
        ("http://2130706433:PORT/ok", "address"),
        ("http://0x7f.1:PORT/ok", "address"),
        ("http://0177.0.0.1:PORT/ok", "address"),
        ("http://[::1]:PORT/ok", "address"),
        ("http://[::ffff:7f00:1]:PORT/ok", "address"),
        ("http://①②⑦.⓪.⓪.①:PORT/ok", "address"),
        ("http://169.254.169.254/latest/meta-data/", "address"),
        ("http://0:PORT/ok", "address"),
        ("http://127.0.0.1.:PORT/ok", "bad_url"),
        ("http://127.0.0.0x1.:PORT/ok", "bad_url"),
        ("http://1.2.3.4.5:PORT/ok", "bad_url"),
        ("ftp://good.test/ok", "bad_url"),
        ("http://user:password@good.test:PORT/ok", "bad_url"),
        ("http://user@good.test:PORT/ok", "bad_url"),
        ("http://good.test:0/ok", "bad_url"),
        ("http://good.test:99999/ok", "bad_url"),
        ("http:///ok", "bad_url"),
        ("http://[::1/ok", "bad_url"),
        ("good.test/ok", "bad_url"),
        ("//good.test:PORT/ok", "bad_url"),
        ("data:image/png;base64,AA", "bad_url"),
        ("", "bad_url"),
        ("http://good.test:PORT/" + "a" * 8192, "bad_url"),
    ],
)
def test_urls_that_are_never_asked(server: Server, url: str, reason: str) -> None:
    (outcome,) = fetched([url.replace("PORT", str(server.port))])
    assert (outcome.reason, outcome.requests) == (reason, 0)
    assert not server.requests


def test_urls_of_odd_forms_that_are_asked(server: Server) -> None:
    urls = [f"{start}good.test:{server.port}/ok" for start in ("HTTP://", " http://", "\thttp://")]
    assert [outcome.reason for outcome in fetched(urls)] == ["ok"] * 3


def test_a_name_cannot_change_its_mind(server: Server) -> None:
    """A rebinding name: what was checked is what is connected, and each new answer is checked anew."""
    names = Names()
    names.answers["rebind.test"] = [[SERVER], [CANARY]]
    first, other = (f"http://rebind.test:{port}/ok" for port in (server.port, server.other_port))

    async def rebind(fetcher: Fetcher) -> None:
        assert (await fetcher.fetch(first)).status == "ok"
        assert (await fetcher.fetch(other)).reason == "address"
        assert (await fetcher.fetch(first)).status == "ok"
        assert names.asked["rebind.test"] == 2

    with_fetcher(rebind, names, robots=False)


@pytest.mark.parametrize("inside", [CANARY, "10.0.0.1", "::1", "fe80::1%lo", "64:ff9b::7f00:1", "not an address"])
def test_a_name_with_one_private_address_is_refused(server: Server, inside: str) -> None:
    names = Names()
    names.answers["mixed.test"] = [[SERVER, inside]]
    (outcome,) = fetched([f"http://mixed.test:{server.port}/ok"], names)
    assert (outcome.status, outcome.reason) == ("blocked", "address")
    assert not server.requests


def test_the_systems_resolver_is_checked_too() -> None:
    async def local() -> Outcome:
        async with Fetcher(quick()) as fetcher:
            return await fetcher.fetch("http://localhost:9/ok")

    assert asyncio.run(local()).reason == "address"


def test_a_burst_of_dead_hosts_costs_one_lookup_each(server: Server) -> None:
    names = Names()
    outcomes = fetched([f"http://n{number % 50}.nowhere/{number}" for number in range(500)], names)
    assert {(outcome.status, outcome.reason) for outcome in outcomes} == {("retry", "dns")}
    assert max(names.asked.values()) == 1


@pytest.mark.parametrize(("dead", "seconds", "reason"), [(600, 0.35, "dns"), (300, 1.5, "timeout")])
def test_slow_dead_names_cost_the_others_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch, dead: int, seconds: float, reason: str
) -> None:
    """``seconds`` in deadlines: each lookup of a dead name takes so long, before or after its URL has been given up."""
    deadline = 4.0  # seconds, so that a busy machine takes none of what a lookup leaves
    monkeypatch.setattr("socket.getaddrinfo", partial(look_up, seconds * deadline))
    urls = [f"http://n{number}.nowhere/ok" for number in range(dead)]
    for number in range(200):
        urls.insert(3 * number, f"http://good{number}.test:{server.port}/ok")

    async def all_of_them() -> list[Outcome]:
        async with Fetcher(quick(robots=False, deadline=deadline)) as fetcher:
            return list(await asyncio.gather(*map(fetcher.fetch, urls)))

    found = zip(urls, asyncio.run(all_of_them()), strict=True)
    assert Counter((".test" in url, outcome.reason) for url, outcome in found) == {
        (True, "ok"): 200,
        (False, reason): dead,
    }


def look_up(seconds: float, host: str, port: int, **_: Any) -> list[Any]:
    if host.endswith(".nowhere"):
        time.sleep(seconds)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (SERVER, port))]


def test_certificates_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = self_signed(tmp_path)
    server = Server(certificate, key)
    urls = [f"https://{name}.test:{server.port}/ok" for name in ("tls", "other")]
    try:
        (unsigned,) = fetched(urls[:1])
        assert (unsigned.status, unsigned.reason) == ("retry", "tls")
        assert not server.requests
        trusting = ssl.create_default_context(cafile=str(certificate))
        monkeypatch.setattr(aiohttp.connector, "_SSL_CONTEXT_VERIFIED", trusting)
        assert [outcome.reason for outcome in fetched(urls)] == ["ok", "tls"]
        (plain,) = fetched([urls[0].replace("https", "http")])
        assert plain.reason in ("connection", "malformed")
    finally:
        server.close()


def test_a_host_where_nothing_listens(server: Server) -> None:
    closed = Server()
    closed.close()
    (outcome,) = fetched([f"http://closed.test:{closed.port}/ok"])
    assert (outcome.status, outcome.reason, outcome.host) == ("retry", "connection", "closed.test")


# ---------------------------------------------------------------- politeness


def test_a_short_pause_is_waited_out(server: Server) -> None:
    server.answers["/busy"] = [FIXED["storm"]]
    (outcome,) = fetched([f"http://busy.test:{server.port}/busy"], deadline=4)
    assert (outcome.status, outcome.requests) == ("ok", 2)


def test_a_paused_host_is_not_asked_for_its_other_urls(server: Server) -> None:
    async def later(fetcher: Fetcher) -> None:
        await fetcher.fetch(f"http://busy.test:{server.port}/later")
        outcome = await fetcher.fetch(f"http://busy.test:{server.port}/ok")
        assert (outcome.status, outcome.reason, outcome.requests) == ("retry", "http_503", 0)
        assert outcome.retry_at is not None and outcome.retry_at > time.time() + 3000
        assert (await fetcher.fetch(f"http://other.test:{server.port}/ok")).status == "ok"

    with_fetcher(later)
    assert server.requests["busy.test/ok"] == 0


@pytest.mark.parametrize("page", ["silent", "slow_headers", "slow_body", "half_closed"])
def test_a_dead_host_is_soon_left_alone(server: Server, page: str) -> None:
    """A thousand URLs of a host that does not answer, or not to the end, take a few deadlines, not a thousand."""

    async def dead(fetcher: Fetcher) -> None:
        started = time.monotonic()
        outcomes = await asyncio.gather(
            *(fetcher.fetch(f"http://dead.test:{server.port}/{page}?{n}") for n in range(1000))
        )
        assert {outcome.reason for outcome in outcomes} == {"connection" if page == "half_closed" else "timeout"}
        assert sum(outcome.requests for outcome in outcomes) < 50
        assert time.monotonic() - started < 30

    # What is closed at once has time to be, on a machine that may be busy, and no time to wait for a pause's second.
    with_fetcher(dead, deadline=0.9 if page == "half_closed" else 0.3, robots=False)


def test_a_slow_body_among_good_ones_is_no_reason_to_leave_a_host_alone(server: Server) -> None:
    async def mixed(fetcher: Fetcher) -> None:
        for turn in range(2):
            pages = ["slow_body"] * (PATIENCE - 1) + ["ok"]
            urls = [f"http://large.test:{server.port}/{page}?{turn}{n}" for n, page in enumerate(pages)]
            outcomes = await asyncio.gather(*map(fetcher.fetch, urls[:-1]))
            assert {outcome.reason for outcome in outcomes} == {"timeout"}
            assert (await fetcher.fetch(urls[-1])).reason == "ok"
            assert all(outcome.requests == 1 and outcome.retry_at is None for outcome in outcomes)

    with_fetcher(mixed, deadline=1.5, robots=False)


def test_a_host_is_not_blamed_for_time_that_others_took(server: Server) -> None:
    """Eight redirects that take most of the deadline lead to a host that has too little left to answer."""
    starts = [f"http://h{number}.test:{server.port}/late_redirect" for number in range(8)]

    async def last_moment(fetcher: Fetcher) -> None:
        outcomes = await asyncio.gather(*map(fetcher.fetch, starts))
        assert {(outcome.reason, outcome.host, outcome.requests) for outcome in outcomes} == {
            ("timeout", "silent.test", 2)
        }
        assert (await fetcher.fetch(f"http://silent.test:{server.port}/ok")).requests == 1

    with_fetcher(last_moment, deadline=3, robots=False, host_connections=8)


def test_connections_to_one_host_are_bounded(server: Server) -> None:
    urls = [f"http://few.test:{server.port}/slow?{number}" for number in range(6)]
    assert {outcome.status for outcome in fetched(urls, host_connections=2, robots=False)} == {"ok"}
    assert server.most_busy == 2


def test_connections_are_bounded(server: Server) -> None:
    urls = [f"http://h{number}.test:{server.port}/slow" for number in range(6)]
    assert {outcome.status for outcome in fetched(urls, connections=3, robots=False)} == {"ok"}
    assert server.most_busy == 3


def test_connections_are_kept(server: Server) -> None:
    urls = [f"http://keep.test:{server.port}/ok?{number}" for number in range(40)]
    assert {outcome.status for outcome in fetched(urls, host_connections=2)} == {"ok"}
    assert server.peers[SERVER] <= 3


def test_idle_connections_are_bounded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "IDLE_HOSTS", 3)

    async def many(fetcher: Fetcher) -> None:
        for number in range(10):
            assert (await fetcher.fetch(f"http://h{number}.test:{server.port}/ok")).status == "ok"
        assert len(fetcher._session.connector._conns) == 3

    with_fetcher(many, robots=False)


def test_a_rate_is_kept(server: Server) -> None:
    started = time.monotonic()
    urls = [f"http://slow.test:{server.port}/ok?{number}" for number in range(20)]
    outcomes = fetched(urls, host_rate=5, deadline=DEADLINE, robots=False)
    assert {outcome.status for outcome in outcomes} == {"ok"}, "waiting for a turn counts in no deadline"
    assert time.monotonic() - started > 1.2 * DEADLINE


def test_tasks_share_the_rate_of_hosts_that_redirects_lead_to(server: Server) -> None:
    server.answers["/away"] = [redirect("http://target.test:PORT/ok")] * 6
    urls = [f"http://start.test:{server.port}/away"] * 6

    async def ten_tasks() -> None:
        async with Fetcher(quick(host_rate=20, robots=False), Names(), tasks=10) as fetcher:
            started = time.monotonic()
            assert {outcome.status for outcome in await asyncio.gather(*map(fetcher.fetch, urls))} == {"ok"}
            assert time.monotonic() - started > 1.2, "two in a second, after those of one"
            await asyncio.gather(*(fetcher.fetch(f"http://target.test:{server.port}/ok") for _ in range(3)))
            assert (fetcher._hosts["start.test"].rate, fetcher._hosts["target.test"].rate) == (20, 20)
            assert fetcher._hosts["other.test"].rate == 2

    asyncio.run(ten_tasks())


# ---------------------------------------------------------------- robots


def test_robots_txt_is_asked_once_and_obeyed(server: Server) -> None:
    rules = b"User-agent: *\nDisallow: /private\n"
    server.robots["rules.test"] = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(rules) + rules
    urls = [f"http://rules.test:{server.port}/{path}" for path in ("ok", "private/a", "private/b", "else")]
    assert [outcome.reason for outcome in fetched(urls)] == ["ok", "robots", "robots", "ok"]
    assert server.requests["rules.test/robots.txt"] == 1 and server.requests["rules.test/private/a"] == 0
    assert {outcome.reason for outcome in fetched(urls, robots=False)} == {"ok"}
    assert server.requests["rules.test/robots.txt"] == 1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("status_403", "ok"),
        ("status_410", "ok"),
        ("loop", "ok"),
        ("empty", "ok"),
        ("gzip", "ok"),
        ("garbage", "ok"),
        ("status_500", "http_500"),
        ("status_503", "http_503"),
        ("storm_without", "http_429"),
        ("to_metadata", "address"),
    ],
)
def test_a_robots_txt_that_cannot_be_had(server: Server, answer: str, reason: str) -> None:
    """RFC 9309: not there allows everything, not there now forbids everything."""
    server.robots["rules.test"] = FIXED[answer]
    (outcome,) = fetched([f"http://rules.test:{server.port}/fine"])
    assert outcome.reason == reason


def test_a_redirect_is_under_the_rules_of_its_target(server: Server) -> None:
    rules = b"User-agent: hpc_mm\nDisallow: /\n"
    server.robots["target.test"] = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(rules) + rules
    server.answers["/away"] = [
        b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: http://target.test:PORT/ok\r\n\r\n"
    ]
    (outcome,) = fetched([f"http://start.test:{server.port}/away"])
    assert (outcome.reason, outcome.host) == ("robots", "start.test")


def test_a_longer_robots_txt_is_cut(server: Server) -> None:
    rules = b"User-agent: *\nDisallow: /private\n" + b"#" * 600_000 + b"\nDisallow: /\n"
    server.robots["rules.test"] = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(rules) + rules
    urls = [f"http://rules.test:{server.port}/{path}" for path in ("ok", "private/a")]
    assert [outcome.reason for outcome in fetched(urls)] == ["ok", "robots"]


def test_noai_is_a_setting(server: Server) -> None:
    (outcome,) = fetched([f"http://x.test:{server.port}/noai"], noai=False)
    assert outcome.data == IMAGE


# ---------------------------------------------------------------- memory and settings


def test_when_buffers_are_full_the_oldest_goes_on() -> None:
    async def share() -> list[str]:
        buffers, order = Buffers(10), []
        old, new = Trip(1), Trip(1)

        async def read(name: str, trip: Trip) -> None:
            for _ in range(4):
                await buffers.take(trip, 5)
                await asyncio.sleep(0)
            order.append(name)
            buffers.give_back(trip)

        await asyncio.wait_for(asyncio.gather(read("old", old), read("new", new)), 10)
        assert buffers._total == 0
        assert new.held > 0 == old.held
        return order

    assert asyncio.run(share()) == ["old", "new"]


def test_buffers_that_are_too_small_for_all_still_serve_all(server: Server) -> None:
    urls = [f"http://h{number}.test:{server.port}/ok" for number in range(20)]
    assert {outcome.status for outcome in fetched(urls, buffers_mb=0.0001, deadline=10)} == {"ok"}


def test_many_large_bodies_at_once_stay_within_the_buffers(server: Server) -> None:
    """Forty times 4 MB that lack their end, where 8 MB may be held; each connection reads some 0.6 MB ahead."""
    urls = [f"http://h{number}.test:{server.port}/stalling" for number in range(40)]

    async def large(fetcher: Fetcher) -> None:
        forget_peak()
        before = peak_mb()
        outcomes = await asyncio.gather(*map(fetcher.fetch, urls))
        assert {outcome.reason for outcome in outcomes} == {"timeout"}
        assert peak_mb() - before < 64

    with_fetcher(large, max_mb=8, buffers_mb=8)


def test_a_cancelled_fetch_leaves_nothing_behind(server: Server) -> None:
    async def cancel(fetcher: Fetcher) -> None:
        task = asyncio.create_task(fetcher.fetch(f"http://slow.test:{server.port}/slow_body"))
        async with asyncio.timeout(10):
            while not fetcher._buffers._total:
                await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert (fetcher._buffers._total, fetcher._hosts["slow.test"].users) == (0, 0)
        assert (await fetcher.fetch(f"http://slow.test:{server.port}/ok")).status == "ok"

    with_fetcher(cancel, connections=1, host_connections=1)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"allow": ("127.0.0.1/8",)}, "host bits"),
        ({"user_agent": "two\r\nlines"}, "pattern"),
        ({"deadline": 0}, "greater than 0"),
        ({"conections": 3}, "conections"),
    ],
)
def test_wrong_settings_are_told(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Web(**values)


def test_every_reason_has_a_meaning() -> None:
    assert {web.meaning(reason) for _, reason in web.ERRORS} == {"retry", "blocked", "poison"}
    assert set(web.MEANING) >= web.UNREACHABLE
    assert [web.meaning(f"http_{status}") for status in (200, 304, 404, 403, 429, 599)] == [
        "poison", "poison", "gone", "blocked", "retry", "retry",
    ]  # fmt: skip
