"""What a reading worker does about signals, which Slurm sends to every process of a step."""

from __future__ import annotations

import os
import signal
import threading


def outlive_signals(worker: int) -> None:
    """Let a worker of torch's DataLoader end when its rank says so, and of no other SIGTERM or SIGUSR2.

    Without this the first SIGTERM ends the workers, and with them the rank, before it has saved. The rank's own
    SIGTERM, with which torch ends a worker that hangs, must still work, so it does not do to ignore the signal.
    A forked worker has no thread but this one here: those that NumPy starts elsewhere would still take the signal.
    """
    rank = os.getppid()
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
