"""What a site allows robots: robots.txt (RFC 9309) and the X-Robots-Tag header."""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Iterable

from protego import Protego

LARGEST = 512_000  # bytes of a robots.txt that are read; RFC 9309 asks for 500 KiB or more
MOST_RULES = 5000  # for one robot; a site with more is left alone, as reading them would hold up all others
CACHED = 32 * 2**20  # bytes of memory for the rules of all sites, by the two estimates that follow
SITE = 400  # bytes of memory for a site without rules
SPREAD = 40  # bytes of memory for a byte of rules
LIFETIME = 86_400.0  # seconds until a robots.txt is asked for again

FORBIDDING = {"noai", "noimageai", "noindex", "noimageindex"}  # img2dataset's list
# Directives of X-Robots-Tag that have a value themselves, so that the word before their colon names no robot.
VALUED = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}


def rules_for(text: str, agent: str) -> list[str]:
    """The rule lines of a robots.txt that hold for ``agent``, its product token: of its own groups, or else of ``*``.

    Protego takes minutes for files with thousands of agents, so it is given these lines alone.
    """
    ours: list[str] = []
    everyones: list[str] = []
    named, agents = False, set[str]()
    in_agents = False
    for line in text.removeprefix("\ufeff").splitlines():
        name, colon, value = line.partition("#")[0].partition(":")
        name, value = name.strip().lower(), value.strip()
        if name in ("user-agent", "useragent"):
            agents = agents if in_agents else set()
            token = re.match(r"[a-z_*-]*", value.lower())
            agents.add(token.group() if token else "")
            in_agents = True
            named = named or agent.lower() in agents
        elif name in ("allow", "disallow") and colon:
            in_agents = False
            if agent.lower() in agents:
                ours.append(f"{name}: {value}")
            elif "*" in agents:
                everyones.append(f"{name}: {value}")
    return ours if named else everyones


class Rules:
    """The rules of one site for one agent."""

    def __init__(self, text: str, agent: str) -> None:
        lines = rules_for(text, agent)
        if len(lines) > MOST_RULES:
            lines = ["disallow: /"]
        self.size = SITE + SPREAD * sum(map(len, lines))
        self._made = time.monotonic()
        self._protego = Protego.parse("\n".join(["user-agent: *", *lines])) if lines else None

    @property
    def fresh(self) -> bool:
        return time.monotonic() < self._made + LIFETIME

    def allow(self, url: str) -> bool:
        return self._protego is None or self._protego.can_fetch(url, "*")


class RulesCache:
    """The rules of the sites used last, within a bound of memory."""

    def __init__(self) -> None:
        self._sites: OrderedDict[str, Rules] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return len(self._sites)

    def get(self, site: str) -> Rules | None:
        rules = self._sites.get(site)
        if rules is None or not rules.fresh:
            return None
        self._sites.move_to_end(site)
        return rules

    def put(self, site: str, rules: Rules) -> None:
        old = self._sites.pop(site, None)
        self._sites[site] = rules
        self._size += rules.size - (old.size if old else 0)
        while self._size > CACHED and len(self._sites) > 1:
            self._size -= self._sites.popitem(last=False)[1].size


def forbids(headers: Iterable[str], agent: str) -> bool:
    """Whether values of X-Robots-Tag keep images from being used, for all robots or for ``agent``."""
    for header in headers:
        robot = None
        for part in header.lower().split(","):
            name, colon, value = (word.strip() for word in part.partition(":"))
            if colon and name not in VALUED:
                robot, name = name, value
            if name in FORBIDDING and robot in (None, "*", agent.lower()):
                return True
    return False
