"""A very small CLIP-FlanT5 whose scores depend on images and texts, as a run folder, and pictures and texts for it."""

import random
from pathlib import Path

import samples
from tokenizers import Tokenizer, models, pre_tokenizers

from hpc_mm.config import PAD_TOKEN, Run, with_overrides
from hpc_mm.recipes.clip_flant5_toy_stage2 import clip_flant5_toy_stage2

SIZE = 32  # pixels of the tower's pictures
ASKED = 'A chat between USER ASSISTANT : Does this figure show Please answer yes or no . ? " Yes No'
SMALLER = {
    "name": "judge",
    "start": "",
    "sources.questions.max_tokens": "96",
    "model.vision.architecture": '{"image_size": 32, "patch_size": 8, "layers": 3, "width": 32, "head_width": 16}',
    "model.language.architecture.d_model": "32",
    "model.language.architecture.d_kv": "8",
    "model.language.architecture.d_ff": "64",
    "model.language.architecture.num_layers": "2",
    "model.language.architecture.num_decoder_layers": "2",
    "model.language.architecture.num_heads": "4",
    "model.language.architecture.initializer_factor": "4.0",  # so that texts and images matter
}


def tokenizer_file(folder: Path) -> str:
    words = [PAD_TOKEN, "</s>", "<unk>", *samples.WORDS, *ASKED.split()]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([PAD_TOKEN, "</s>"])
    file = folder / "tokenizer.json"
    tokenizer.save(str(file))
    return str(file)


def run_of(folder: Path, **values: str) -> Run:
    tokenizer = {"model.language.tokenizer": tokenizer_file(folder)}
    return with_overrides(clip_flant5_toy_stage2(), {**SMALLER, **tokenizer, **values})  # type: ignore[no-any-return]


def write_run(folder: Path, **values: str) -> Path:
    """Without a checkpoint: to be judged by as step=0."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(run_of(folder, **values).model_dump_json())
    return folder


def images(count: int, width: int = SIZE, height: int = SIZE) -> list[bytes]:
    return [samples.encoded(samples.picture(number, width, height)) for number in range(count)]


def texts(count: int) -> list[str]:
    """Of one to twelve words, no two alike."""
    return [
        f"{samples.sentence(random.Random(number))} {' '.join(['of'] * (number % 5))}".strip()
        for number in range(count)
    ]
