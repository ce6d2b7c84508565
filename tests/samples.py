"""What data tests start from: pictures, samples and a small tokenizer."""

import io
import random
from typing import Any

import numpy as np
from PIL import Image as Picture
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hpc_mm.config import ENDOFCHUNK_TOKEN, IMAGE_TOKEN, PAD_TOKEN, ImageSpec
from hpc_mm.data.schema import Image, Sample, Text

SPEC = ImageSpec(size=16, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
WORDS = ["a", "red", "green", "blue", "large", "small", "circle", "square", "star", "left", "right", "of", "the"]


def picture(seed: int, width: int = 40, height: int = 30) -> Picture.Image:
    """Smooth colours that differ everywhere and from seed to seed."""
    draw = np.random.default_rng(seed)
    coarse = Picture.fromarray(draw.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return coarse.resize((width, height), Picture.Resampling.BICUBIC)


def encoded(image: Picture.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def repeating_scans(times: int) -> bytes:
    """A JPEG that a decoder reads to its end, with so many scans more than it needs."""
    data = encoded(picture(3, 400, 300), "JPEG", progressive=True)
    return data[:-2] + data[data.rfind(b"\xff\xda") : -2] * times + data[-2:]


def sentence(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(3, 8)))


def pair(number: int) -> Sample:
    draw = random.Random(number)
    return Sample(f"pair{number:05d}", (Image(encoded(picture(number))), Text(sentence(draw))))


def document(number: int, images: int = 3) -> Sample:
    """A sentence, then ``images`` times an image and a sentence."""
    draw = random.Random(number)
    parts: list[Any] = [Text(sentence(draw))]
    for place in range(images):
        parts += [Image(encoded(picture(1000 * number + place))), Text(sentence(draw))]
    return Sample(f"document{number:05d}", tuple(parts))


def tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words with the special tokens of training."""
    model = Tokenizer(models.WordLevel(unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<s>", "</s>", ENDOFCHUNK_TOKEN, IMAGE_TOKEN, PAD_TOKEN]
    model.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        unk_token="<unk>",
        eos_token="</s>",
        pad_token=PAD_TOKEN,
        additional_special_tokens=[ENDOFCHUNK_TOKEN, IMAGE_TOKEN],
    )


def word_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer([" ".join(WORDS)])
