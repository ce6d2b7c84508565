"""What one start of a run came to: ``attempt.json`` in the run's folder, written by rank 0, read by ``supervise``.

It says from which step training went on and, once that has ended by itself, how, at which step and why. Without an
ending, training crashed or was killed.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

FILE = "attempt.json"

FINISHED = "finished"  # all steps are done
WARNED = "warned"  # saved, because time is up or the job got SIGUSR2: wants to be requeued
ENDED = "ended"  # saved, because of SIGTERM: preempted, cancelled or out of time
STOPPED = "stopped"  # the run gave up
REFUSED = "refused"  # a user's mistake
ENDINGS = (FINISHED, WARNED, ENDED, STOPPED, REFUSED)


def prepare(run_folder: Path, before: dict[str, Any]) -> None:
    """Forget the last attempt. ``before``: what the supervisor will want to know of the time before this one."""
    _write(run_folder, {"before": before})


def begin(run_folder: Path, step: int) -> None:
    """Note that training goes on from ``step``, if no rank has been refused before."""
    _write(run_folder, {**read(run_folder), "from": step})


def end(run_folder: Path, ending: str, step: int, reason: str = "") -> None:
    """Note one of ENDINGS; ``reason`` is one line."""
    assert ending in ENDINGS, ending
    _write(run_folder, {**read(run_folder), "ending": ending, "step": step, "reason": reason})


def read(run_folder: Path) -> dict[str, Any]:
    """What is noted of the last attempt; empty where there is none."""
    try:
        found: dict[str, Any] = json.loads((run_folder / FILE).read_text())
    except FileNotFoundError:
        return {}
    return found


def clear(run_folder: Path) -> None:
    """Forget the last attempt."""
    (run_folder / FILE).unlink(missing_ok=True)


def _write(run_folder: Path, values: dict[str, Any]) -> None:
    aside = run_folder / f".{FILE}.{socket.gethostname()}.{os.getpid()}"  # any rank may tell that it was refused
    aside.write_text(json.dumps(values))
    os.replace(aside, run_folder / FILE)
