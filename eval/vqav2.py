"""VQAv2 (validation: 214,354 questions), by VQA accuracy.

    python eval/vqav2.py checkpoint=runs/omnicorpus data=s3://benchmarks/vqav2 shots=0,4,8 seeds=42,43,44 tasks=8

Demonstrations come from train. ``split=test-dev`` writes the file that the challenge's server takes: every question of
``test`` is in it, where that split is prepared too. ``data`` is what data_prep/vqav2.py wrote. Protocol of OpenFlamingo
(arXiv 2308.01390): 3 beams, 5 tokens.
"""

import sys

from hpc_mm.benchmark import VQA, Benchmark, Decoding
from hpc_mm.evaluate import main

BENCHMARK = Benchmark(
    name="vqav2",
    kind="vqa",
    split="val",
    prompt=VQA,
    decoding=Decoding(max_new_tokens=5),
    metric="vqa-accuracy",
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
