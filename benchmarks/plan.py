"""Finding one's place among 100 million samples, and going on in the middle: ours beside mosaicml-streaming.

    python benchmarks/plan.py [peer=.venv-peers/bin/python]

Plan: from nothing to the places of the first step's samples in an epoch of 100,000 shards; ours reads the list of
shards for it, the peer's partition and py1e shuffle are taken without reading. Resume: from making the loader to the
first batch, on local shards of small images. Each is measured in a new process with everything imported; memory is the
peak beyond what the process held before.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from loader import SPEC, WORKERS, photo, word_tokenizer, write_corpus

from hpc_mm.config import Loader, Source, parse_arguments
from hpc_mm.data.shards import ShardInfo, write_manifest
from hpc_mm.data.store import open_store
from hpc_mm.data.stream import Steps, make_loader

SHARDS, PER_SHARD = 100_000, 1000
SAMPLES, BATCH, RESUMES = 2048, 16, 7  # of resuming
HERE = Path(__file__).resolve()
PEER = HERE.with_name("plan_mosaicml.py")


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def plan(folder: str) -> dict[str, float]:
    before, started = resident(), time.perf_counter()
    source = Source(data=folder, form="pairs", batch=BATCH, max_tokens=64)
    steps = Steps(source, Loader(), 0, None, SPEC, 0, 1, 1)
    assert len(steps.places(0)) == BATCH
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "MB": (peak - before) / 1e6}


def resume(folder: str) -> list[float]:
    """Seconds from making a loader in the middle of an epoch to its first batch, several times."""
    source = Source(data=folder, form="pairs", batch=BATCH, max_tokens=64)
    tokenizer, steps, found = word_tokenizer(), SAMPLES // BATCH, []
    for _ in range(RESUMES):
        started = time.perf_counter()
        loader = make_loader(source, Loader(workers=WORKERS), 0, tokenizer, SPEC, 0, 1, 1, steps // 2, steps)
        batches = iter(loader)
        (batch,) = next(batches)
        found.append(time.perf_counter() - started)
        del batches  # the end of its workers is not part of coming back
        assert len(batch.images) == BATCH
    return found


def measured(python: str, script: Path, what: str, *words: object) -> Any:
    """What a new process of a script prints as JSON."""
    command = [python, str(script), f"what={what}", *map(str, words)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def line(name: str, found: dict[str, float]) -> None:
    print(f"{name:40}{found['seconds']:8.2f} s{found['MB']:8.0f} MB", flush=True)


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    if "what" in arguments:
        print(json.dumps({"plan": plan, "resume": resume}[arguments["what"]](arguments["folder"])))
        return
    peer = arguments.get("peer", ".venv-peers/bin/python")
    with tempfile.TemporaryDirectory() as root:
        listed, shards = Path(root, "listed"), Path(root, "shards")
        names = [f"corpus-{shard:06d}.tar" for shard in range(SHARDS)]
        write_manifest(open_store(str(listed), make=True), [ShardInfo(name, PER_SHARD, 10**8) for name in names])
        write_corpus(shards, [photo(seed, 160, 120) for seed in range(8)], SAMPLES)
        print(f"plan of {SHARDS * PER_SHARD:,} samples in {SHARDS:,} shards")
        ours = measured(sys.executable, HERE, "plan", f"folder={listed}")
        line("ours", ours)
        theirs = measured(peer, PEER, "plan", f"shards={SHARDS}", f"per_shard={PER_SHARD}")
        line("mosaicml-streaming", theirs)
        print(
            f"ratio: {theirs['seconds'] / ours['seconds']:.0f}x the time, {theirs['MB'] / ours['MB']:.0f}x the memory"
        )
        print(f"resume to the first batch of {BATCH}, {WORKERS} workers; seconds: first, median")
        words = [f"folder={shards}", f"out={root}/mds", f"batch={BATCH}", f"workers={WORKERS}", f"times={RESUMES}"]
        for name, found in (
            ("ours", measured(sys.executable, HERE, "resume", f"folder={shards}")),
            ("mosaicml-streaming", measured(peer, PEER, "resume", *words)),
        ):
            print(f"{name:40}{found[0]:8.3f}{statistics.median(found):8.3f}", flush=True)


if __name__ == "__main__":
    main()
