"""OpenFlamingo-3B as released: MMC4 by image-text similarity, and LAION pairs (8 x 8 GPUs)."""

from hpc_mm.config import Flamingo, Language, Run, Slurm, Source, Train, Vision


def mmc4() -> Run:
    return Run(
        name="mmc4",
        model=Flamingo(
            vision=Vision(name="ViT-L-14-quickgelu", pretrained="openai"),
            language=Language(name="anas-awadalla/mpt-1b-redpajama-200b"),
            cross_attn_every_n_layers=1,
        ),
        sources={
            # The 38 % with a single image are left out half of the time: of 2,560 documents about 2,070 are trained on,
            # for the published 2,048.
            "documents": Source(
                data="mmc4", form="interleaved", batch=2560, max_tokens=256, min_similarity=0.24, drop_single_image=0.5
            ),
            "pairs": Source(data="laion", form="pairs", batch=4096, weight=0.2, max_tokens=32, max_images=1),
        },
        train=Train(
            steps=29_297,  # 60M documents and 120M pairs
            learning_rate=1e-4,
            schedule="constant",
            warmup=1875,
            save_every=1000,
        ),
        strategy="ddp",
        precision="fp32",
        nodes=8,
        gpus_per_node=8,
        slurm=Slurm(cpus_per_task=64, memory="0"),  # whole nodes
    )
