"""A rank of test_strategies.py: uneven steps, one with a NaN on one rank, a checkpoint, and going on, with real parts.

accelerate launch ... tests/strategy_worker.py FOLDER STRATEGY PRECISION [FOLDER OF ANOTHER STRATEGY'S CHECKPOINT]
"""

import json
import math
import sys
import tempfile
from itertools import count
from pathlib import Path
from typing import Any

import samples
import torch
from samples import SPEC
from tokenizers import Tokenizer, models, pre_tokenizers

from hpc_mm import checkpoint, sharding
from hpc_mm.config import Language, Run, with_overrides
from hpc_mm.data.batch import Row, collate, to_row, vocabulary
from hpc_mm.families import family_of
from hpc_mm.models import token_head
from hpc_mm.models.flamingo import FlamingoModel, build, load_tokenizer
from hpc_mm.optimizer import parameter_groups
from hpc_mm.recipes.toy import toy
from hpc_mm.train import MicroBatch, Objective

BAD_STEP, SAVED_STEP, LAST_STEP = 2, 4, 6
TINY = {
    "model.vision.architecture": '{"image_size": 16, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16}',
    "model.language.architecture": '{"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, '
    '"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "tie_word_embeddings": true}',
    "model.cross_attn_every_n_layers": "2",
    "model.resampler_latents": "4",
    "model.trainable": "language,resampler,cross_attention,new_tokens",
    "sources.documents.min_images": "0",
    "train.accumulate": "2",
}
Rows = tuple[tuple[int, ...], ...]  # images of the samples that share a row; () is a source without a row
SHARES: tuple[tuple[dict[str, Rows], ...], ...] = (  # of rank, then micro-step
    ({"documents": ((2, 0), (3,), (1,)), "pairs": ((1,), (1,), (1,))}, {"documents": ((0,), (2,)), "pairs": ()}),
    ({"documents": ((0,),), "pairs": ()}, {"documents": (), "pairs": ()}),
)


def tiny_run(strategy: str, precision: str) -> Run:
    return with_overrides(toy(), {**TINY, "strategy": strategy, "precision": precision})


def tiny_tokenizer() -> Any:
    """Whole words, without the special tokens of training, so that their rows are new."""
    words = {word: number for number, word in enumerate(["</s>", "<unk>", *samples.WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/tokenizer.json"
        tokenizer.save(file)
        return load_tokenizer(Language(tokenizer=file))


def tiny_model(run: Run, tokenizer: Any) -> FlamingoModel:
    model = build(run.model, tokenizer, seed=0, precision=run.precision)
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            parameter.data.fill_(0.5)  # closed, images would not matter
    return model


def share(run: Run, tokenizer: Any, number: int, micro: int, rank: int) -> MicroBatch:
    """What a rank gets in a micro-step of optimizer step ``number``."""
    numbers = count(1000 * number + 100 * micro + 10 * rank)

    def row(images: int) -> Row:
        return to_row(samples.document(next(numbers), images), run.sources["documents"], tokenizer, SPEC, 0, 0)

    batches = {}
    for name, rows in SHARES[rank][micro].items():
        made = [[row(images) for images in together] for together in rows]
        batches[name] = collate(made, vocabulary(tokenizer).pad, SPEC).to("cpu")
    if (number, micro, rank) == (BAD_STEP, 0, 0):
        batches["documents"].images[0] = math.nan
    return batches


class Rank:
    """This process: the tiny model on a strategy."""

    def __init__(self, run: Run) -> None:
        self.run, self.tokenizer = run, tiny_tokenizer()
        model = tiny_model(run, self.tokenizer)  # before accelerate, as in Training
        self.accelerator = sharding.make_accelerator(run)
        # Such an epsilon keeps the rounding of small gradients from deciding the sign of a whole update.
        optimizer = torch.optim.AdamW(parameter_groups(model, run.train), lr=5e-3, eps=1e-2, fused=True)
        objective, optimizer = self.accelerator.prepare(Objective(model, family_of(run)), optimizer)
        objective.train()
        self.parts = (self.accelerator, objective, optimizer)

    def step(self, number: int) -> list[float]:
        """Loss over all ranks and gradient norm of optimizer step ``number``."""
        accelerator, objective, optimizer = self.parts
        total = torch.zeros(())
        for micro in range(2):
            batches = share(self.run, self.tokenizer, number, micro, accelerator.process_index)
            with accelerator.accumulate(objective):
                loss = objective(batches).sum()
                accelerator.backward(loss * accelerator.num_processes * 2 / 100)  # about the targets of a step
            total += loss.detach()
        norm = sharding.update(accelerator, objective, optimizer, clip=1.0)
        return [float(accelerator.reduce(total, "sum")), norm]

    def go_on(self, folder: Path) -> list[list[float]]:
        """Losses and norms from the newest checkpoint of ``folder`` on."""
        found = checkpoint.find(self.accelerator, folder)
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        checkpoint.load(sharding.held(*self.parts), found, rank, ranks)
        progress = checkpoint.read_progress(found)
        sharding.restored(*self.parts, progress["updates"])
        return [self.step(number) for number in range(progress["step"], LAST_STEP)]


def main(folder: Path, strategy: str, precision: str, other: str = "") -> None:
    rank = Rank(tiny_run(strategy, precision))
    token_head.LOGITS = 5 * len(rank.tokenizer)  # so many rows of logits at a time: ranks make unequal numbers of parts
    saver = checkpoint.Saver(rank.accelerator, folder, keep=1)
    found = []
    for number in range(LAST_STEP):
        if number == SAVED_STEP:
            updates = sum(math.isfinite(norm) for _, norm in found)
            saver.start(sharding.own(*rank.parts), {"step": number, "updates": updates})
        found.append(rank.step(number))
    _, problem, _ = saver.finish()
    assert problem is None
    result = {"steps": found, "again": rank.go_on(folder), "from other": rank.go_on(Path(other)) if other else None}
    (folder / f"rank{rank.accelerator.process_index}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
