import asyncio
import time
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_mm.data import politeness
from hpc_mm.data.politeness import Host, HostPaused, Hosts, retry_after


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        real_sleep = asyncio.sleep

        async def sleep(seconds: float) -> None:
            self.now += seconds
            await real_sleep(0)

        monkeypatch.setattr(politeness.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(politeness.time, "time", lambda: 1.7e9 + self.now)
        monkeypatch.setattr(politeness.asyncio, "sleep", sleep)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


async def times(clock: Clock, host: Host, count: int) -> list[float]:
    """When each of ``count`` requests, one after the other, may start."""
    starts = []
    for _ in range(count):
        await host.enter(patience=0)
        starts.append(clock.now - 1000)
        host.leave()
    return starts


@pytest.mark.parametrize("rate", [0.5, 1, 4])
def test_a_rate_is_kept_after_a_seconds_worth(clock: Clock, rate: float) -> None:
    starts = asyncio.run(times(clock, Host(rate, 1), 20))
    for number, start in enumerate(starts):
        assert number + 1 <= rate * (start + 1) + 1 + 1e-6
    assert starts[-1] == pytest.approx(19 / rate - 1, abs=1 / rate)


def test_no_rate_is_no_wait(clock: Clock) -> None:
    assert asyncio.run(times(clock, Host(0, 1), 5)) == [0] * 5


def test_a_pause_is_waited_for_within_patience(clock: Clock) -> None:
    host = Host(0, 1)
    host.refused("http_429", 10)
    assert asyncio.run(host.enter(patience=10)) == 10
    host.leave()
    host.refused("http_503", 10)
    with pytest.raises(HostPaused) as found:
        asyncio.run(host.enter(patience=9.9))
    assert found.value.reason == "http_503"
    assert found.value.retry_at == pytest.approx(1.7e9 + clock.now + 10, abs=1.01)
    assert host.users == 0


def test_refusals_in_a_row_double(clock: Clock) -> None:
    host, pauses = Host(0, 1), []
    for _ in range(5):
        host.refused("http_429", 1)
        host.refused("http_429", 1)  # a second connection's answer is not a second refusal
        pauses.append(asyncio.run(host.enter(patience=100)))
        host.leave()
    assert pauses == [1, 2, 4, 8, 16]
    host.answered()
    host.refused("http_429", 1)
    assert asyncio.run(host.enter(patience=100)) == 1


def test_a_host_is_left_alone_after_some_failures_in_a_row(clock: Clock) -> None:
    host, pauses = Host(0, 1), []
    for number in range(8):
        host.unreachable("dns")
        pauses.append(asyncio.run(host.enter(patience=100)))
        host.leave()
        if number == 1:
            host.answered()
    assert pauses == [0, 0, 0, 0, 0, 0, 1, 2]


def test_no_pause_is_longer_than_a_day(clock: Clock) -> None:
    host = Host(0, 1)
    for _ in range(3000):
        clock.now += 2 * politeness.LONGEST_PAUSE
        host.refused("http_429", 1e9)
    assert asyncio.run(host.enter(patience=1e12)) == politeness.LONGEST_PAUSE


def test_a_cancelled_wait_gives_its_place_back() -> None:
    async def cancel() -> None:
        host = Host(0, 1)
        await host.enter(1)
        waiting = asyncio.create_task(host.enter(1))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert host.users == 1
        host.leave()
        assert host.users == 0
        await asyncio.wait_for(host.enter(1), 5)

    asyncio.run(cancel())


def test_hosts_are_forgotten_but_not_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(politeness, "HOSTS", 10)
    hosts = Hosts(0, 1)
    busy = hosts["busy"]
    asyncio.run(busy.enter(1))
    for number in range(1000):
        hosts[f"host{number}"].refused("http_429", 5)
    assert len(hosts) <= 11
    assert hosts["busy"] is busy and hosts["host999"] is hosts["host999"]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("0", 0),
        (" 12 ", 12),
        ("9" * 5000, 86400),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86400),
        ("", None),
        ("soon", None),
        ("-1", None),
        ("1.5", None),
    ],
)
def test_retry_after(value: str | None, seconds: float | None) -> None:
    assert retry_after(value) == seconds


def test_retry_after_as_a_date() -> None:
    assert retry_after(formatdate(time.time() + 90, usegmt=True)) == pytest.approx(90, abs=2)


@given(st.one_of(st.text(), st.from_regex(r"[A-Z][a-z]{2}, \d+ [A-Z][a-z]{2} \d+ \d+:\d+:\d+ [A-Z+-]+\d*")))
def test_no_retry_after_is_an_exception(value: str) -> None:
    seconds = retry_after(value)
    assert seconds is None or 0 <= seconds <= politeness.LONGEST_PAUSE
