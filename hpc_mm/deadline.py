"""When a rank has to stop: it was told to by a signal, or no further step fits before the job's end."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

from hpc_mm.attempt import ENDED, WARNED

LAUNCHER = "HPC_MM_LAUNCHER"  # environment variable: the process that started this one and must outlive it
END_TIME = "HPC_MM_END_TIME"  # environment variable: when Slurm ends the job, in unix seconds
LAST_STEPS = 8  # the next step is taken to last as long as the slowest of these
FIRST_SAVE = 60.0  # seconds, until a save has been measured
MARGIN = 30.0  # seconds for ending all processes and for asking Slurm to requeue
ONE_SIGNAL = 1.0  # seconds
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Deadline:
    """The last moment at which a step may begin. All times in seconds; ``end`` in unix time, None for no end."""

    def __init__(self, end: float | None = None, first_save: float = FIRST_SAVE, margin: float = MARGIN) -> None:
        self.end, self.margin = end, margin
        self._steps: deque[float] = deque([0.0], maxlen=LAST_STEPS)
        self._first_save, self._slowest_save = first_save, 0.0
        self._told = ""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Deadline:
        """The job's deadline. From here on SIGTERM and SIGUSR2 end the run after its step instead of at once."""
        end = environment.get(END_TIME)
        deadline = cls(float(end) if end else None)
        signal.signal(signal.SIGTERM, deadline.tell)
        signal.signal(signal.SIGUSR2, deadline.tell)
        return deadline

    @staticmethod
    def over() -> None:
        """Ignore both signals, which may come again, up to this process's end: Python's own is to die of them."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)

    def tell(self, number: int, frame: object = None) -> None:
        """The handler of both signals. SIGTERM is the more urgent one: Slurm kills soon after it."""
        if self._told != ENDED:
            self._told = ENDED if number == signal.SIGTERM else WARNED

    def stepped(self, seconds: float) -> None:
        """A step has taken this long, with its reading."""
        self._steps.append(seconds)

    def saved(self, seconds: float) -> None:
        """A save has taken this long until the checkpoint was whole."""
        self._slowest_save = max(self._slowest_save, seconds)

    def reason(self, now: float, saves: int = 1) -> str:
        """Why the next step must not begin: ``ended``, ``warned``, or empty if it may.

        ``now`` in unix time; ``saves``: how many must still come to their end, with one that is under way.
        """
        if self._told or self.end is None:
            return self._told
        save = self._slowest_save or self._first_save
        return WARNED if now + max(self._steps) + saves * save + self.margin > self.end else ""


def terminate() -> NoReturn:
    """End with the exit code of a process that SIGTERM has ended."""
    sys.exit(128 + signal.SIGTERM)


@contextmanager
def ended_in_order(end: Callable[[], object] = terminate) -> Iterator[None]:
    """In this block SIGTERM calls ``end``, by default SystemExit, so that temporary files go; another ends all at once.

    What comes within a second is no other: the kernel sends one for each thread of a parent that ends.
    """
    first: list[float] = []

    def told(number: int, frame: object) -> None:
        if not first:
            first.append(time.monotonic())
            end()
        elif time.monotonic() - first[0] > ONE_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGTERM, told)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Let the kernel send a signal when this process's parent ends, so that no rank outlives a killed agent (Linux).

    A parent that has named itself as LAUNCHER may even have ended before this call.
    """
    if sys.platform != "linux":
        return
    parent = int(os.environ.get(LAUNCHER, os.getppid()))
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), number)
