"""CLIP-FlanT5 at toy size on two CPU cores, second stage: projector and T5 learn to answer questions about shapes."""

from hpc_mm.config import Run, Source, Train
from hpc_mm.recipes.clip_flant5_toy_stage1 import clip_flant5_toy_stage1


def clip_flant5_toy_stage2() -> Run:
    first = clip_flant5_toy_stage1()
    return Run(
        name="clip_flant5_toy_stage2",
        start="clip_flant5_toy_stage1",
        model=first.model.model_copy(update={"trainable": ("projector", "language")}),
        sources={
            "questions": Source(
                data="shapes/train-chats",
                form="chat",
                template="t5_v1",
                batch=64,
                max_tokens=128,
                max_images=1,
            )
        },
        train=Train(
            steps=450,
            learning_rate=1e-3,
            schedule="cosine",
            warmup=50,
            betas=(0.9, 0.98),
            weight_decay=0.0,
            save_every=90,
        ),
        loader=first.loader,
        strategy="zero3",
        precision=first.precision,
        nodes=first.nodes,
        gpus_per_node=first.gpus_per_node,
        slurm=first.slurm,
    )
