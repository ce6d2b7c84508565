"""How far an evaluation is while its tasks run: scores so far with their intervals, rate, time left."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.table import Table

from hpc_mm.benchmark import Benchmark
from hpc_mm.intervals import Interval
from hpc_mm.predictions import Done, State, done_parts, state
from hpc_mm.scoring import scores
from hpc_mm.trials import Planned, Trial

EVERY = 5.0  # seconds between looks
QUIET = 300.0  # seconds without a new part that are told
SHARE = 4  # times as long as a look takes is waited for the next


@dataclass
class Watched:
    """A trial and what is known of it."""

    trial: Trial
    done: Mapping[int, Done] = field(default_factory=dict)
    score: Interval | None = None  # of what is done; None where nothing can be scored

    def look(self, planned: Planned, benchmark: Benchmark, rules: str) -> State:
        plan, known = planned.plans[self.trial], len(self.done)
        self.done = done_parts(planned.store(self.trial), plan, self.done)
        if len(self.done) > known:
            self.score = self._scored(planned, benchmark, rules)
        return state(plan, self.done)

    def _scored(self, planned: Planned, benchmark: Benchmark, rules: str) -> Interval | None:
        rows = [row for part in self.done.values() for row in part.rows]
        asked = [planned.by_id[row["id"]] for row in rows]
        if not all(question.references for question in asked):
            return None
        try:
            found = scores(benchmark, rules, asked, rows, planned.questions)
        except ValueError:  # of a curve, one class alone so far
            return None
        return found.interval(len(planned.questions))


def watch(planned: Planned, benchmark: Benchmark, rules: Sequence[str], every: float = EVERY) -> int:
    """Show every trial until all parts are done; reads what tasks have written, and nothing else."""
    trials = [Watched(trial) for trial in planned.plans]
    console = Console()
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            began = time.monotonic()
            states = [one.look(planned, benchmark, rules[0]) for one in trials]
            table = shown(trials, states, f"{benchmark.metric}, {rules[0]}{silence(trials)}")
            if console.is_terminal:
                live.update(table, refresh=True)
            else:
                print(line(trials, states) + silence(trials), flush=True)
            if all(found.questions == found.total for found in states):
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
    return f"; nothing new for {clock(time.time() - newest)}: see the logs, or give the same command again"


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
