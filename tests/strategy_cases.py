"""What strategies are tried on: small models of both families, and the uneven batches of two ranks, or of one alone."""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import chat_samples
import judges
import samples
from tokenizers import Tokenizer, models, pre_tokenizers

from hpc_mm.config import ImageSpec, Language, Run, Source, with_overrides
from hpc_mm.data.batch import Batch, Row, collate, to_row, vocabulary
from hpc_mm.data.chat import chat_row, collate_chats
from hpc_mm.families import family_of
from hpc_mm.recipes.clip_flant5_toy_stage2 import clip_flant5_toy_stage2
from hpc_mm.recipes.toy import toy
from hpc_mm.train import MicroBatch

BAD_STEP, SAVED_STEP, LAST_STEP = 2, 4, 6
Rows = tuple[tuple[int, ...], ...]  # images of the samples that share a row; () is a source without a row
SHARES: tuple[tuple[dict[str, Rows], ...], ...] = (  # of rank, then micro-step
    ({"documents": ((2, 0), (3,), (1,)), "pairs": ((1,), (1,), (1,))}, {"documents": ((0,), (2,)), "pairs": ()}),
    ({"documents": ((0,),), "pairs": ()}, {"documents": (), "pairs": ()}),
)
FLAMINGO = {
    "model.vision.architecture": '{"image_size": 16, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16}',
    "model.language.architecture": '{"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, '
    '"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "tie_word_embeddings": true}',
    "model.cross_attn_every_n_layers": "2",
    "model.resampler_latents": "4",
    "model.trainable": "language,resampler,cross_attention,new_tokens",
    "sources.documents.min_images": "0",
}
CLIP_FLANT5 = {
    **judges.SMALLER,
    "sources.questions.max_images": "3",
    "model.language.architecture.initializer_factor": "1.0",
    "model.vision.architecture": '{"image_size": 32, "patch_size": 16, "layers": 3, "width": 32, "head_width": 16}',
}


@dataclass(frozen=True)
class Case:
    """A small model, and how its family reads samples."""

    recipe: Callable[[], Run]
    values: dict[str, str]
    source: str  # whose rules all rows are made by
    words: tuple[str, ...]  # its tokenizer's first ones
    row: Callable[[int, int, Source, Any, ImageSpec], Row]  # of a number and so many images
    collated: Callable[[Sequence[Sequence[Row]], Any, ImageSpec], Batch]  # of the rows that share a row each
    closed: str  # ends the names of parameters that are 0 at first, behind which others would not learn


def document(number: int, images: int, source: Source, tokenizer: Any, spec: ImageSpec) -> Row:
    return to_row(samples.document(number, images), source, tokenizer, spec, 0, 0)


def documents(rows: Sequence[Sequence[Row]], tokenizer: Any, spec: ImageSpec) -> Batch:
    return collate(rows, vocabulary(tokenizer).pad, spec)


def chat(number: int, images: int, source: Source, tokenizer: Any, spec: ImageSpec) -> Row:
    return chat_row(chat_samples.chat(number, images=images), source, tokenizer, spec, 0, 0)


def chats(rows: Sequence[Sequence[Row]], tokenizer: Any, spec: ImageSpec) -> Batch:
    return collate_chats(rows, spec)


def clip_flant5(**values: str) -> Case:
    words = ("<PAD>", "</s>", "<unk>", *judges.ASKED.split())
    return Case(
        clip_flant5_toy_stage2, {**CLIP_FLANT5, **values}, "questions", words, chat, chats, ".lora_B.default.weight"
    )


# The special tokens of training are not among flamingo's words, so that their rows are new.
CASES = {
    "flamingo": Case(toy, FLAMINGO, "documents", ("</s>", "<unk>"), document, documents, "_gate"),
    "stage1": clip_flant5(**{"model.trainable": "projector"}),
    "stage2": clip_flant5(),
    "lora": clip_flant5(
        **{
            "model.lora.rank": "4",
            "model.lora.dropout": "0",
            "model.gradient_checkpointing": "true",
            "model.language.architecture.num_decoder_layers": "1",
            "model.language.architecture.tie_word_embeddings": "true",
        }
    ),
}


def run_of(case: str, strategy: str, precision: str, ranks: int = 2) -> Run:
    values = {"strategy": strategy, "precision": precision, "nodes": str(ranks), "train.accumulate": "2"}
    return with_overrides(CASES[case].recipe(), {**CASES[case].values, **values})  # type: ignore[no-any-return]


def tokenizer_of(case: str, run: Run) -> Any:
    """Of whole words."""
    words = dict.fromkeys([*CASES[case].words, *samples.WORDS])
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/tokenizer.json"
        tokenizer.save(file)
        return family_of(run).load_tokenizer(Language(tokenizer=file))


def model_of(case: str, run: Run, tokenizer: Any) -> Any:
    model = family_of(run).build(run.model, tokenizer, seed=0, precision=run.precision)
    for name, parameter in model.named_parameters():
        if name.endswith(CASES[case].closed):
            parameter.data.fill_(0.5 if parameter.ndim < 2 else 0.05)
    return model


def share(case: str, run: Run, tokenizer: Any, spec: ImageSpec, number: int, micro: int, ranks: range) -> MicroBatch:
    """What a process that stands for these ranks gets in a micro-step of optimizer step ``number``."""
    made, source = CASES[case], run.sources[CASES[case].source]
    batches: dict[str, Any] = {}
    for name in SHARES[0][micro]:
        rows = []
        for rank in ranks:
            numbers = count(10_000 * number + 1000 * micro + 100 * rank + 10 * (name == "pairs"))
            for together in SHARES[rank][micro][name]:
                rows.append([made.row(next(numbers), images, source, tokenizer, spec) for images in together])
        batches[name] = made.collated(rows, tokenizer, spec).to("cpu")
    if (number, micro) == (BAD_STEP, 0) and 0 in ranks:
        batches["documents"].images[0] = math.nan
    return batches
