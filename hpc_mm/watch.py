"""How far an evaluation is while its tasks run: scores so far with their intervals, rate, time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from rich.console import Console
from rich.live import Live
from rich.table import Table

from hpc_mm import slurm
from hpc_mm.config import ConfigError
from hpc_mm.data.store import Store
from hpc_mm.intervals import Interval
from hpc_mm.predictions import Done, Plan, Row, State, done_parts, state

EVERY = 5.0  # seconds between looks
QUIET = 300.0  # seconds without a new part that are told
SHARE = 1  # times as long as a look takes is waited for the next
ASKED = 30.0  # seconds between two questions to Slurm
AGAIN = "give the same command again, without watch=true"


Scored = Callable[[Mapping[int, list[Row]]], Mapping[str, Interval]]
"""Takes the rows of parts that have not come before, by number, and gives the scores of all that came, by name."""


@dataclass
class Watched:
    """A plan's parts, and what is known of them."""

    name: str
    store: Store
    plan: Plan
    scored: Scored | None = None  # None where nothing can be scored
    done: Mapping[int, Done] = field(default_factory=dict)  # without their rows, which may be a million
    scores: Mapping[str, Interval] = field(default_factory=dict)  # of what is done

    def look(self) -> State:
        found = done_parts(self.store, self.plan, self.done)
        new = {part: done.rows for part, done in found.items() if part not in self.done}
        self.done = {part: replace(done, rows=[]) for part, done in found.items()}
        if new and self.scored is not None:
            self.scores = self.scored(new)
        return state(self.plan, self.done)


class Queue:
    """Whether this evaluation's jobs are in Slurm's queue."""

    def __init__(self, names: Sequence[str], tell: Callable[[str], None], every: float = ASKED) -> None:
        """``names`` of jobs that make parts, none where no Slurm is asked; ``tell`` takes a line."""
        self.names, self.tell, self.every = names, tell, every
        self.asked, self.answers, self.gone = -every, True, False

    def words(self) -> str:
        """What is told where parts are missing, and nothing makes them as far as Slurm knows."""
        if self.names and time.monotonic() - self.asked >= self.every:
            self.asked = time.monotonic()
            self._ask()
        return f"; Slurm has no job {' or '.join(self.names)}: unless tasks run elsewhere, {AGAIN}" if self.gone else ""

    def _ask(self) -> None:
        try:
            self.gone, self.answers = not slurm.queued(self.names), True
        except ConfigError as error:  # the daemon may be away for a while, the parts are not
            if self.answers:
                self.tell(f"{error}; parts are watched on, the queue once it answers")
            self.gone, self.answers = False, False


def watch(
    trials: Sequence[Watched], what: str, title: str, interval: str, jobs: Sequence[str] = (), every: float = EVERY
) -> int:
    """Show every trial until all parts are done; reads what tasks have written, and nothing else.

    ``what``: a plan's ids are of, such as questions. ``interval``: heads the column of intervals. ``jobs``: names of
    Slurm jobs that make parts, of which it is told when none is left; none = Slurm is not asked.
    """
    console = Console()
    queue = Queue(jobs, partial(console.print, markup=False, soft_wrap=True))
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            began, told = time.monotonic(), queue.words()  # before the look: a job's last part comes before its end
            states = [one.look() for one in trials]
            ended = all(found.questions == found.total for found in states)
            told = "" if ended else told or silence(trials)
            table = shown(trials, states, what, title + told, interval)
            if console.is_terminal:
                live.update(table, refresh=True)
            else:
                print(line(trials, states, what) + told, flush=True)
            if ended:
                break
            time.sleep(max(every, SHARE * (time.monotonic() - began)))
    if not console.is_terminal:
        console.print(table)
    return 0


def silence(trials: Sequence[Watched]) -> str:
    """How long no part has come, where that is long: tasks may have ended, or never begun."""
    newest = max((part.ended for one in trials for part in one.done.values()), default=None)
    if newest is None or time.time() - newest < QUIET:
        return ""
    return f"; nothing new for {clock(time.time() - newest)}: see the logs, or {AGAIN}"


def shown(trials: Sequence[Watched], states: Sequence[State], what: str, title: str, interval: str) -> Table:
    table = Table(title=title)
    for name in ("", what, "score", interval, f"{what}/s", "left"):
        table.add_column(name, justify="right" if name else "left")
    for one, found in zip(trials, states, strict=True):
        rate = "" if found.rate is None else f"{found.rate:.1f}"
        state_of = (f"{found.questions:,} of {found.total:,}", rate, clock(found.left))
        if not one.scores:
            table.add_row(one.name, state_of[0], "", "", *state_of[1:])
        for name, score in one.scores.items():
            table.add_row(name, state_of[0], f"{score.mean:.2f}", f"{score.low:.2f} to {score.high:.2f}", *state_of[1:])
            state_of = ("", "", "")
    return table


def line(trials: Sequence[Watched], states: Sequence[State], what: str) -> str:
    """All trials in a line, for a log."""
    done, total = (sum(getattr(found, name) for found in states) for name in ("questions", "total"))
    scores = [(name, score) for one in trials for name, score in one.scores.items()]
    words = [f"{name}: {score.mean:.2f} ({score.low:.2f} to {score.high:.2f})" for name, score in scores]
    left = time_left(trials, done, total)
    ending = [f"{clock(left)} left"] if left and done < total else []
    return "  ".join([f"{done:,} of {total:,} {what}", *words, *ending])


def time_left(trials: Sequence[Watched], done: int, total: int) -> float | None:
    """Seconds for all trials, which tasks go through one after the other; pauses without any task do not count."""
    parts = sorted((part.began, part.ended) for one in trials for part in one.done.values())
    busy, until = 0.0, 0.0
    for began, ended in parts:
        busy += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return (total - done) * busy / done if done else None


def clock(seconds: float | None) -> str:
    """Hours, minutes and seconds."""
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
