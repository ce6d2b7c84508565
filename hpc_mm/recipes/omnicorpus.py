"""OpenFlamingo-3B on OmniCorpus-CC and LAION pairs, with the published values (8 x 8 GPUs)."""

from hpc_mm.config import Flamingo, Language, Run, Slurm, Source, Train, Vision


def omnicorpus() -> Run:
    return Run(
        name="omnicorpus",
        model=Flamingo(
            vision=Vision(name="ViT-L-14-quickgelu", pretrained="openai"),
            language=Language(name="anas-awadalla/mpt-1b-redpajama-200b"),
            cross_attn_every_n_layers=1,
        ),
        sources={
            "documents": Source(data="omnicorpus", form="interleaved", batch=512, max_tokens=1024),
            "pairs": Source(data="laion", form="pairs", batch=1024, weight=0.2, max_tokens=128, max_images=1),
        },
        train=Train(
            steps=1_757_812,  # 900M documents and 1.8B pairs
            learning_rate=1e-4,
            schedule="constant",
            warmup=1875,
            save_every=5000,
        ),
        strategy="zero1",
        precision="bf16",
        nodes=8,
        gpus_per_node=8,
        slurm=Slurm(cpus_per_task=64, memory="0"),  # whole nodes
    )
