import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_mm.data import robots
from hpc_mm.data.robots import Rules, RulesCache, forbids

OPEN = "User-agent: *\nAllow: /\n"


@pytest.mark.parametrize(
    ("text", "url", "allowed"),
    [
        ("", "http://h/a", True),
        ("User-agent: *\nDisallow: /", "http://h/a", False),
        ("User-agent: *\nDisallow:", "http://h/a", True),
        ("User-agent: *\nDisallow: /a\nAllow: /a/b", "http://h/a/b.jpg", True),
        ("User-agent: *\nDisallow: /*.jpg$", "http://h/a/b.jpg", False),
        ("User-agent: *\nDisallow: /*.jpg$", "http://h/a/b.jpg?x=1", True),
        ("User-agent: *\nDisallow: /a%20b", "http://h/a%20b", False),
        ("User-agent: other\nDisallow: /", "http://h/a", True),
        ("User-agent: other\nUser-agent: HPC_MM\nDisallow: /", "http://h/a", False),
        ("User-agent: *\nDisallow: /\n\nUser-agent: hpc_mm/9\nAllow: /", "http://h/a", True),
        ("user-agent: hpc_mm\nallow: /a\nuser-agent: x\nallow: /\nuser-agent: hpc_mm\ndisallow: /", "http://h/", False),
        ("User-agent: hpc_mm\nDisallow: /a\nUser-agent: x\nDisallow: /b", "http://h/b", True),
        ("User-agent: hpc_mm\n\nUser-agent: *\nDisallow: /", "http://h/a", False),
        ("User-agent: hpc\nDisallow: /", "http://h/a", True),
        ("\ufeffUser-agent: *\r\nDisallow: / # all\r\n", "http://h/a", False),
        ("Disallow: /", "http://h/a", True),
        ("user-agent : *\ndisallow : /", "http://h/a", False),
        ("<html>Disallow: /</html>", "http://h/a", True),
    ],
)  # fmt: skip
def test_rules(text: str, url: str, allowed: bool) -> None:
    assert Rules(text, "hpc_mm").allow(url) is allowed


def test_hostile_files_are_read_at_once() -> None:
    """Files of the greatest size that keep the library busy for minutes, or without end in memory."""
    agents = "".join(f"User-agent: a{number}\n" for number in range(20_000))
    rules = "".join(f"Disallow: /{number}*b$\n" for number in range(25_000))
    for text in (agents + rules, "User-agent: *\n" + rules, "User-agent: *\nDisallow: /" + "a*" * 250_000 + "b"):
        started = time.process_time()
        Rules(text[: robots.LARGEST], "hpc_mm").allow("http://h/" + "a" * 8000)
        assert time.process_time() - started < 1
    assert not Rules("User-agent: *\n" + rules, "hpc_mm").allow("http://h/x"), "too many rules: the site is left alone"


@given(st.text(alphabet="uU*:/ \n\t$%aA#-", max_size=60), st.sampled_from(["", "User-agent: *\nDisallow: "]))
def test_no_file_is_an_exception(text: str, start: str) -> None:
    assert Rules(start + text, "hpc_mm").allow("http://h/a%zz?b") in (True, False)


def test_the_cache_is_bounded_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robots, "CACHED", 100 * robots.SITE)
    cache = RulesCache()
    for number in range(1000):
        cache.put(f"http://h{number}", Rules("", "hpc_mm"))
    assert len(cache) == 100
    assert cache.get("http://h999") is not None and cache.get("http://h0") is None
    cache.put("http://large", Rules(OPEN + "Disallow: /aaaaaa\n" * 100, "hpc_mm"))
    assert len(cache) == 1
    cache.put("http://large", Rules("", "hpc_mm"))
    cache.put("http://small", Rules("", "hpc_mm"))
    assert len(cache) == 2


def test_rules_are_asked_for_again_after_a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = RulesCache()
    cache.put("http://h", Rules("", "hpc_mm"))
    now = time.monotonic()
    monkeypatch.setattr(robots.time, "monotonic", lambda: now + robots.LIFETIME + 1)
    assert cache.get("http://h") is None


@pytest.mark.parametrize(
    ("headers", "forbidden"),
    [
        ([], False),
        (["noai"], True),
        (["all"], False),
        (["nofollow", "NoImageAI"], True),
        (["nofollow, noindex"], True),
        (["noimageindex"], True),
        (["hpc_mm: noai"], True),
        (["HPC_MM : nofollow, noai"], True),
        (["*: noai"], True),
        (["googlebot: noindex"], False),
        (["googlebot: nofollow, noindex"], False),
        (["googlebot: noindex, hpc_mm: noai"], True),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST"], False),
        (["max-snippet: 20, noai"], True),
        (["noaid"], False),
    ],
)
def test_x_robots_tag(headers: list[str], forbidden: bool) -> None:
    assert forbids(headers, "hpc_mm") is forbidden
