"""Deadline: no step begins that would not leave room for the save, and none is left out that would."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_mm.deadline import END_TIME, LAST_STEPS, Deadline

DURATIONS = st.floats(1, 100)


@given(st.lists(DURATIONS, min_size=1, max_size=30), DURATIONS, DURATIONS, st.floats(0, 500))
def test_no_step_begins_too_late_and_none_is_left_out_that_fits(
    durations: list[float], save: float, margin: float, end: float
) -> None:
    """Steps that take at most as long as one of the last few: the save ends in time; one more step would not fit."""
    deadline = Deadline(end, first_save=save, margin=margin)
    now, taken = 0.0, [0.0]
    for wanted in durations * 500:
        if deadline.reason(now):
            break
        known = max(taken[-LAST_STEPS:])
        seconds = min(wanted, known) if known else wanted  # how long the first one is nobody can know
        deadline.stepped(seconds)
        taken.append(seconds)
        now += seconds
    assert deadline.reason(now) == "warned"
    if len(taken) > 2:
        assert now + save + margin <= end + 1e-6
    assert now + max(taken[-LAST_STEPS:]) + save + margin > end


def test_a_measured_save_replaces_the_guess_and_the_slowest_counts() -> None:
    deadline = Deadline(100.0, first_save=50.0, margin=10.0)
    assert deadline.reason(40.0) == "" and deadline.reason(40.1) == "warned"
    deadline.saved(20.0)
    deadline.saved(5.0)
    assert deadline.reason(70.0) == "" and deadline.reason(70.1) == "warned"
    deadline.stepped(30.0)
    assert deadline.reason(40.0) == "" and deadline.reason(40.1) == "warned"
    for _ in range(LAST_STEPS):
        deadline.stepped(1.0)
    assert deadline.reason(69.0) == "" and deadline.reason(69.1) == "warned"


def test_without_an_end_only_signals_count() -> None:
    deadline = Deadline()
    assert deadline.reason(1e12) == ""
    deadline.tell(signal.SIGUSR2)
    assert deadline.reason(0.0) == "warned"
    deadline.tell(signal.SIGTERM)
    deadline.tell(signal.SIGUSR2)
    assert deadline.reason(0.0) == "ended"


def test_the_environment_and_real_signals() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        deadline = Deadline.from_environment({END_TIME: "1000"})
        assert deadline.end == 1000.0 and Deadline.from_environment({}).end is None
        deadline = Deadline.from_environment({})
        os.kill(os.getpid(), signal.SIGUSR2)
        assert deadline.reason(0.0) == "warned"
        os.kill(os.getpid(), signal.SIGTERM)
        assert deadline.reason(0.0) == "ended"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can do that")
def test_a_rank_dies_with_its_agent(tmp_path: Path) -> None:
    rank = (
        "from hpc_mm.deadline import die_with_parent as d; d(); import time; print('up', flush=True); time.sleep(600)"
    )
    agent = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {rank!r}], stdout=subprocess.PIPE, start_new_session=True)\n"
        "child.stdout.readline(); print(child.pid, flush=True); child.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", agent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = process.stdout.readline().strip()
        process.kill()
    while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)


ORDERLY = """
import sys, time
from hpc_mm.deadline import ended_in_order
with ended_in_order():
    try:
        print("up", flush=True)
        time.sleep(600)
    finally:
        print("down", flush=True)
        time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize(("seconds", "code"), [(0.5, 143), (600.0, -signal.SIGTERM)])
def test_sigterm_ends_in_order_and_again_at_once(seconds: float, code: int) -> None:
    with subprocess.Popen([sys.executable, "-c", ORDERLY, str(seconds)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        process.terminate()
        assert process.stdout.readline() == "down\n"
        process.terminate()  # at once: the same signal
        while seconds > 1 and process.poll() is None:
            process.terminate()
            time.sleep(0.05)
        assert process.wait() == code
