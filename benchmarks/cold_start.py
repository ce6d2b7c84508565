"""How long a user waits on a login node: ``--help`` and ``cluster=print`` beside importing submitit and torch alone.

    python benchmarks/cold_start.py

Whole processes, taken in turn; what bounds them is importing (pydantic for print, ast for help). The first round warms
the file cache and is not counted.
"""

import statistics
import subprocess
import sys
import time

ROUNDS = 7
LAUNCH = ["-m", "hpc_mm.launch"]
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "hpc_mm.launch --help": [*LAUNCH, "--help"],
    "hpc_mm.launch cluster=print": [*LAUNCH, "recipe=omnicorpus", "nodes=8", "cluster=print"],
    "import submitit": ["-c", "import submitit"],
    "import torch": ["-c", "import torch"],
}


def seconds(words: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    rounds = [{name: seconds(words) for name, words in COMMANDS.items()} for _ in range(ROUNDS + 1)][1:]
    peer = statistics.median(times["import submitit"] for times in rounds)
    print(f"{'command':30}{'min':>8}{'median':>8}{'max':>8}  of import submitit")
    for name in COMMANDS:
        times = [found[name] for found in rounds]
        middle = statistics.median(times)
        print(f"{name:30}{min(times):8.3f}{middle:8.3f}{max(times):8.3f}  {middle / peer:.2f}x")


if __name__ == "__main__":
    main()
