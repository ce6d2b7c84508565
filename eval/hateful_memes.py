"""Hateful Memes (development set: 500 memes, or 540 of dev_unseen), by the area under the ROC curve.

    python eval/hateful_memes.py checkpoint=runs/omnicorpus data=s3://benchmarks/hateful_memes shots=0,4,8 tasks=8

Demonstrations come from train. ``data`` is what data_prep/hateful_memes.py wrote. Protocol of OpenFlamingo (arXiv
2308.01390): the mean log-probabilities of "yes" and "no" are compared; no text is generated.
"""

import sys

from hpc_mm.benchmark import HATEFUL_MEMES, Benchmark
from hpc_mm.evaluate import main

BENCHMARK = Benchmark(
    name="hateful_memes",
    kind="classes",
    split="dev",
    prompt=HATEFUL_MEMES,
    classes=("no", "yes"),
    metric="roc-auc",
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
