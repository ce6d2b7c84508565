"""The peer's part of plan.py, run by a Python that has mosaicml-streaming (which needs older libraries than ours)."""

import io
import json
import os
import resource
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from streaming.base.partition import get_partitions
from streaming.base.shuffle import get_shuffle
from torchvision.transforms.functional import center_crop, resize, to_tensor

NODES, RANKS, WORKERS, BATCH = 1, 8, 8, 64  # of the plan
BLOCK = 4_000_000  # samples that are shuffled together: the default of py1e on one node


def plan(values: dict[str, str]) -> dict[str, float]:
    """What StreamingDataset does first in an epoch (streaming.base.batching.random)."""
    sizes = np.full(int(values["shards"]), int(values["per_shard"]))
    total = int(sizes.sum())
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    started = time.perf_counter()
    parts = get_partitions("relaxed", total, NODES, NODES, RANKS, WORKERS, BATCH, 0, NODES)
    shuffle = get_shuffle("py1e", sizes, NODES, 9176, 0, BLOCK)
    order = np.where(parts != -1, shuffle[parts], -1)
    assert order.size >= total
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "MB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 1e6}


class Pictures(StreamingDataset):
    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        image = Image.open(io.BytesIO(found["jpg"])).convert("RGB")
        return to_tensor(center_crop(resize(image, 224, interpolation=3), 224)), len(found["txt"])


def loader(values: dict[str, str]) -> StreamingDataLoader:
    batch = int(values["batch"])
    dataset = Pictures(local=values["out"], shuffle=True, batch_size=batch)
    return StreamingDataLoader(dataset, batch_size=batch, num_workers=int(values["workers"]))


def resume(values: dict[str, str]) -> list[float]:
    """The same as plan.resume, on the same images and texts as MDS shards."""
    count = 0
    with MDSWriter(out=values["out"], columns={"jpg": "bytes", "txt": "str"}) as out:
        for path in sorted(Path(values["folder"]).glob("*.tar")):
            with tarfile.open(path) as tar:
                files = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
            for name in sorted({name.split(".")[0] for name in files}):
                out.write({"jpg": files[f"{name}.jpg"], "txt": files[f"{name}.txt"].decode()})
                count += 1
    first = loader(values)
    batches = iter(first)
    for _ in range(count // int(values["batch"]) // 2):
        next(batches)
    state = first.state_dict()
    del batches, first
    found = []
    for _ in range(int(values["times"])):
        started = time.perf_counter()
        again = loader(values)
        again.load_state_dict(state)
        batches = iter(again)
        images, _ = next(batches)
        found.append(time.perf_counter() - started)
        assert len(images) == int(values["batch"])
        del batches, again  # the end of its workers is not part of coming back
    return found


if __name__ == "__main__":
    arguments = dict(word.split("=", 1) for word in sys.argv[1:])
    print(json.dumps({"plan": plan, "resume": resume}[arguments["what"]](arguments)))
