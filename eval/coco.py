"""COCO captions of A. Karpathy's test split (5,000 images), by CIDEr.

    python eval/coco.py checkpoint=runs/omnicorpus data=s3://benchmarks/coco shots=0,4,8 seeds=42,43,44 tasks=8

Demonstrations come from its train split (82,783 images; restval is another split). ``data`` is what
data_prep/coco.py wrote. Protocol of OpenFlamingo (arXiv 2308.01390): 3 beams, 20 tokens.
"""

import sys

from hpc_mm.benchmark import CAPTION, Benchmark
from hpc_mm.evaluate import main

BENCHMARK = Benchmark(
    name="coco",
    kind="caption",
    split="test",
    prompt=CAPTION,
    metric="cider",
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
