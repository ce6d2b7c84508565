"""``python3 -m hpc_mm.supervise run=FOLDER log=FILES COMMAND...``: the last line of a batch script.

Runs the command (srun), and when it has ended starts it again in place, requeues the job, or stops with a reason:
by what training noted (``attempt``), by what Slurm says of the job, and by whether there is a newer checkpoint.
It runs on the first node outside any container, so it is plain Python 3.9 and imports nothing that is installed.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc_mm import attempt, checkpoint, evaluations
from hpc_mm.deadline import END_TIME

FRUITLESS = 2  # attempts in a row without a newer checkpoint that stop a run
PATIENCE = 10  # seconds that ranks get to save after the time limit before the job is requeued under them
AGAIN = 10  # seconds between two signals to the ranks
KILL = 60  # seconds in which Slurm ends a job that was requeued
CODES = {attempt.FINISHED: 0, attempt.STOPPED: 1, attempt.REFUSED: 2}
EXIT, REQUEUE, RESTART = "exit", "requeue", "restart"

Facts = dict[str, str]  # what ``scontrol show job`` says: JobState, Reason, PreemptTime, Restarts, EndTime, ...


def say(line: str) -> None:
    print(f"hpc_mm: {line}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- Slurm


def ask(*words: str) -> str | None:
    """Slurm's answer, times in unix seconds; None where it does not answer."""
    try:
        answer = subprocess.run(
            words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "SLURM_TIME_FORMAT": "%s"}
        )
    except FileNotFoundError:  # a compute node without Slurm's commands
        return None
    return None if answer.returncode else answer.stdout.decode(errors="replace")


def job_facts(job: str) -> Facts:
    """Slurm's words about the job; empty where it does not answer."""
    words = (ask("scontrol", "show", "job", "-o", job) or "").split()
    return {name: value for name, mark, value in (word.partition("=") for word in reversed(words)) if mark}


def silent_nodes(nodes: str) -> list[str]:
    """Those of the job's nodes that are down or do not answer Slurm."""
    lines = [line.split() for line in (ask("sinfo", "-h", "-N", "-n", nodes, "-o", "%N %t") or "").splitlines()]
    return sorted({name for name, state in lines if state.endswith("*") or state.startswith(("down", "fail"))})


def free_port(job: int) -> int:
    """A port of this job, so that jobs on shared nodes do not meet, on which no program listens on this node.

    The first two lie below the range from which the kernel takes ports for outgoing connections.
    """
    for port in (10000 + job % 10000, 20000 + job % 10000, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection of before may linger
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise AssertionError("the kernel has no free port")


# ---------------------------------------------------------------- what to do


def newest(run_folder: Path) -> list[int]:
    """Step and time of writing (ns) of the checkpoint that was written last; zeros where there is none.

    The time tells a damaged checkpoint from one that was written again at the same step.
    """
    found = [
        (os.stat(folder / checkpoint.MANIFEST).st_mtime_ns, checkpoint.step_of(folder))
        for folder in checkpoint.finished(run_folder)
    ]
    written, step = max(found, default=(0, 0))
    return [step, written]


def decide(
    ending: str, code: int, job: Facts, terminated: bool, fruitless: int, silent: Sequence[str]
) -> tuple[str, str]:
    """EXIT, REQUEUE or RESTART, and why, after an attempt that neither finished nor gave up.

    ``code``: the command's exit code. ``terminated``: the batch script got SIGTERM. ``fruitless``: attempts in a row
    without a newer checkpoint. ``silent``: nodes that do not answer.
    """
    out_of_time = job.get("Reason") == "TimeLimit"
    preempted = job.get("PreemptTime", "None") not in ("None", "N/A")
    if int(job.get("Restarts", 0)) > int(os.environ.get("SLURM_RESTART_COUNT", 0)):
        return EXIT, "Slurm has requeued the job"
    running = job["JobState"] == "RUNNING" if job else not terminated
    if not running and not out_of_time:
        return EXIT, "the job was cancelled"
    if preempted:  # Slurm requeues only what has not ended by itself when the grace time is over
        return REQUEUE, "the job is preempted"
    if silent:
        return REQUEUE, f"lost {', '.join(silent)}"
    if fruitless >= FRUITLESS:
        return EXIT, f"{fruitless} attempts in a row made no checkpoint"
    if ending == attempt.WARNED or out_of_time:
        return REQUEUE, "time is up"
    if ending == attempt.ENDED and code == 0:  # when one node fails, srun sends SIGTERM to the others
        return EXIT, "it got SIGTERM"
    return RESTART, "it crashed"


class Supervisor:
    """The attempts of one Slurm job at a run."""

    def __init__(self, run_folder: Path, log: str, command: Sequence[str]) -> None:
        self.run_folder, self.log, self.command = run_folder, log, list(command)
        self.job = os.environ["SLURM_JOB_ID"]
        self.file = run_folder / "attempts.jsonl"
        self.child: subprocess.Popen[bytes] | None = None
        self.evaluations = evaluations.Jobs(run_folder, Path.cwd().parent, say)
        self.terminated = self.warned = False
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(signal.SIGUSR2, self._on_usr2)

    def _on_term(self, number: int, frame: object) -> None:
        self.terminated = True  # Slurm tells the step too; it must be waited for

    def _on_usr2(self, number: int, frame: object) -> None:
        self.warned = True
        if self.child is not None:  # sbatch --signal=B:USR2@600 tells only the batch script; srun passes it on
            self.child.send_signal(number)

    def run(self) -> int:
        """Exit code of the job: 0, 1 where the run did not finish, 2 for a user's mistake."""
        self.refuse_other_nodes()
        left = attempt.read(self.run_folder)
        if left.get("before", {}).get("job") == self.job:  # Slurm ended everything at once, this supervisor too
            self.record(left, None)
            if self.fruitless() >= FRUITLESS:
                say(f"{self.fruitless()} attempts in a row made no checkpoint; their log: {self.log}")
                return 1
        while True:
            code = self.attempt()
            found = attempt.read(self.run_folder)
            self.record(found, code)
            ending, step = found.get("ending", ""), newest(self.run_folder)[0]
            if ending in CODES:
                self.evaluations.update()  # of the last checkpoint
                if ending != attempt.FINISHED:
                    say(f"{ending}: {found['reason']}")
                return CODES[ending]
            silent = silent_nodes(os.environ.get("SLURM_JOB_NODELIST", ""))
            action, why = decide(ending, code, job_facts(self.job), self.terminated, self.fruitless(), silent)
            said = f"{ending or 'crashed'} (exit code {code}), newest checkpoint step {step}: {why}"
            if action == EXIT:
                say(f"{said}; its log: {self.log}")
                return 1
            say(f"{said}; {'starting again' if action == RESTART else 'requeueing'}")
            if action == REQUEUE:
                return self.requeue()

    def refuse_other_nodes(self) -> None:
        """The frozen command line is for the run's own number of nodes."""
        run = json.loads((self.run_folder / "run.json").read_text())
        nodes = os.environ.get("SLURM_NNODES", str(run["nodes"]))
        if nodes != str(run["nodes"]):
            say(f"this job has {nodes} nodes, the run {run['nodes']}: launch it with nodes={nodes} to change that")
            sys.exit(2)

    def attempt(self) -> int:
        """Run the command once, to its end; its exit code."""
        attempt.prepare(self.run_folder, {"job": self.job, "newest": newest(self.run_folder)})
        environment = {**os.environ, "MASTER_PORT": str(free_port(int(self.job)))}
        end = job_facts(self.job).get("EndTime", "")
        environment.pop(END_TIME, None)
        if end.isdigit():  # not "Unknown": no time limit
            environment[END_TIME] = end
        self.child = subprocess.Popen(self.command, env=environment)
        told = 0  # seconds ago, that the batch script got SIGTERM or SIGUSR2
        while True:
            try:
                return self.child.wait(timeout=1)
            except subprocess.TimeoutExpired:
                told += self.terminated or self.warned
                if not told:  # else every second counts
                    self.evaluations.update()
            if self.terminated and told == PATIENCE and job_facts(self.job).get("Reason") == "TimeLimit":
                self.requeue()  # now: Slurm kills soon, and this supervisor too
            if told and told % AGAIN == 0:
                self.tell_again()

    def tell_again(self) -> None:
        """Ranks that were importing torch when the signal came have not heard it; the others ignore a second one."""
        if self.terminated:
            ask("scancel", "--signal=TERM", self.job)
        elif self.child is not None:
            self.child.send_signal(signal.SIGUSR2)

    def record(self, found: dict[str, Any], code: int | None) -> None:
        """Add the attempt to attempts.jsonl. ``code``: the command's exit code, None where nobody saw it."""
        before, now = found.get("before", {}).get("newest", [0, 0]), newest(self.run_folder)
        line = {
            "time": round(time.time(), 1),
            "job": self.job,
            "restart": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
            "from": found.get("from", before[0]),
            "newest": now[0],
            "progress": now != before,
            "ending": found.get("ending", "crashed" if code is not None else "killed"),
            "code": code,
            "reason": found.get("reason", ""),
        }
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        attempt.clear(self.run_folder)

    def fruitless(self) -> int:
        """How many of this job's last attempts in a row brought no newer checkpoint, over all its requeues.

        Those that SIGTERM ended do not count: Slurm, not the run, cut them off.
        """
        lines = [json.loads(line) for line in self.file.read_text().splitlines() if line.endswith("}")]  # not torn
        ours = [line for line in lines if line["job"] == self.job and line["ending"] != attempt.ENDED]
        progress = [line["progress"] for line in ours]
        return next((number for number, made in enumerate(reversed(progress)) if made), len(progress))

    def requeue(self) -> int:
        """Send the job back into the queue, and wait for the end that this brings."""
        try:
            answer = subprocess.run(["scontrol", "requeue", self.job], stderr=subprocess.PIPE)
            problem = answer.stderr.decode(errors="replace").strip() if answer.returncode else ""
        except FileNotFoundError:
            problem = "there is no scontrol on this node"
        if problem:
            script = Path.cwd().parent / "job.sbatch"
            say(f"cannot requeue job {self.job} ({problem}); to go on, type: sbatch {shlex.quote(str(script))}")
            return 1
        end = time.monotonic() + KILL
        while not self.terminated and time.monotonic() < end:
            time.sleep(0.1)
        return 0


def main(words: Sequence[str]) -> int:
    values = dict(word.split("=", 1) for word in words[:2])
    return Supervisor(Path(values["run"]), values["log"], words[2:]).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
