"""ImageNet-1k (validation: 50,000 images), by accuracy of the likeliest of all class names.

    python eval/imagenet.py checkpoint=runs/omnicorpus data=s3://benchmarks/imagenet shots=0,4,8 samples=5000 tasks=8

Demonstrations come from train. ``data`` is what data_prep/imagenet.py wrote; the classes are those of its train split.
Protocol of OpenFlamingo (arXiv 2308.01390) without ensembles of prompts: the class whose name has the highest mean
log-probability is the answer.
"""

import sys

from hpc_mm.benchmark import IMAGENET, Benchmark
from hpc_mm.evaluate import main

BENCHMARK = Benchmark(
    name="imagenet",
    kind="classes",
    split="val",
    prompt=IMAGENET,
    metric="accuracy",
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
