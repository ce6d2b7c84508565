"""On a GPU: parity with open_flamingo 2.0.1 in bf16, then speed and memory beside it, then whether the loader keeps up.

    python benchmarks/gpu.py [device=cuda|cpu] [size=full|tiny]

Shapes are OpenFlamingo-3B's and -9B's, weights random, precision bf16 as each side trains with it: ours with frozen
towers in bf16, open_flamingo with autocast over fp32. A step is forward, loss, backward, clipping and AdamW on the same
documents of two images; batches are made beforehand. MFU counts the work on real tokens and images, vision and text,
over the device's dense bf16 peak. Where there is no GPU it says so; ``device=cpu size=tiny`` runs every line of it.
"""

from __future__ import annotations

import gc
import io
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peer import MAX_IMAGES, MAX_TOKENS, Ours, Theirs, documents, flamingo, reference
from PIL import Image as Picture

from hpc_mm.config import Flamingo, Loader, Source, parse_arguments
from hpc_mm.data.batch import Batch
from hpc_mm.data.packing import packed
from hpc_mm.data.schema import Image, Sample, Text
from hpc_mm.data.shards import ShardWriter
from hpc_mm.data.store import open_store
from hpc_mm.data.stream import make_loader
from hpc_mm.meter import memory_gb, peak_flops
from hpc_mm.models.flamingo import FlamingoModel, build, load_tokenizer
from hpc_mm.models.openflamingo_weights import load_openflamingo


@dataclass(frozen=True)
class Size:
    """What is measured, and for how long."""

    models: dict[str, tuple[Flamingo, int]]  # with documents per step
    seconds: float  # per measurement, after two steps that are not counted
    pack_tokens: int
    shard_documents: int
    jpeg: tuple[int, int]  # pixels
    workers: int


def sizes(name: str) -> Size:
    small = {"image_size": 32, "patch_size": 16, "layers": 2, "width": 64, "head_width": 16}
    if name == "tiny":
        mpt = {"model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}
        return Size({"tiny": (flamingo(small, mpt, 200, 1, resampler_depth=2), 4)}, 0.0, 512, 16, (64, 48), 1)
    tower = {"image_size": 224, "patch_size": 14, "layers": 24, "width": 1024, "head_width": 64}
    shape = {"model_type": "mpt", "max_seq_len": 2048}
    one = {**shape, "d_model": 2048, "n_heads": 16, "n_layers": 24}
    seven = {**shape, "d_model": 4096, "n_heads": 32, "n_layers": 32}
    models = {
        "OF-3B-like (ViT-L/14, MPT-1B, every layer)": (flamingo(tower, one, 50277, 1), 32),
        "OF-9B-like (ViT-L/14, MPT-7B, every 4th layer)": (flamingo(tower, seven, 50277, 4), 16),
    }
    return Size(models, 15.0, 1024, 4000, (512, 384), max(1, (os.cpu_count() or 1) - 1))


# ---------------------------------------------------------------- parity


def parity(device: str) -> None:
    """Both sides' bf16 logits against open_flamingo's in fp32; exits where ours are much farther off than its own."""
    config = flamingo(
        {"image_size": 32, "patch_size": 16, "layers": 4, "width": 128, "head_width": 32},
        {"model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4},
        200,
        1,
    )
    tokenizer = load_tokenizer(config.language)
    torch.manual_seed(0)
    theirs = reference(config).to(device)
    ours = build(config, tokenizer, 0, "bf16").to(device)
    state = build(config, tokenizer, 0)
    load_openflamingo(state, theirs.state_dict())
    ours.load_state_dict(state.state_dict())  # rounds what is frozen
    rows = documents(4, tokenizer, ours.image_spec.size, seed=0)
    images, ids, mask, _ = (
        part.to(device) for part in Theirs(theirs, tokenizer, ours.image_spec).batch([[r] for r in rows])
    )
    batch = Ours(ours).batch([[row] for row in rows]).to(device)
    with torch.no_grad():
        exact = theirs(images, ids, mask).logits[mask.bool()]
        with torch.autocast(device, torch.bfloat16):
            half = theirs(images, ids, mask).logits[mask.bool()].float()
            found = ours(batch.input_ids, batch.attention_mask, batch.images, batch.image_counts)
    found = found[batch.attention_mask.bool()].float()
    our_error, their_error = ((one - exact).abs().mean().item() for one in (found, half))
    print(
        f"parity in bf16: logits of size {exact.std():.3f}, mean error ours {our_error:.5f}, its own {their_error:.5f}"
    )
    if our_error > 3 * their_error:
        sys.exit("ours are too far from open_flamingo's")


# ---------------------------------------------------------------- speed


@dataclass
class Work:
    """What one step does, whoever does it."""

    samples: int
    tokens: int
    flops: float

    @classmethod
    def of(cls, model: FlamingoModel, batch: Batch) -> Work:
        flops = model.training_flops(batch.tokens, batch.pairs, len(batch.images), batch.targets)
        return cls(len(batch.ids), batch.tokens, flops)


def seconds_per_step(side: Ours | Theirs, batch: Any, device: torch.device, seconds: float) -> float:
    for _ in range(2):
        side.step(batch)
    synchronize(device)
    started, steps = time.perf_counter(), 0
    while steps < 2 or time.perf_counter() - started < seconds:
        side.step(batch).item()  # waits for the device, as a training loop that logs does
        steps += 1
    return (time.perf_counter() - started) / steps


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def line(name: str, work: Work, taken: float, device: torch.device) -> None:
    peak = peak_flops(device)
    mfu = f"{100 * work.flops / taken / peak:5.1f} %" if peak else "  n/a"
    print(
        f"  {name:22}{work.samples / taken:9.1f} samples/s{work.tokens / taken:10.0f} tokens/s"
        f"   MFU {mfu}{memory_gb(device):8.1f} GB   {work.flops / taken / 1e12:.1f} TFLOP/s",
        flush=True,
    )


def measure(name: str, side: Ours | Theirs, batch: Any, work: Work, size: Size) -> float | None:
    """Samples per second of a side, printed; None where it does not fit."""
    device = side.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        taken = seconds_per_step(side, batch, device, size.seconds)
    except torch.OutOfMemoryError:
        print(f"  {name:22}out of memory", flush=True)
        return None
    line(name, work, taken, device)
    return work.samples / taken


def compare(title: str, config: Flamingo, count: int, device: torch.device, size: Size) -> float:
    """Ours, ours with packed rows, and open_flamingo; our samples per second."""
    print(f"{title}, {count} documents per step")
    tokenizer = load_tokenizer(config.language)
    with device:
        model = build(config, tokenizer, 0, "bf16")
    spec = model.image_spec
    rows = documents(count, tokenizer, spec.size, seed=0)
    ours = Ours(model, "bf16")
    plain = ours.batch([[row] for row in rows])
    work = Work.of(model, plain)
    ours_rate = measure("hpc_mm", ours, plain, work, size)
    together = ours.batch(packed(rows, size.pack_tokens, 24))
    packed_rate = measure("hpc_mm, packed rows", ours, together, work, size)
    del model, ours
    free(device)
    with device:
        peer = reference(config)
    theirs = Theirs(peer, tokenizer, spec, "bf16")
    their_rate = measure("open_flamingo", theirs, theirs.batch([[row] for row in rows]), work, size)
    del peer, theirs
    free(device)
    best = max(rate for rate in (ours_rate, packed_rate, 0.0) if rate is not None)
    if their_rate and best:
        print(f"  {best / their_rate:.2f} times open_flamingo")
    return best


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- loader


def jpegs(width: int, height: int) -> Iterator[bytes]:
    """A few pictures, over and over."""
    draw = np.random.default_rng(0)
    files = []
    for _ in range(16):
        coarse = Picture.fromarray(draw.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((width, height), Picture.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    while True:
        yield from files


def loader_rate(config: Flamingo, image_size: Any, size: Size, folder: str) -> float:
    """Samples per second of the loader over shards of two-image documents in ``folder``."""
    draw, pictures = np.random.default_rng(0), jpegs(*size.jpeg)
    with ShardWriter(open_store(folder), "documents", 2**26) as writer:
        for number in range(size.shard_documents):
            text = [" ".join(f"w{i}" for i in draw.integers(1, 190, 50)) for _ in range(2)]
            parts = [part for words in text for part in (Image(next(pictures)), Text(words))]
            writer.add(Sample(f"d{number}", tuple(parts)))
    batch = min(32, size.shard_documents // 4)
    source = Source(data=folder, form="interleaved", batch=batch, max_tokens=MAX_TOKENS, max_images=MAX_IMAGES)
    steps = 10 if size.seconds == 0 else 100_000
    settings = Loader(workers=size.workers)
    tokenizer = load_tokenizer(config.language)
    stream = iter(make_loader(source, settings, 0, tokenizer, image_size, 0, 1, 1, 0, steps))
    for _ in range(2 * size.workers):
        next(stream)  # workers have started
    started, samples = time.perf_counter(), 0
    for step in stream:
        samples += sum(len(one.ids) for one in step)
        if time.perf_counter() - started > size.seconds > 0:
            break
    return samples / (time.perf_counter() - started)


def main() -> int:
    words = parse_arguments(sys.argv[1:])
    device = torch.device(words.get("device", "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing was measured")
        return 0
    if device.type == "cuda":
        print(torch.cuda.get_device_name())
    size = sizes(words.get("size", "full"))
    parity(device.type)
    rates = {title: compare(title, config, count, device, size) for title, (config, count) in size.models.items()}
    config = next(iter(size.models.values()))[0]
    with torch.device("meta"):
        spec = build(config, load_tokenizer(config.language), 0).image_spec
    with tempfile.TemporaryDirectory(prefix="hpc_mm-") as folder:
        rate = loader_rate(config, spec, size, folder)
    width, height = size.jpeg
    print(f"loader: {rate:.0f} samples/s of two {width}x{height} JPEGs with {size.workers} workers")
    for title, wanted in rates.items():
        if wanted:
            print(f"  {rate / wanted:.1f} times what {title} takes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
