"""What of a corpus is done: a marker for each file of records, and the images that may still come for it.

Nothing in a corpus is ever replaced by other bytes but the markers and the manifest, each of them at once: shards have
the digest of their bytes in their names. So two launches may do the same part side by side. A lock would not help: an
object store has none that ends with its holder, and one that ends by the clock lets a second holder in beside a first
that was only slow.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from hpc_mm.config import ConfigError
from hpc_mm.data.ledger import FOLDER as LEDGER
from hpc_mm.data.records import ENDINGS
from hpc_mm.data.store import MissingKey, Store, write_changed

PARTS = "parts"  # folder of the done markers, one per source file
DIGITS = 8  # of a digest in the name of a part that lost letters


@dataclass(frozen=True)
class SourcePart:
    """One file of records: what is done or not done as a whole."""

    key: str
    bytes: int
    split: str = ""  # of a benchmark

    @property
    def name(self) -> str:
        """Starts the names of its shards and samples."""
        if self.split:
            return self.split
        ending = next(ending for ending in ENDINGS if self.key.endswith(ending))
        name = re.sub(r"[^A-Za-z0-9]+", "-", self.key.removesuffix(ending)).strip("-") or "part"
        if self.key.isascii():
            return name
        # Letters were lost, by which files may differ. A name that is not UTF-8 on disk has surrogates.
        return f"{name}-{hashlib.sha256(self.key.encode(errors='surrogatepass')).hexdigest()[:DIGITS]}"

    @property
    def made_from(self) -> str:
        return f"{self.key} of {self.bytes} bytes"

    @property
    def marker(self) -> str:
        return f"{PARTS}/{self.name}.json"

    @property
    def missing(self) -> str:
        """The keys of the images that it lacks, where it lacks any."""
        return f"{PARTS}/{self.name}.missing.json"


@dataclass(frozen=True)
class Moment:
    """When the store of images was looked at: the state of the ledger, and the user's word for another look."""

    ledger: str  # digest of the names and versions of its files; empty where there are none
    recheck: str

    @classmethod
    def now(cls, out: Store, recheck: str) -> Moment:
        files = [f"{entry.key} {entry.size} {entry.version}\n" for entry in out.list(f"{LEDGER}/")]
        return cls(hashlib.sha256("".join(files).encode()).hexdigest() if files else "", recheck)

    def is_later(self, marker: Mapping[str, Any]) -> bool:
        """Whether images that a part lacks may have come since its marker was written."""
        holes: Mapping[str, str] = marker.get("holes") or asdict(self)
        return holes["ledger"] != self.ledger or self.recheck not in ("", holes["recheck"])


def read_marker(out: Store, part: SourcePart, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was written when the part was done; None if it is to do. ConfigError if it was done in another way."""
    try:
        marker: dict[str, Any] = json.loads(out.read(part.marker))
    except MissingKey:
        return None
    if marker["made_from"] != part.made_from:
        raise ConfigError(f"{out.address} holds {marker['made_from']}, source has {part.made_from}: use another out")
    found = changes(marker["options"], options)
    if found:
        raise ConfigError(f"{out.address} holds parts prepared in another way ({'; '.join(found)}): use another out")
    return marker


def changes(before: Mapping[str, Any], now: Mapping[str, Any], start: str = "") -> list[str]:
    """Which of the values before are others now: ``recode.size: 256 -> 512``. A key that is new is no change."""
    found = []
    for key, value in before.items():
        if isinstance(value, dict) and isinstance(now.get(key), dict):
            found += changes(value, now[key], f"{start}{key}.")
        elif now.get(key) != value:
            found.append(f"{start}{key}: {value} -> {now.get(key)}")
    return found


def write_marker(out: Store, part: SourcePart, marker: dict[str, Any], missing: set[str], moment: Moment) -> None:
    """Mark a part as done. ``missing``: keys of images that may come yet; their list is written before the marker."""
    holes = None
    if missing:
        data = json.dumps(sorted(missing)).encode()
        write_changed(out, part.missing, data)
        holes = {"missing": hashlib.sha256(data).hexdigest(), **asdict(moment)}
    else:
        out.delete(part.missing)
    out.write(part.marker, dumped({**marker, "holes": holes}))


def looked_again(out: Store, part: SourcePart, marker: Mapping[str, Any], moment: Moment) -> None:
    """Note that nothing has come, not to look again before there is reason to."""
    out.write(part.marker, dumped({**marker, "holes": {**marker["holes"], **asdict(moment)}}))


def dumped(marker: Mapping[str, Any]) -> bytes:
    return json.dumps(marker, indent=1).encode()


def have_come(out: Store, part: SourcePart, marker: Mapping[str, Any], images: Store, reads: int) -> bool:
    """Whether an image that the part lacks is in the store now. ``reads``: keys that are asked for at once."""
    try:
        data = out.read(part.missing)
    except MissingKey:
        return True
    if hashlib.sha256(data).hexdigest() != marker["holes"]["missing"]:
        return True  # of a process that died before its marker, or of another launch
    threads = ThreadPoolExecutor(reads, "look")
    try:
        return any(size is not None for size in threads.map(images.size, json.loads(data)))
    finally:
        threads.shutdown(cancel_futures=True)
