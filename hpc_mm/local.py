"""This machine as a cluster: the same accelerate lines, one process group per node, in the foreground."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from hpc_mm import attempt
from hpc_mm.command import IGNORE_SIGNALS, Submission, accelerate_line, environment
from hpc_mm.config import ConfigError, Run
from hpc_mm.evaluations import Processes
from hpc_mm.progress import Progress

ADDRESS = "127.0.0.1"
LOOK = 0.2  # seconds between two looks at nodes and evaluations
GRACE = 60  # seconds for the end of a step and a save after SIGTERM
LAST_LINES = 20
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # signals that end a run


def check(run: Run) -> None:
    """Refuse more GPUs than this machine has."""
    wanted, found = run.nodes * run.gpus_per_node, len(visible_gpus())
    if wanted > found:
        raise ConfigError(
            f"nodes={run.nodes} x gpus_per_node={run.gpus_per_node} needs {wanted} GPUs, and this machine has {found} "
            "(gpus_per_node=0 trains on CPU)"
        )


def visible_gpus() -> list[str]:
    """Each as CUDA_VISIBLE_DEVICES names it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    if shutil.which("nvidia-smi") is None:
        return []
    answer = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return [str(i) for i, line in enumerate(line for line in answer.stdout.splitlines() if line.startswith("GPU "))]


def free_port() -> int:
    """A port that no program listens on now."""
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return int(probe.getsockname()[1])


def commands(run: Run, submission: Submission, port: int) -> list[str]:
    """The line of each node, to be pasted as it is."""
    return [accelerate_line(run, submission.run_folder, str(node), ADDRESS, str(port)) for node in range(run.nodes)]


def node_environments(run: Run, submission: Submission) -> list[dict[str, str]]:
    """What each node's line needs beside it. Nodes share this machine's cores and GPUs."""
    threads = min(run.slurm.cpus_per_task // run.processes_per_node, (os.cpu_count() or 1) // run.world_size)
    shared = {"PYTHONPATH": str(submission.code), **environment(run, threads)}
    shared["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
    if not run.gpus_per_node:
        return [shared] * run.nodes
    gpus, share = visible_gpus(), run.gpus_per_node
    return [{**shared, "CUDA_VISIBLE_DEVICES": ",".join(gpus[n * share : (n + 1) * share])} for n in range(run.nodes)]


def texts(run: Run, submission: Submission, port: int) -> dict[str, str]:
    """command.txt: how to run each node by hand."""
    lines = []
    for line, values in zip(commands(run, submission, port), node_environments(run, submission), strict=True):
        settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in values.items())
        lines.append(f"cd {shlex.quote(str(submission.code))} && {settings} {line}\n")
    return {"command.txt": "".join(lines)}


def train(run: Run, submission: Submission, port: int, lock: int) -> int:
    """Run all nodes to their end; 0, or 1 after showing the end of the log of the node that failed.

    ``lock``: descriptor of the run folder's lock. Nodes keep it too, so it outlives a launcher that is killed.
    """
    attempt.clear(submission.run_folder)
    progress = Progress(run, submission.run_folder / "metrics.jsonl")
    values = node_environments(run, submission)[0]
    evaluations = Processes(submission.run_folder, submission.folder, tell, values)
    with _terminated_as_interrupted(), _nodes(run, submission, port, lock) as nodes:
        try:
            with progress:
                failed = _watch(nodes, progress, evaluations)
            while failed is None and _finished(submission) and evaluations.update():
                time.sleep(LOOK)
        except KeyboardInterrupt:
            print(
                f"interrupted; the same command goes on from the newest checkpoint. Logs: {submission.folder}",
                file=sys.stderr,
            )
            return 1
    if failed is None:
        if _finished(submission):
            return 0
        tell(f"{attempt.read(submission.run_folder)['ending']}, saved; the same command goes on from there")
        return 1
    log = submission.log(failed)
    print("\n".join(_last_words(log.read_text(errors="replace").splitlines())), file=sys.stderr)
    tell(f"node {failed} failed (exit code {nodes[failed].returncode}); its log: {log}")
    return 1


def tell(line: str) -> None:
    print(f"hpc_mm: {line}", file=sys.stderr)


def _finished(submission: Submission) -> bool:
    """Whether the run, all of whose nodes have ended well, has done all its steps."""
    return attempt.read(submission.run_folder).get("ending") in (attempt.FINISHED, None)


def _last_words(lines: list[str]) -> list[str]:
    """The end of what the node's own processes said, before torch's agent reports at length that one of them failed."""
    agent = next((number for number, line in enumerate(lines) if "failed (exitcode:" in line), len(lines))
    return lines[max(agent - LAST_LINES, 0) : agent] or lines[-LAST_LINES:]


def _watch(nodes: list[subprocess.Popen[bytes]], progress: Progress, evaluations: Processes) -> int | None:
    """Wait for the end of all nodes (None), or of the first that fails (its number)."""
    while True:
        codes = [node.poll() for node in nodes]
        progress.update()
        evaluations.update()
        for number, code in enumerate(codes):
            if code:
                return number
        if all(code == 0 for code in codes):
            return None
        time.sleep(LOOK)


@contextmanager
def _nodes(run: Run, submission: Submission, port: int, lock: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """One process group per node; whatever happens, none outlives the block."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        for number, (line, values) in enumerate(
            zip(commands(run, submission, port), node_environments(run, submission), strict=True)
        ):
            with submission.log(number).open("ab") as log:
                started.append(
                    subprocess.Popen(
                        ["bash", "-c", f"{IGNORE_SIGNALS}; exec {line}"],
                        cwd=submission.code,
                        env={**os.environ, **values},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                        pass_fds=(lock,),
                    )
                )
        yield started
    finally:
        _end(started, submission.code)


def _end(nodes: list[subprocess.Popen[bytes]], code: Path) -> None:
    """SIGTERM to every rank, which then saves, but not where a node failed: the others wait for it for ever.

    SIGKILL to what is left when accelerate has ended or the grace time is over.
    """
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ENDINGS}  # a second Ctrl-C must not end this
    end = time.monotonic() + (0 if any(node.poll() for node in nodes) else GRACE)
    while (alive := [node for node in nodes if node.poll() is None]) and time.monotonic() < end:
        for process in _running(code):  # again and again: a rank does not hear it while it imports torch
            _signal_group(process, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            alive[0].wait(timeout=1)
    for node in nodes:
        _signal_group(node.pid, signal.SIGKILL)
        node.wait()
    for process in _running(code):  # torch gives every worker a session of its own, so it is in no group of ours
        _signal_group(process, signal.SIGKILL)
    for number, handler in before.items():
        signal.signal(number, handler)


def _signal_group(leader: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # all of it has ended
        os.killpg(leader, number)


def _running(code: Path) -> set[int]:
    """Process groups on this machine whose Python path begins with this submission's code.

    For DeepSpeed accelerate puts the code there a second time.
    """
    groups = set()
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            begins = [word.partition(b":")[0] for word in file.read_bytes().split(b"\0")]
            if f"PYTHONPATH={code}".encode() in begins:
                groups.add(os.getpgid(int(file.parent.name)))
        except OSError:
            continue  # another user's, or it has ended since
    return groups - {os.getpgrp()}


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM and a closed terminal end this launcher as Ctrl-C does, so that its nodes end with it."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    # What is ignored stays so: nohup ignores SIGHUP.
    caught = [number for number in ENDINGS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
