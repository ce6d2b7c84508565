"""OK-VQA (validation: 5,046 questions), by VQA accuracy of stemmed answers.

    python eval/okvqa.py checkpoint=runs/omnicorpus data=s3://benchmarks/okvqa shots=0,4,8 seeds=42,43,44 tasks=8

Demonstrations come from train. ``data`` is what data_prep/okvqa.py wrote. Under the rules of OpenFlamingo predictions
are stemmed as the data set's own answers are, with NLTK; lmms-eval and VLMEvalKit do not. 3 beams, 5 tokens.
"""

import sys

from hpc_mm.benchmark import VQA, Benchmark, Decoding
from hpc_mm.evaluate import main

BENCHMARK = Benchmark(
    name="okvqa",
    kind="vqa",
    split="val",
    prompt=VQA,
    decoding=Decoding(max_new_tokens=5),
    metric="okvqa-accuracy",
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
