"""The share of real tokens, and the time of a step, by the order of samples: random, LLaVA's sampler, and ours.

    python benchmarks/padding.py [samples=48000] [timed=480]

Batches of 96 in 16 micro-batches of 6, as CLIP-FlanT5 is trained. Texts have log-normal lengths (median 300 tokens,
sigma 0.72, at most 2,048); LLaVA's sampler goes by words, of which there are fewer. Three corpora: texts on the
encoder's side alone; texts cut anywhere into question and answer; half of these, and as many short ones with an image
of 576 tokens. A step waits for the rank with most to do, of 8 with 2 micro-batches each. Packed: a rank's 12 samples of
a step in rows of at most 4,096 places, half of the rows in each micro-batch. Last, forward and backward of
a small T5 over an epoch of the second corpus, at a quarter of the lengths.
"""

import sys
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import T5Config, T5ForConditionalGeneration

from hpc_mm.config import Source, parse_arguments
from hpc_mm.data import packing
from hpc_mm.data.batch import Row
from hpc_mm.data.lengths import Lengths
from hpc_mm.data.order import make_order

BATCH, CHUNK, RANKS, SHARDS = 96, 6, 8, 12
PACKED = 4096
IMAGE_TOKENS, PROMPT, LONGEST = 576, 35, 2048
ORDERS = {"random": "random", "LLaVA's sampler": "modality_length", "ours": "length"}


def corpora(samples: int) -> dict[str, Lengths]:
    draw = np.random.default_rng(0)
    texts = np.clip(draw.lognormal(np.log(300), 0.72, samples), 4, LONGEST)
    short = np.clip(draw.lognormal(np.log(30), 0.72, samples), 4, LONGEST)
    with_image = draw.random(samples) < 0.5
    cut = draw.beta(1.5, 1.5, samples)
    mixed = np.where(with_image, short, texts)
    return {
        "texts": lengths(texts, np.ones(samples), np.zeros(samples), 0),
        "questions and answers": lengths(texts, cut, np.zeros(samples), PROMPT),
        "with images": lengths(mixed, cut, with_image, PROMPT),
    }


def lengths(texts: NDArray[Any], cut: NDArray[Any], images: NDArray[Any], prompt: int) -> Lengths:
    question = np.minimum(np.floor(texts * cut), np.floor(texts) - 1)  # an answer has its end token at least
    columns = prompt + question, np.floor(texts) - question, images, np.floor(texts * 0.28)
    return Lengths(*(column.astype(np.int32) for column in columns))


def micro_batches(found: Lengths, order: str) -> NDArray[np.int64]:
    """(steps, 16, 6): the samples of an epoch, without a last step that is smaller."""
    samples = len(found.encoder)
    sizes = np.full(SHARDS, samples // SHARDS)
    chunk = CHUNK if order == "modality_length" else 1
    source = Source(data="x", form="chat", template="t5_v1", order=order, batch=BATCH, chunk=chunk, max_tokens=LONGEST)
    steps = make_order(source, sizes, 0, found, IMAGE_TOKENS)
    places = [steps.places(step, range(BATCH)) for step in range(samples // BATCH)]
    numbers = [[place.shard * sizes[0] + place.sample for place in step] for step in places if len(step) == BATCH]
    return np.array(numbers).reshape(-1, BATCH // CHUNK, CHUNK)


def shares(found: Lengths, order: str) -> tuple[float, float]:
    """Real tokens among all, padding with them; and the longest rank's tokens over a rank's mean ones."""
    numbers = micro_batches(found, order)
    encoder = (found.encoder + IMAGE_TOKENS * found.images)[numbers]
    decoder = found.decoder[numbers]
    padded = CHUNK * (encoder.max(-1) + decoder.max(-1))
    ranks = padded.reshape(len(padded), RANKS, -1).sum(-1)
    return float((encoder + decoder).sum() / padded.sum()), float((ranks.max(1) / ranks.mean(1)).mean())


def packed_shares(found: Lengths) -> tuple[float, float]:
    """As ``shares``, of the random order with several samples in a row."""
    encoder, decoder = found.encoder + IMAGE_TOKENS * found.images, found.decoder
    source = Source(
        data="x", form="chat", template="t5_v1", batch=BATCH, max_tokens=LONGEST, pack_tokens=PACKED, pack_images=BATCH
    )
    nothing = np.zeros(0, np.int64)
    padded = []
    for step in micro_batches(found, "random").reshape(-1, RANKS, BATCH // RANKS):
        for own in step.tolist():
            samples = [Row(str(i), nothing, nothing, [], [], extra=int(encoder[i] + decoder[i])) for i in own]
            of_rank = 0
            for rows in packing.micro_batches(samples, source, by_length=False, count=BATCH // CHUNK // RANKS):
                sizes = [[(encoder[int(one.id)], decoder[int(one.id)]) for one in row] for row in rows]
                longest = np.max([np.sum(row, axis=0) for row in sizes] or [[1, 1]], axis=0)
                of_rank += int(max(1, len(rows)) * longest.sum())
            padded.append(of_rank)
    ranks = np.array(padded).reshape(-1, RANKS)
    chosen = micro_batches(found, "random")
    real = (encoder + decoder)[chosen].sum() / ranks.sum()
    return float(real), float((ranks.max(1) / ranks.mean(1)).mean())


# ---------------------------------------------------------------- time


def small_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))


def seconds(model: T5ForConditionalGeneration, found: Lengths, order: str, first: int | None = None) -> float:
    """Of a micro-batch, forward and backward, on the mean over an epoch or its ``first`` ones."""
    numbers = micro_batches(found, order).reshape(-1, CHUNK)[:first]
    started = time.perf_counter()
    for chosen in numbers:
        lengths = torch.from_numpy(found.encoder[chosen] // 4 + 1)
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        answers = torch.from_numpy(found.decoder[chosen] // 4 + 1)
        labels = torch.where(torch.arange(int(answers.max())) < answers[:, None], 5, -100)
        model(input_ids=mask * 7, attention_mask=mask, labels=labels).loss.backward()
        model.zero_grad()
    return (time.perf_counter() - started) / len(numbers)


def main() -> None:
    torch.set_num_threads(1)
    arguments = parse_arguments(sys.argv[1:])
    for corpus, found in corpora(int(arguments.get("samples", "48000"))).items():
        print(f"{corpus}\n  {'':18}real tokens   longest rank / mean")
        for name, order in ORDERS.items():
            real, longest = shares(found, order)
            print(f"  {name:18}{real:11.3f}{longest:22.3f}", flush=True)
        real, longest = packed_shares(found)
        print(f"  {'random, packed':18}{real:11.3f}{longest:22.3f}", flush=True)
    found = corpora(int(arguments.get("timed", "480")))["questions and answers"]
    model = small_t5()
    seconds(model, found, "random", first=8)  # warm-up
    times = {name: seconds(model, found, order) for name, order in ORDERS.items()}
    print("time of a micro-batch of a small T5")
    for name, spent in times.items():
        print(f"  {name:18}{1000 * spent:8.0f} ms, {spent / times['ours']:.2f} times ours")


if __name__ == "__main__":
    main()
