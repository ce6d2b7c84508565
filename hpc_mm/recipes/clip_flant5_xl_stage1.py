"""CLIP-FlanT5-XL, first stage: the projector learns to caption LLaVA's 558,128 images (arXiv 2404.01291; 8 GPUs)."""

from hpc_mm.config import ClipFlanT5, Language, Run, Slurm, Source, Train, Vision


def clip_flant5_xl_stage1() -> Run:
    return Run(
        name="clip_flant5_xl_stage1",
        model=ClipFlanT5(
            vision=Vision(name="ViT-L-14-336-quickgelu", pretrained="openai", tokens="penultimate"),
            language=Language(name="google/flan-t5-xl"),
            square="crop",
            trainable=("projector",),
            gradient_checkpointing=True,
        ),
        sources={
            "captions": Source(
                data="llava",
                form="chat",
                template="t5_plain_split_text",
                batch=256,
                max_tokens=2048,
                max_images=1,
            )
        },
        train=Train(
            steps=2181,  # one epoch
            learning_rate=1e-2,
            schedule="cosine",
            warmup=66,
            weight_decay=0.0,
            clip=0.0,  # as the published runs in effect had it: their DeepSpeed settings say nothing of clipping
            save_every=200,
        ),
        strategy="zero2",
        precision="bf16",
        nodes=1,
        gpus_per_node=8,
        slurm=Slurm(cpus_per_task=64, memory="0"),  # a whole node
    )
