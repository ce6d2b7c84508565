"""Samples per second of our loader beside the webdataset library's usual pipeline, on the same tars, with two workers.

    python benchmarks/loader.py [store=s3://bucket/prefix] [reads=16]

Photo-like JPEGs (4:2:0, quality 77) with captions. Both give images of 224 pixels and tokens of the same tokenizer,
webdataset also without. It normalises by torchvision in its workers; ours gives bytes, which the training process
normalises on its device, and here also in this process. All run in turn; a round is an epoch of each, started anew;
ratios are to webdataset in the same round. PSNR is against Pillow: decoded whole, bicubic, centre cut. ``store``: also
measure ours from a copy of the shards there.
"""

import gc
import io
import resource
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import PreTrainedTokenizerFast

from hpc_mm.config import ENDOFCHUNK_TOKEN, IMAGE_TOKEN, PAD_TOKEN, ImageSpec, Loader, Source, parse_arguments
from hpc_mm.data.images import decode
from hpc_mm.data.order import Place
from hpc_mm.data.shards import ShardReader
from hpc_mm.data.store import open_store
from hpc_mm.data.stream import Steps, make_loader
from hpc_mm.index import index_foreign

ROUNDS, WORKERS, BATCH, SHARDS, DISTINCT = 3, 2, 64, 8, 32
SIZES = {(640, 480): 1024, (1024, 768): 512}  # pixels: samples
SPEC = ImageSpec(224, (0.481, 0.458, 0.408), (0.269, 0.261, 0.276))
WORDS = ["a", "photo", "of", "the", "red", "green", "large", "small", "house", "street", "tree", "man", "dog", "near"]
CUT = Compose([Resize(SPEC.size, InterpolationMode.BICUBIC), CenterCrop(SPEC.size)])
TRANSFORM = Compose([CUT, ToTensor(), Normalize(SPEC.mean, SPEC.std)])


def photo(seed: int, width: int, height: int) -> bytes:
    """A JPEG with the 1/f spectrum of photographs and a few hard edges."""
    draw = np.random.default_rng(seed)
    distance = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    distance[0, 0] = 1
    planes = []
    for power in (1.2, 1.5, 1.5, 1.5):  # brightness, which the colours share, and their own parts
        noise = draw.normal(size=distance.shape) + 1j * draw.normal(size=distance.shape)
        plane = np.fft.irfft2(noise / distance**power, s=(height, width))
        planes.append(plane / plane.std())
    pixels = 128 + 44 * (planes[0][..., None] + 0.5 * np.stack(planes[1:], -1))
    for _ in range(8):
        top, left = draw.integers(height), draw.integers(width)
        box = np.s_[top : top + draw.integers(20, height // 3), left : left + draw.integers(20, width // 3)]
        pixels[box] = 0.4 * pixels[box] + 0.6 * draw.integers(0, 256, 3)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=77)
    return file.getvalue()


def write_corpus(folder: Path, photos: list[bytes], samples: int) -> list[str]:
    """Tars of jpg and txt pairs with our index beside them; their paths."""
    draw = np.random.default_rng(0)
    folder.mkdir()
    paths = [str(folder / f"{shard:06d}.tar") for shard in range(SHARDS)]
    for shard, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for number in range(shard, samples, SHARDS):
                caption = " ".join(draw.choice(WORDS, 12)).encode()
                for suffix, data in (("jpg", photos[number % len(photos)]), ("txt", caption)):
                    info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    index_foreign(open_store(str(folder)))
    return paths


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words between spaces."""
    special = ["<unk>", "</s>", ENDOFCHUNK_TOKEN, IMAGE_TOKEN, PAD_TOKEN]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": PAD_TOKEN}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": [ENDOFCHUNK_TOKEN, IMAGE_TOKEN]})
    return tokenizer


# ---------------------------------------------------------------- what is measured; each gives batches of images


def peer(paths: list[str], tokenizer: Any) -> Iterable[int]:
    """Without a tokenizer its text stays text."""
    words = (lambda text: tokenizer(text)["input_ids"]) if tokenizer else (lambda text: text)
    dataset = webdataset.WebDataset(paths, shardshuffle=SHARDS).shuffle(1000).decode("pil").to_tuple("jpg", "txt")
    dataset = dataset.map_tuple(TRANSFORM, words).batched(BATCH)
    for images, _ in webdataset.WebLoader(dataset, batch_size=None, num_workers=WORKERS):
        yield len(images)


def peer_bytes(paths: list[str]) -> Iterable[int]:
    dataset = webdataset.WebDataset(paths, shardshuffle=SHARDS).shuffle(1000).to_tuple("jpg", "txt")
    for images, _ in webdataset.WebLoader(dataset.batched(BATCH), batch_size=None, num_workers=WORKERS):
        yield len(images)


def source(folder: str) -> Source:
    return Source(data=folder, form="pairs", batch=BATCH, max_tokens=64)


def ours(folder: str, samples: int, tokenizer: Any, reads: int, normalise: bool) -> Iterable[int]:
    settings = Loader(workers=WORKERS, reads=reads)
    for (batch,) in make_loader(source(folder), settings, 0, tokenizer, SPEC, 0, 1, 1, 0, samples // BATCH):
        yield len(batch.to("cpu").images if normalise else batch.images)


class Bytes(Steps):
    """The bytes of each step instead of its batches."""

    def __getitem__(self, step: int) -> Any:
        reading = self._reading()
        return list(reading.threads.map(partial(self.read, reading.shards), self.places(step)))

    def read(self, reader: ShardReader, place: Place) -> Any:
        return reader.read(self.shards.names[place.shard], place.sample).parts


def our_bytes(folder: str, samples: int, tokenizer: Any, reads: int) -> Iterable[int]:
    steps = Bytes(source(folder), Loader(workers=WORKERS, reads=reads), 0, tokenizer, SPEC, 0, 1, 1)
    for batch in DataLoader(steps, batch_size=None, sampler=range(samples // BATCH), num_workers=WORKERS):
        yield len(batch)


# ---------------------------------------------------------------- measuring


def measure(samples: int, start: Callable[[], Iterable[int]]) -> tuple[float, float]:
    """Samples per second from starting the workers to the last batch, and milliseconds of CPU time per sample."""
    began, started = processor_seconds(), time.perf_counter()
    found = sum(start())
    seconds = time.perf_counter() - started
    gc.collect()  # joins the workers, whose time counts from then on
    assert found == samples, f"{found} samples instead of {samples}"
    return samples / seconds, 1000 * (processor_seconds() - began) / samples


def processor_seconds() -> float:
    """Of this process and of its ended workers."""
    who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return sum(found.ru_utime + found.ru_stime for found in map(resource.getrusage, who))


def psnr(images: Iterable[np.ndarray[Any, Any]], photos: list[bytes]) -> float:
    """dB, of the worst image."""
    wanted = [np.asarray(CUT(Image.open(io.BytesIO(data)).convert("RGB")), dtype=float) for data in photos]
    worst = max(float(np.mean((image - expected) ** 2)) for image, expected in zip(images, wanted, strict=True))
    return float("inf") if worst == 0 else float(10 * np.log10(255**2 / worst))


def pipelines(folder: Path, paths: list[str], samples: int, reads: int, copy: str) -> dict[str, Callable[[], Any]]:
    tokenizer = word_tokenizer()
    found: dict[str, Callable[[], Any]] = {
        "webdataset": partial(peer, paths, None),
        "webdataset, tokens": partial(peer, paths, tokenizer),
        "ours, tokens": partial(ours, str(folder), samples, tokenizer, reads, False),
        "ours, tokens, normalised here": partial(ours, str(folder), samples, tokenizer, reads, True),
        "webdataset, bytes only": partial(peer_bytes, paths),
        "ours, bytes only": partial(our_bytes, str(folder), samples, tokenizer, reads),
    }
    if copy:
        found["ours, tokens, from the store"] = partial(ours, copy, samples, tokenizer, reads, False)
        found["ours, bytes only, from the store"] = partial(our_bytes, copy, samples, tokenizer, reads)
    return found


def copied(folder: Path, address: str) -> str:
    """A copy of a folder of shards below an address; empty where there is none."""
    if not address:
        return ""
    where = f"{address}/{folder.name}"
    store = open_store(where, make=True)
    for file in sorted(folder.iterdir(), key=lambda path: path.name == "index.json"):
        store.upload(file.name, file)
    return where


def table(name: str, rounds: list[dict[str, tuple[float, float]]]) -> None:
    """A line of medians over rounds."""
    base = "webdataset, bytes only" if "bytes" in name else "webdataset"
    rate, cost = (statistics.median(found[name][i] for found in rounds) for i in range(2))
    faster = statistics.median(found[name][0] / found[base][0] for found in rounds)
    cheaper = statistics.median(found[base][1] / found[name][1] for found in rounds)
    each = " ".join(f"{found[name][0]:.0f}" for found in rounds)
    print(f"  {name:34}{rate:9.0f}{faster:6.2f}x{cost:14.2f}{cheaper:7.2f}x  rounds {each}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    arguments = parse_arguments(sys.argv[1:])
    reads = int(arguments.get("reads", "16"))
    with tempfile.TemporaryDirectory() as root:
        for (width, height), samples in SIZES.items():
            photos = [photo(seed, width, height) for seed in range(DISTINCT)]
            folder = Path(root, f"{width}x{height}")
            paths = write_corpus(folder, photos, samples)
            runs = pipelines(folder, paths, samples, reads, copied(folder, arguments.get("store", "")))
            rounds = [{name: measure(samples, start) for name, start in runs.items()} for _ in range(ROUNDS)]
            mean = sum(map(len, photos)) / DISTINCT / 1000
            print(f"{width} x {height}, {mean:.0f} kB, {samples} samples, {WORKERS} workers")
            print(f"  {'':34}samples/s  ratio  CPU ms/sample  ratio")
            for name in runs:
                table(name, rounds)
            theirs = (np.asarray(CUT(Image.open(io.BytesIO(data)).convert("RGB"))) for data in photos)
            print(f"  PSNR at least: webdataset {psnr(theirs, photos):.1f} dB, ours ", end="")
            print(f"{psnr((decode(data, SPEC) for data in photos), photos):.1f} dB", flush=True)


if __name__ == "__main__":
    main()
