"""Samples per second of a training step on the CPU, beside open_flamingo 2.0.1 with its own loop's maths.

    python benchmarks/training_step.py [size=tiny]

Both have the same weights (fp32) and the same documents of two images, and both learn: after every round their losses
must agree. Each step is collating, forward, loss, backward, clipping and AdamW, taken in turn in one process. What
differs: open_flamingo encodes six images per document, of which four are zeros, pads text to 256 tokens, makes logits
for every token, and takes torch's default AdamW. Ours pads to the batch's longest text, or packs several documents
into a row (pack_tokens), and takes the fused AdamW.
"""

import statistics
import sys
import time

import torch
from peer import MAX_TOKENS, Ours, Theirs, documents, flamingo, reference

from hpc_mm.config import parse_arguments
from hpc_mm.data.batch import Batch, Row
from hpc_mm.data.packing import packed
from hpc_mm.models.flamingo import build, load_tokenizer
from hpc_mm.models.openflamingo_weights import load_openflamingo

# A ViT-B/32 and a llama of 100 million parameters.
TOWER = {"image_size": 224, "patch_size": 32, "layers": 12, "width": 768, "head_width": 64}
LLAMA = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12}
TINY_TOWER = {"image_size": 32, "patch_size": 16, "layers": 2, "width": 64, "head_width": 16}
TINY_LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
DOCUMENTS = 8  # per step
PACK_TOKENS = 1024  # of a row of several documents
CASES = {"short texts": (90, 5), "every text longer than 256 tokens": (1e6, 3)}  # median length, and rounds
TOLERANCE = 2e-3  # of the loss, relative; the optimizer makes rounding errors grow


class Packed(Ours):
    """Ours as pack_tokens has it."""

    name = "hpc_mm, packed"

    def batch(self, rows: list[list[Row]]) -> Batch:
        return super().batch(packed([row for (row,) in rows], PACK_TOKENS, PACK_TOKENS))


def timed(side: Ours | Theirs, rows: list[Row]) -> tuple[float, float]:
    """Seconds and loss of one step."""
    started = time.perf_counter()
    loss = side.step(side.batch([[row] for row in rows])).item()
    return time.perf_counter() - started, loss


def compare(sides: list, tokenizer, size: int, case: str, median: float, count: int) -> None:
    rounds, lengths = [], []
    for number in range(count):
        rows = documents(DOCUMENTS, tokenizer, size, seed=number, median=median)
        lengths += [len(row.input_ids) for row in rows]
        rounds.append([timed(side, rows) for side in sides])
        *our_losses, their_loss = (loss for _, loss in rounds[-1])
        if any(abs(loss - their_loss) > TOLERANCE * their_loss for loss in our_losses):
            sys.exit(f"losses differ in round {number}: ours {our_losses}, open_flamingo's {their_loss:.5f}")
    print(f"{case}: {DOCUMENTS} per step, mean {statistics.mean(lengths):.0f} of {MAX_TOKENS} tokens, 2 of 6 images")
    for side, times in zip(sides, zip(*rounds, strict=True), strict=True):
        ratios = [theirs / ours for (ours, _), (theirs, _) in zip(times, (steps[-1] for steps in rounds), strict=True)]
        rate = DOCUMENTS / statistics.median(seconds for seconds, _ in times)
        losses = " ".join(f"{loss:.4f}" for _, loss in times)
        print(f"  {side.name:14} {rate:6.2f} samples/s, {statistics.median(ratios):.2f} times; losses {losses}")


def main() -> None:
    tiny = parse_arguments(sys.argv[1:]).get("size") == "tiny"
    torch.manual_seed(0)
    tower, llama, words = (TINY_TOWER, TINY_LLAMA, 200) if tiny else (TOWER, LLAMA, 32000)
    config = flamingo(tower, {"model_type": "llama", **llama}, words, every=2)
    tokenizer = load_tokenizer(config.language)
    theirs = reference(config)
    sides: list[Ours | Theirs] = []
    for kind in (Ours, Packed):
        ours = build(config, tokenizer, seed=0)
        load_openflamingo(ours, theirs.state_dict())
        sides.append(kind(ours))
    sides.append(Theirs(theirs, tokenizer, ours.image_spec))
    for side in sides:  # the first step makes the optimizer's state
        timed(side, documents(1, tokenizer, ours.image_spec.size, seed=100))
    for case, (median, count) in CASES.items():
        compare(sides, tokenizer, ours.image_spec.size, case, median, count)


if __name__ == "__main__":
    main()
