"""The whole main job in minutes on two CPU cores: small random towers, all of them trained, on the shapes corpus."""

from hpc_mm.config import Flamingo, Language, Loader, Run, Slurm, Source, Train, Vision


def toy() -> Run:
    return Run(
        name="toy",
        model=Flamingo(
            vision=Vision(
                architecture={"image_size": 64, "patch_size": 16, "layers": 3, "width": 128, "head_width": 32},
                tokens="after_ln_post",
            ),
            language=Language(
                tokenizer="store:shapes/tokenizer.json",
                architecture={
                    "model_type": "llama",
                    "hidden_size": 128,
                    "intermediate_size": 384,
                    "num_hidden_layers": 3,
                    "num_attention_heads": 4,
                    "max_position_embeddings": 256,
                    "tie_word_embeddings": True,
                },
            ),
            resampler_depth=1,
            resampler_latents=8,
            trainable=("vision", "language", "resampler", "cross_attention", "new_tokens"),
        ),
        sources={
            "documents": Source(
                data="shapes/train-documents", form="interleaved", batch=4, max_tokens=96, max_images=4
            ),
            "pairs": Source(data="shapes/train-pairs", form="pairs", batch=24, max_tokens=32, max_images=1),
            "questions": Source(
                data="shapes/train-questions",
                form="interleaved",
                batch=6,
                weight=0.2,  # with more, captions learn late to look at images
                max_tokens=128,
                max_images=5,
            ),
        },
        train=Train(
            steps=600,
            learning_rate=2e-3,
            schedule="cosine",
            warmup=40,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            save_every=150,
        ),
        loader=Loader(workers=0),
        strategy="zero2",
        precision="fp32",  # a CPU without bf16 units is three times slower in bf16
        nodes=2,
        gpus_per_node=0,
        slurm=Slurm(time="30:00", cpus_per_task=1, memory="4G"),
    )
