"""Flickr30k captions of A. Karpathy's test split (1,000 images), by CIDEr.

    python eval/flickr30k.py checkpoint=runs/omnicorpus data=s3://benchmarks/flickr30k shots=0,4,8 seeds=42,43 tasks=8

Demonstrations come from its train split (29,000 images). ``data`` is what data_prep/flickr30k.py wrote. Protocol of
OpenFlamingo (arXiv 2308.01390): 3 beams, 20 tokens.
"""

import sys

from hpc_mm.benchmark import CAPTION, Benchmark
from hpc_mm.evaluate import main

BENCHMARK = Benchmark(
    name="flickr30k",
    kind="caption",
    split="test",
    prompt=CAPTION,
    metric="cider",
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
