from setuptools import find_packages, setup

TRAIN = [
    "torch>=2.6",
    "torchvision",  # open_clip's
    "open_clip_torch>=2.30",  # vision towers
    "transformers>=5.4",  # language models and tokenizers
    "accelerate>=1.5",
    "deepspeed>=0.19",  # from here on it skips a step whose gradient is not finite
    "ninja",  # DeepSpeed compiles its host operations with it
    "peft>=0.17",  # LoRA
    "safetensors>=0.4",
    "wandb",
]
EVAL = [
    "nltk>=3.9",  # OK-VQA's stems, as OpenFlamingo makes them
    "inflection>=0.5.1",  # likewise
]
DEV = [
    "hypothesis",
    "mypy>=1.15",
    "pytest>=8",
    "pytest-xdist>=3.8",
    "ruff>=0.9",
    "types-PyYAML",
    "boto3-stubs[s3]",
    "scipy-stubs",
    "scikit-learn",  # what our ROC-AUC is compared with
    "awscli",  # an S3 client of other people's
    "imagehash",  # oracle of our perceptual hashes
    "webdataset",  # our shards must be readable by it
    "pycocoevalcap",  # oracle of our caption metrics (needs Java)
    "einops",  # open_flamingo's (itself installed without its outdated dependencies)
    "einops-exts",
]

setup(
    name="hpc_mm",
    version="0.1.0",
    description="Slurm-native multimodal training: from URLs to benchmark scores",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["hpc_mm", "hpc_mm.*"]),
    package_data={"hpc_mm": ["py.typed"]},
    install_requires=[
        "aiohttp>=3.14",  # downloads
        "boto3>=1.35",  # S3 and Ceph
        "matplotlib>=3.9",
        "numpy>=2",
        "pillow>=11",
        "protego>=0.7",  # robots.txt by RFC 9309
        "pyarrow>=17",  # parquet corpora
        "pydantic>=2.9",
        "pyyaml>=6",
        "rich>=13",
        "scipy>=1.13",  # one-to-one assignment of images to sentences
        "submitit>=1.5",
    ],
    extras_require={"train": TRAIN, "eval": EVAL, "dev": DEV, "all": TRAIN + EVAL + DEV},
    entry_points={"console_scripts": ["hpc-mm = hpc_mm.__main__:main"]},
)
