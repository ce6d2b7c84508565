"""Questions about the shapes corpus's held-out scenes, by VQA accuracy.

    python eval/toy_vqa.py checkpoint=runs/toy [step=0] [shots=0,2,4] [seeds=42,43]

``data`` is what data_prep/shapes.py wrote into the site's store. step=0 asks the model before training.
"""

import sys

from hpc_mm.benchmark import Benchmark, Decoding, Prompt
from hpc_mm.evaluate import main

QUERY = "<image>Question:{question} Short answer:"
BENCHMARK = Benchmark(
    name="toy_vqa",
    kind="vqa",
    prompt=Prompt(name="toy-vqa", query=QUERY, demonstration=f"{QUERY}{{answer}}<|endofchunk|>"),
    decoding=Decoding(beams=1, max_new_tokens=5),
    metric="vqa-accuracy",
)
VALUES = {"data": "shapes/benchmark", "shots": (0, 2)}

if __name__ == "__main__":
    sys.exit(main(BENCHMARK, **VALUES))
