"""Few-shot answers per second beside open_flamingo 2.0.1's own generation, on the same random weights and prompts.

    python benchmarks/evaluation.py [size=tiny]

Captioning with 3 beams and 20 new tokens, 4 and 32 shots, 20 tokens per demonstration. Shapes are those of
OpenFlamingo-3B (ViT-L/14 on 224 pixels, MPT-1B with cross-attention before every layer) with an eighth of every width
and depth. What open_flamingo fixes stays as it is: six layers and 64 latents of the resampler, and heads of 512 in all.
An image so costs about five times the text of a demonstration, where OpenFlamingo-3B's costs about twice. The language
model is a llama: that much open_flamingo 2.0.1 and today's transformers have in common.

Ours is asked as an evaluation asks it: demonstrations come from a query set, and 2,048 images per 5,000 questions, as
for COCO, are new among them; the others were encoded for earlier questions. open_flamingo's is the generation of its
eval/models/open_flamingo.py, which the package lacks, with its maths: prompts padded on the left to the longest, images
as (B, T, 1, 3, S, S), which its model repeats for each beam before it encodes them. It gets images decoded and
normalised, ours gets encoded bytes. Texts must be equal. Peak memory is that of a process of its own for each side,
above what it held before the first case.
"""

import io
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peer import flamingo, reference
from PIL import Image as Picture
from torch.nn import functional

from hpc_mm.answering import FlamingoAnswers
from hpc_mm.benchmark import Decoding
from hpc_mm.config import parse_arguments
from hpc_mm.data.batch import normalised
from hpc_mm.data.images import decode
from hpc_mm.data.schema import Image, Sample, Text
from hpc_mm.models.flamingo import build, load_tokenizer
from hpc_mm.models.openflamingo_weights import load_openflamingo

TOWER = {"image_size": 224, "patch_size": 14, "layers": 3, "width": 128, "head_width": 64}
LLAMA = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES = {"resampler_latents": 64}  # as open_flamingo fixes them
TINY_TOWER = {"image_size": 32, "patch_size": 16, "layers": 2, "width": 64, "head_width": 16}
TINY_LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = 8000
QUERY_SET = 36  # images; enough for 32 different ones
NEW = 2048 / 5000  # images of the query set that a question brings in, over an evaluation
CASES = {4: 6, 32: 2}  # shots: questions
DECODING = Decoding(max_new_tokens=20, beams=3, length_penalty=0.0)


def picture(draw: np.random.Generator, size: int) -> Image:
    """Of the tower's size, so that both sides see the same pixels."""
    file = io.BytesIO()
    coarse = Picture.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    coarse.resize((size, size), Picture.Resampling.BICUBIC).save(file, "PNG")
    return Image(file.getvalue())


def questions(shots: int, count: int, size: int) -> tuple[list[Sample], list[Image]]:
    """Prompts, and the images of their query set."""
    draw = np.random.default_rng(shots)
    known = [picture(draw, size) for _ in range(QUERY_SET)]
    lengths = draw.integers(10, 25, QUERY_SET)
    texts = [" Output: " + " ".join(f"w{word}" for word in draw.integers(1, WORDS, length)) for length in lengths]
    prompts = []
    for number in range(count):
        parts: list[Image | Text] = []
        for place in draw.choice(QUERY_SET, shots, replace=False):
            parts += [known[place], Text(f"{texts[place]}<|endofchunk|>")]
        prompts.append(Sample(f"q{number}", (*parts, picture(draw, size), Text(" Output:"))))
    return prompts, known


def models(tiny: bool) -> tuple[Any, Any, Any]:
    """Theirs, ours and the tokenizer. Logits are far enough apart to be equal on both sides, and never an image's."""
    torch.manual_seed(0)
    tower, llama, words = (TINY_TOWER, TINY_LLAMA, WORDS) if tiny else (TOWER, LLAMA, WORDS)
    config = flamingo(tower, {"model_type": "llama", **llama}, words, every=1, **SIZES)
    tokenizer = load_tokenizer(config.language)
    theirs = reference(config).eval()
    theirs.lang_encoder.lm_head.weight.data.mul_(10)
    theirs.lang_encoder.lm_head.weight.data[tokenizer.convert_tokens_to_ids("<image>")] = 0
    ours = build(config, tokenizer, seed=0).eval()
    load_openflamingo(ours, theirs.state_dict())
    return theirs, ours, tokenizer


def theirs_answer(model: Any, tokenizer: Any, prompts: list[Sample], spec: Any) -> tuple[float, list[str]]:
    """Seconds and texts of one batch."""
    images = torch.stack([normalised([decode(one.data, spec) for one in row.images], spec) for row in prompts])
    started = time.perf_counter()
    texts = ["".join(part.text if isinstance(part, Text) else "<image>" for part in row.parts) for row in prompts]
    encoded = tokenizer(texts, padding="longest", padding_side="left", return_tensors="pt")
    # One more token of padding: transformers takes away a mask of ones alone, which open_flamingo's forward needs.
    ids = functional.pad(encoded["input_ids"], (1, 0), value=tokenizer.pad_token_id)
    with torch.inference_mode():
        found = model.generate(
            images[:, :, None],
            ids,
            functional.pad(encoded["attention_mask"], (1, 0)),
            max_new_tokens=DECODING.max_new_tokens,
            num_beams=DECODING.beams,
            length_penalty=DECODING.length_penalty,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    written = tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)
    return time.perf_counter() - started, written


def ours_answer(answers: FlamingoAnswers, prompts: list[Sample], known: list[Image]) -> tuple[float, list[str]]:
    """Seconds and texts, when all of the query set but the share that questions bring in has been seen."""
    seen = known[round(NEW * len(prompts)) :]
    earlier = [Sample("earlier", (image, Text("w1"))) for image in seen]
    answers.generate(earlier, Decoding(max_new_tokens=1, beams=1))
    started = time.perf_counter()
    written = answers.generate(prompts, DECODING)
    return time.perf_counter() - started, written


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measured(side: str, tiny: bool) -> list[tuple[int, float, list[str], float]]:
    """Shots, seconds, texts and MiB above the models' of each case. Few shots first: the peak only grows."""
    theirs, ours, tokenizer = models(tiny)
    spec = ours.image_spec
    answer: Callable[[list[Sample], list[Image]], tuple[float, list[str]]]
    if side == "ours":
        answers = FlamingoAnswers(ours, tokenizer, "cpu", batch=max(CASES.values()))
        answer = lambda prompts, known: ours_answer(answers, prompts, known)  # noqa: E731
    else:
        answer = lambda prompts, known: theirs_answer(theirs, tokenizer, prompts, spec)  # noqa: E731
    answer(questions(1, 2, spec.size)[0], [])  # whatever the first call alone does
    before, found = peak(), []
    for shots, count in CASES.items():
        seconds, texts = answer(*questions(shots, 2 if tiny else count, spec.size))
        found.append((shots, seconds, texts, peak() - before))
    return found


def main() -> None:
    tiny = parse_arguments(sys.argv[1:]).get("size") == "tiny"
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        ours, theirs = (pool.apply(measured, (side, tiny)) for side in ("ours", "open_flamingo"))
    for (shots, seconds, texts, memory), (_, their_seconds, their_texts, their_memory) in zip(
        ours, theirs, strict=True
    ):
        if texts != their_texts:
            sys.exit(f"{shots} shots: texts differ: ours {texts}, open_flamingo's {their_texts}")
        count = len(texts)
        print(f"{shots} shots, {DECODING.beams} beams, {count} questions, equal texts")
        ratio = their_seconds / seconds
        print(f"  hpc_mm         {count / seconds:7.2f} questions/s, {ratio:.1f} times; {memory:,.0f} MiB")
        print(f"  open_flamingo  {count / their_seconds:7.2f} questions/s; {their_memory:,.0f} MiB")


if __name__ == "__main__":
    main()
