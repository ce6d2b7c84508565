"""TextVQA (validation: 5,000 questions), by VQA accuracy.

    python eval/textvqa.py checkpoint=runs/omnicorpus data=s3://benchmarks/textvqa shots=0,4,8 seeds=42,43,44 tasks=8

Demonstrations come from train. ``data`` is what data_prep/textvqa.py wrote. Protocol of OpenFlamingo (arXiv
2308.01390): 3 beams, 10 tokens.
"""

import sys

from hpc_mm.benchmark import VQA, Benchmark, Decoding
from hpc_mm.evaluate import main

BENCHMARK = Benchmark(
    name="textvqa",
    kind="vqa",
    split="val",
    prompt=VQA,
    decoding=Decoding(max_new_tokens=10),
    metric="vqa-accuracy",
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
