"""CLIP-FlanT5 at toy size on two CPU cores, second stage: projector and T5 learn to answer questions about shapes."""

from hpc_mm.config import ClipFlanT5, Language, Loader, Run, Slurm, Source, Train, Vision


def clip_flant5_toy_stage2() -> Run:
    return Run(
        name="clip_flant5_toy_stage2",
        start="clip_flant5_toy_stage1",
        model=ClipFlanT5(
            vision=Vision(
                architecture={"image_size": 64, "patch_size": 16, "layers": 3, "width": 128, "head_width": 32},
                tokens="penultimate",
            ),
            language=Language(
                tokenizer="store:shapes/chat-tokenizer.json",
                architecture={
                    "model_type": "t5",
                    "d_model": 128,
                    "d_kv": 32,
                    "d_ff": 384,
                    "num_layers": 3,
                    "num_decoder_layers": 1,
                    "num_heads": 4,
                    "feed_forward_proj": "gated-gelu",
                    "tie_word_embeddings": False,
                },
            ),
            dropout=0.0,
            trainable=("projector", "language"),
        ),
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
        loader=Loader(workers=0),
        strategy="zero3",
        precision="fp32",  # a CPU without bf16 units is three times slower in bf16
        nodes=2,
        gpus_per_node=0,
        slurm=Slurm(time="30:00", cpus_per_task=1, memory="4G"),
    )
