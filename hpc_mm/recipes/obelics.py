"""Llama-3-8B with a cross-attention block every fourth layer on OBELICS and LAION pairs (8 x 8 GPUs)."""

from hpc_mm.config import Flamingo, Language, Run, Slurm, Source, Train, Vision


def obelics() -> Run:
    return Run(
        name="obelics",
        model=Flamingo(
            vision=Vision(name="ViT-L-14-quickgelu", pretrained="openai"),
            language=Language(name="meta-llama/Meta-Llama-3-8B"),
            cross_attn_every_n_layers=4,
        ),
        sources={
            "documents": Source(data="obelics", form="interleaved", batch=8192, max_tokens=256),
            "pairs": Source(data="laion", form="pairs", batch=8192, weight=0.2, max_tokens=32, max_images=1),
        },
        train=Train(
            steps=17_154,  # 140,529,700 documents, once
            learning_rate=1e-4,
            schedule="constant",
            warmup=1875,
            save_every=1000,
        ),
        strategy="zero2",
        precision="bf16",
        nodes=8,
        gpus_per_node=8,
        slurm=Slurm(cpus_per_task=64, memory="0"),  # whole nodes
    )
