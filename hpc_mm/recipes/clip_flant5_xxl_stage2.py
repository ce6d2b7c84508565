"""CLIP-FlanT5-XXL, second stage: projector and FlanT5 learn LLaVA-1.5's instructions, single turns (8 GPUs)."""

from hpc_mm.config import ClipFlanT5, Language, Run, Slurm, Source, Train, Vision


def clip_flant5_xxl_stage2() -> Run:
    return Run(
        name="clip_flant5_xxl_stage2",
        start="clip_flant5_xxl_stage1",
        model=ClipFlanT5(
            vision=Vision(name="ViT-L-14-336-quickgelu", pretrained="openai", tokens="penultimate"),
            language=Language(name="google/flan-t5-xxl"),
            square="pad",
            trainable=("projector", "language"),
            gradient_checkpointing=True,
        ),
        sources={
            "instructions": Source(
                data="mix665k-flat",
                form="chat",
                template="t5_v1",
                order="length",
                batch=96,
                max_tokens=2048,
                max_images=1,
            )
        },
        train=Train(
            steps=36_000,  # about one epoch: the number of flattened samples, which was not published, divided by 96
            accumulate=2,
            learning_rate=2e-5,
            schedule="cosine",
            warmup=1080,
            weight_decay=0.0,
            clip=0.0,  # as the published runs in effect had it: their DeepSpeed settings say nothing of clipping
            save_every=500,
        ),
        strategy="zero3",
        precision="bf16",
        nodes=1,
        gpus_per_node=8,
        slurm=Slurm(cpus_per_task=64, memory="0"),  # a whole node
    )
