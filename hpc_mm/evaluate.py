"""What eval/ scripts call: a run's model x a benchmark's held-out samples -> captions as JSONL -> a score."""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hpc_mm import checkpoint, metrics
from hpc_mm.config import (
    IMAGE_TOKEN,
    ConfigError,
    ImageSpec,
    Part,
    Positive,
    Run,
    parse_arguments,
    read_run,
    with_overrides,
)
from hpc_mm.data.batch import normalised
from hpc_mm.data.images import decode
from hpc_mm.data.pictures import UnreadableImage
from hpc_mm.data.schema import Sample, Text
from hpc_mm.data.shards import BrokenShard, read_samples
from hpc_mm.data.store import MissingKey, StoreError, open_store
from hpc_mm.models.flamingo import FlamingoModel, build, load_tokenizer
from hpc_mm.site import in_store, read_site


class Captions(Part):
    """A captioning benchmark. Each eval/ script gives its own values; the command line changes them."""

    run: str = Field("", description="folder of the run")
    steps: tuple[str, ...] = Field(
        ("0", checkpoint.LATEST), description="0 = the weights before training, latest, or a number"
    )
    data: str = Field(description="shards of images with references: an address, or a name inside the site's store")
    samples: Positive = Field(100, description="images, the first ones of the shards")
    prompt: str = Field(IMAGE_TOKEN, description="what stands before the caption, with one <image>")
    max_new_tokens: Positive = Field(32, description="tokens of a caption; what is longer is cut")
    batch: Positive = Field(50, description="images that are captioned at once")


def main(benchmark: Captions, arguments: Sequence[str]) -> int:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        options: Captions = with_overrides(benchmark, parse_arguments(arguments))
        if not options.run:
            raise ConfigError("run=FOLDER is missing: the folder of the run to evaluate")
        show(evaluate(options))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def evaluate(options: Captions) -> dict[str, Any]:
    """Caption the images at every step and score them: RUN/eval/captions-step-N.jsonl, then RUN/eval/captions.json.

    The result is what captions.json holds: the data's address, and per step its file and CIDEr times 100.
    """
    if options.prompt.count(IMAGE_TOKEN) != 1:
        raise ConfigError(f"prompt={options.prompt!r} has no {IMAGE_TOKEN}, or several: it must stand there once")
    folder = Path(options.run)
    run = read_run(folder)
    checkpoints = [find(folder, step) for step in options.steps]
    address = in_store(options.data, read_site().store)
    samples = read_first(address, options.samples)
    references = [references_of(sample) for sample in samples]
    scores = []
    for found in checkpoints:
        captions = caption_with(run, found, samples, options)
        step = checkpoint.step_of(found) if found else 0
        rows = [
            {"id": sample.id, "caption": caption, "references": truth}
            for sample, caption, truth in zip(samples, captions, references, strict=True)
        ]
        name = f"captions-step-{step}.jsonl"
        write(folder / "eval" / name, "".join(json.dumps(row) + "\n" for row in rows))
        scores.append({"step": step, "file": name, "cider": 100 * metrics.cider(captions, references)})
    summary = {"data": address, "samples": len(samples), "prompt": options.prompt, "scores": scores}
    write(folder / "eval" / "captions.json", json.dumps(summary, indent=1))
    return summary


def find(folder: Path, step: str) -> Path | None:
    """The checkpoint that a step names; None for step 0, the seeded weights before training."""
    return None if step == "0" else checkpoint.chosen(folder, step)


def read_first(address: str, count: int) -> list[Sample]:
    try:
        return list(itertools.islice(read_samples(open_store(address)), count))
    except (MissingKey, StoreError, BrokenShard) as error:
        raise ConfigError(f"{address}: {error}") from None


def references_of(sample: Sample) -> list[str]:
    """The captions that count as right: ``references`` of the metadata, or else the sample's own text."""
    references = sample.metadata.get("references")
    return references or [part.text for part in sample.parts if isinstance(part, Text)]


def caption_with(run: Run, found: Path | None, samples: Sequence[Sample], options: Captions) -> list[str]:
    """One caption per sample by the run's model with a checkpoint's weights, or with its first ones."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(run.model.language)
    model = build(run.model, tokenizer, run.train.seed)
    if found:
        load_weights(model, found)
    model.eval().to(device)
    captions: list[str] = []
    for images in batches(samples, model.image_spec, options.batch):
        captions += generate(model, tokenizer, images.to(device), options)
    return captions


def load_weights(model: FlamingoModel, found: Path) -> None:
    try:
        checkpoint.load_weights(model, found)
    except checkpoint.DamagedCheckpoint as error:
        raise ConfigError(f"{error}: run.json does not describe it any more") from None


def batches(samples: Sequence[Sample], spec: ImageSpec, size: int) -> Iterator[Tensor]:
    """The first image of each sample, ``size`` at a time: (size, 3, S, S)."""
    for start in range(0, len(samples), size):
        yield normalised([_picture(sample, spec) for sample in samples[start : start + size]], spec)


def _picture(sample: Sample, spec: ImageSpec) -> Any:
    data = sample.images[0].data if sample.images else None
    if data is None:
        raise ConfigError(f"sample {sample.id} has no image in its shard, so it cannot be captioned")
    try:
        return decode(data, spec)
    except UnreadableImage as error:
        raise ConfigError(f"the image of sample {sample.id} cannot be read: {error}") from None


def generate(model: FlamingoModel, tokenizer: Any, images: Tensor, options: Captions) -> list[str]:
    """Greedy captions of images (N, 3, S, S), each after the prompt and up to ``<|endofchunk|>``."""
    prompts = tokenizer([options.prompt] * len(images), padding=True, padding_side="left", return_tensors="pt")
    ids = model.generate(
        prompts["input_ids"].to(images.device),
        prompts["attention_mask"].to(images.device),
        images,
        torch.ones(len(images), dtype=torch.long, device=images.device),
        max_new_tokens=options.max_new_tokens,
        do_sample=False,
    )
    new = ids[:, prompts["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def write(path: Path, text: str) -> None:
    """Whole or absent."""
    path.parent.mkdir(exist_ok=True)
    aside = path.with_name(f"{path.name}.partial")
    aside.write_text(text)
    os.replace(aside, path)


def show(summary: dict[str, Any]) -> None:
    table = Table(title=f"{summary['samples']:,} held-out images")
    table.add_column("step", justify="right")
    table.add_column("CIDEr x 100", justify="right")
    for score in summary["scores"]:
        table.add_row(f"{score['step']:,}", f"{score['cider']:.1f}")
    Console().print(table)
