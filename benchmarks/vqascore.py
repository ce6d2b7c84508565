"""VQAScore pairs per second beside a loop over pairs, each of which encodes its image again, on the same weights.

    python benchmarks/vqascore.py [size=small|eighth|xl|tiny] [device=cpu|cuda] [precision=fp32|bf16]

Four texts of 5 to 20 words per image. The loop is what t2v_metrics does since September 2024 (its score.py), with our
modules: for each pair the image is decoded and encoded, the question is tokenised, and the model reads it alone. Both
run in this process and must give the same scores; images are of the tower's size, so that reading them costs next to
nothing.

``small``: 16 patches, matrices so small that a single pair keeps a CPU core badly busy; 17 % of a pair's operations are
the tower's. ``eighth``: an eighth of the widths and depths of CLIP-FlanT5-XL with all its 576 patches. There, on a CPU,
we are 1.2 to 1.3 times as fast as the loop: the encoder, which reads every pair on either side, takes most of the time.
Neither tells the ratio on a GPU, which ``xl``, CLIP-FlanT5-XL with random weights, measures.
"""

import io
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image as Picture
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode

from hpc_mm.config import ClipFlanT5, Language, Vision, parse_arguments, unknown
from hpc_mm.data.batch import normalised
from hpc_mm.data.images import decode
from hpc_mm.models.clip_flant5 import build, load_tokenizer
from hpc_mm.vqascore import VqaScorer

WORDS = 2000
TEXTS = 4  # of each image
ROUNDS = 3  # of each side in turn, of which the fastest counts
APART = {"fp32": 1e-4, "bf16": 0.1}  # that scores may be, relative
DEVICES = ("cpu", "cuda")
SIZES = {  # size: tower, T5, images
    "tiny": ((16, 8, 2, 16), (16, 8, 32, 1, 2), 2),
    "small": ((64, 16, 4, 160), (128, 32, 320, 3, 4), 64),
    "eighth": ((336, 14, 4, 160), (256, 64, 640, 3, 4), 12),
    "xl": ((336, 14, 24, 1024), (2048, 64, 5120, 24, 32), 64),
}


def model_of(size: str) -> tuple[ClipFlanT5, int]:
    (pixels, patch, layers, width), (d_model, d_kv, d_ff, depth, heads), images = SIZES[size]
    tokenizer = Tokenizer(models.WordLevel({"<PAD>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, WORDS)}}, "w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    file = Path(tempfile.mkdtemp(prefix="hpc_mm-")) / "tokenizer.json"
    tokenizer.save(str(file))
    tower = {
        "image_size": pixels,
        "patch_size": patch,
        "layers": layers,
        "width": width,
        "head_width": 64 if width > 160 else width // 2,
    }
    t5 = {"model_type": "t5", "d_model": d_model, "d_kv": d_kv, "d_ff": d_ff, "num_layers": depth, "num_heads": heads}
    t5 |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    language = Language(tokenizer=str(file), architecture=t5)
    return ClipFlanT5(vision=Vision(architecture=tower, tokens="penultimate"), language=language), images


def asked(count: int, pixels: int) -> tuple[list[bytes], list[str], list[tuple[int, int]]]:
    """Images, texts, and each image's pairs with four texts of its own."""
    draw, images = np.random.default_rng(0), []
    for _ in range(count):
        file = io.BytesIO()
        coarse = Picture.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((pixels, pixels), Picture.Resampling.BICUBIC).save(file, "PNG")
        images.append(file.getvalue())
    lengths = draw.integers(5, 21, TEXTS * count)
    texts = [" ".join(f"w{word}" for word in draw.integers(3, WORDS, length)) for length in lengths]
    return images, texts, [(place // TEXTS, place) for place in range(TEXTS * count)]


@torch.no_grad()
def pair_by_pair(scorer: VqaScorer, image: bytes, text: str) -> float:
    model, answer = scorer.model, scorer.answer[None]
    pixels = normalised([decode(image, model.image_spec)], model.image_spec).to(scorer.device)
    ids, answer = torch.from_numpy(scorer.prompt(text, "text"))[None].to(scorer.device), answer.to(scorer.device)
    counts = torch.ones(1, dtype=torch.int64, device=scorer.device)
    with torch.autocast(scorer.device.type, torch.bfloat16, enabled=scorer.half):
        logits = model.logits(ids, torch.ones_like(ids), model.encode(pixels), counts, answer)
    return float(torch.exp(-torch.nn.functional.cross_entropy(logits[0], answer[0])))


def tower_share(scorer: VqaScorer, image: bytes, text: str) -> float:
    """Of the operations of a pair."""
    with FlopCounterMode(display=False) as every:
        pair_by_pair(scorer, image, text)
    spec = scorer.model.image_spec
    half = torch.autocast(scorer.device.type, torch.bfloat16, enabled=scorer.half)
    with FlopCounterMode(display=False) as tower, torch.no_grad(), half:
        scorer.model.encode(normalised([decode(image, spec)], spec).to(scorer.device))
    return tower.get_total_flops() / every.get_total_flops()


def main() -> None:
    given = parse_arguments(sys.argv[1:])
    size, device = given.get("size", "small"), given.get("device", "cpu")
    precision = given.get("precision", "fp32" if device == "cpu" else "bf16")
    for key, value, known in (("size", size, SIZES), ("device", device, DEVICES), ("precision", precision, APART)):
        if value not in known:
            sys.exit(str(unknown(key, value, known)))
    if device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing was measured")
        return
    config, count = model_of(size)
    tokenizer = load_tokenizer(config.language)
    model = build(config, tokenizer, 0, precision)
    images, texts, pairs = asked(count, model.image_spec.size)
    warm = VqaScorer(model, tokenizer, device, precision=precision)  # whatever the first calls do
    warm.score(images[:1], texts[:2], [(0, 0), (0, 1)])
    pair_by_pair(warm, images[0], texts[0])
    ours = loop = float("inf")
    for _ in range(ROUNDS):
        scorer = VqaScorer(model, tokenizer, device, precision=precision)
        started = time.perf_counter()
        found = scorer.score(images, texts, pairs)
        ours = min(ours, time.perf_counter() - started)
        started = time.perf_counter()
        expected = np.array([pair_by_pair(scorer, images[image], texts[text]) for image, text in pairs])
        loop = min(loop, time.perf_counter() - started)
    apart = float(abs(found / expected - 1).max())
    if apart > APART[precision]:
        sys.exit(f"scores differ by up to {apart:.1e} of their value")
    share = tower_share(scorer, images[0], texts[0])
    print(f"{size}, {device}, {precision}: {len(images)} images with {TEXTS} texts each")
    print(f"  of a pair's operations {share:.0%} are the tower's")
    print(f"  hpc_mm        {len(pairs) / ours:8.1f} pairs/s, {loop / ours:.1f} times; scores equal to {apart:.0e}")
    print(f"  pair by pair  {len(pairs) / loop:8.1f} pairs/s")


if __name__ == "__main__":
    main()
