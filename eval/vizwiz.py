"""VizWiz-VQA (validation: 4,319 questions), by VQA accuracy with one annotator left out in turn.

    python eval/vizwiz.py checkpoint=runs/omnicorpus data=s3://benchmarks/vizwiz shots=0,4,8 seeds=42,43,44 tasks=8

Demonstrations come from train. ``split=test`` writes the file that the challenge's server takes. ``data`` is what
data_prep/vizwiz.py wrote. Protocol of OpenFlamingo (arXiv 2308.01390): 3 beams, 5 tokens.
"""

import sys

from hpc_mm.benchmark import VQA, Benchmark, Decoding
from hpc_mm.evaluate import main

BENCHMARK = Benchmark(
    name="vizwiz",
    kind="vqa",
    split="val",
    prompt=VQA,
    decoding=Decoding(max_new_tokens=5),
    metric="vqa-accuracy",
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
