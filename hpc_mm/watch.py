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
from hpc_mm.benchmark import Benchmark
from hpc_mm.config import ConfigError
from hpc_mm.intervals import Interval
from hpc_mm.predictions import Done, State, done_parts, state
from hpc_mm.scoring import Running, running
from hpc_mm.trials import Planned, Trial

EVERY = 5.0  # seconds between looks
QUIET = 300.0  # seconds without a new part that are told
SHARE = 1  # times as long as a look takes is waited for the next
ASKED = 30.0  # seconds between two questions to Slurm
AGAIN = "give the same command again, without watch=true"


@dataclass
class Watched:
    """A trial and what is known of it."""

    trial: Trial
    running: Running | None = None  # None where nothing can be scored
    done: Mapping[int, Done] = field(default_factory=dict)  # without their rows, which may be a million
    score: Interval | None = None  # of what is done

    def look(self, planned: Planned) -> State:
        plan = planned.plans[self.trial]
        found = done_parts(planned.store(self.trial), plan, self.done)
        rows = {part: done.rows for part, done in found.items() if part not in self.done}
        new = {part: ([planned.by_id[row["id"]] for row in some], some) for part, some in rows.items()}
        self.done = {part: replace(done, rows=[]) for part, done in found.items()}
        if new and self.running is not None:
            self.running.add(new)
            self.score = self._scored(self.running, len(planned.questions))
        return state(plan, self.done)

    @staticmethod
    def _scored(running: Running, total: int) -> Interval | None:
        try:
            return running.scores().interval(total)
        except ValueError:  # of a curve, one class alone so far
            return None


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
    planned: Planned, benchmark: Benchmark, rules: Sequence[str], jobs: Sequence[str] = (), every: float = EVERY
) -> int:
    """Show every trial until all parts are done; reads what tasks have written, and nothing else.

    ``jobs``: names of Slurm jobs that make parts, of which it is told when none is left; none = Slurm is not asked.
    """
    begin = running(benchmark, rules[0], planned.questions) if planned.questions[0].references else lambda: None
    trials = [Watched(trial, begin()) for trial in planned.plans]
    console = Console()
    queue = Queue(jobs, partial(console.print, markup=False, soft_wrap=True))
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            began, told = time.monotonic(), queue.words()  # before the look: a job's last part comes before its end
            states = [one.look(planned) for one in trials]
            ended = all(found.questions == found.total for found in states)
            told = "" if ended else told or silence(trials)
            table = shown(trials, states, f"{benchmark.metric}, {rules[0]}{told}")
            if console.is_terminal:
                live.update(table, refresh=True)
            else:
                print(line(trials, states) + told, flush=True)
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


def shown(trials: Sequence[Watched], states: Sequence[State], title: str) -> Table:
    table = Table(title=title)
    for name in ("trial", "questions", "score", "95 % interval of all", "questions/s", "left"):
        table.add_column(name, justify="left" if name == "trial" else "right")
    for one, found in zip(trials, states, strict=True):
        count = f"{found.questions:,} of {found.total:,}"
        score, interval = ("", "")
        if one.score is not None:
            score, interval = f"{one.score.mean:.2f}", f"{one.score.low:.2f} to {one.score.high:.2f}"
        rate = "" if found.rate is None else f"{found.rate:.1f}"
        table.add_row(str(one.trial), count, score, interval, rate, clock(found.left))
    return table


def line(trials: Sequence[Watched], states: Sequence[State]) -> str:
    """All trials in a line, for a log."""
    done, total = (sum(getattr(found, name) for found in states) for name in ("questions", "total"))
    words = [f"{done:,} of {total:,} questions"]
    for one in trials:
        if one.score is not None:
            words.append(f"{one.trial.name} {one.score.mean:.2f} ({one.score.low:.2f} to {one.score.high:.2f})")
    left = time_left(trials, done, total)
    return "  ".join([*words, *([f"{clock(left)} left"] if left and done < total else [])])


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
