"""One rank of test_sharded: three steps and a generation under ZeRO-3, next to the same model in one process."""

from __future__ import annotations

import sys

import deepspeed
import torch
import torch.distributed as dist
from tiny import BATCH, FAMILIES, TOWER, open_gates, ragged

from hpc_mm.config import Flamingo, Language, Vision
from hpc_mm.models import token_head
from hpc_mm.models.flamingo import FlamingoModel, build, load_tokenizer

EVERYTHING = ("vision", "language", "resampler", "cross_attention", "new_tokens")


def small(family: str, tokenizer_file: str) -> FlamingoModel:
    language = Language(tokenizer=tokenizer_file, architecture=FAMILIES[family])
    sizes = {"resampler_depth": 2, "resampler_latents": 4, "cross_attn_every_n_layers": 2}
    config = Flamingo(vision=Vision(architecture=TOWER), language=language, trainable=EVERYTHING, **sizes)
    model = build(config, load_tokenizer(language), seed=0)
    open_gates(model)
    return model


def shares() -> list[BATCH]:
    """Two rows with images for one rank, two without for the other."""
    ids, mask, images, counts = ragged(left=False)
    one = (ids[:2], mask[:2], images[:3], counts[:2])
    two = (ids[2:3].repeat(2, 1), mask[2:3].repeat(2, 1), images[:0], counts[2:3].repeat(2))
    return [one, two]


def loss_of(model: torch.nn.Module, batch: BATCH) -> torch.Tensor:
    """Of rows with images every token's mean loss, of others that of a quarter as many tokens: the ranks' parts of
    logits differ in number."""
    ids, counts = batch[0], batch[3]
    positions = torch.ones_like(ids, dtype=torch.bool)
    positions[counts == 0, 3:] = False
    positions[:, -1] = False
    total = model(*batch, positions=positions, targets=ids.roll(-1, dims=1)[positions])
    return total / positions.sum()


def main(family: str, tokenizer_file: str) -> None:
    token_head.LOGITS = 300  # four rows of logits at a time
    deepspeed.init_distributed("gloo")
    whole, sharded = small(family, tokenizer_file), small(family, tokenizer_file)
    alone = torch.optim.AdamW(whole.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(
        model=sharded,
        optimizer=torch.optim.AdamW(sharded.parameters(), lr=1e-2),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 3},
            "gradient_clipping": 0.0,  # DeepSpeed clips unless told not to
            "zero_allow_untrusted_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    for _ in range(3):
        loss = loss_of(engine, shares()[dist.get_rank()])
        engine.backward(loss)
        engine.step()
        expected = (loss_of(whole, shares()[0]) + loss_of(whole, shares()[1])) / 2
        expected.backward()
        alone.step()
        alone.zero_grad()
        mean = loss.detach() / 2
        dist.all_reduce(mean)
        torch.testing.assert_close(mean, expected.detach(), atol=1e-4, rtol=0)
    ids, mask, images, counts = ragged(left=True)
    how = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    engine.eval()
    found = engine.module.generate(ids, mask, images, counts, **how)
    assert torch.equal(found, whole.eval().generate(ids, mask, images, counts, **how))
    print("equal tokens")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
