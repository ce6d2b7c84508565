"""Captions of the shapes corpus's held-out scenes, by CIDEr.

    python eval/toy.py checkpoint=runs/toy [step=0] [shots=0,2,4] [seeds=42,43]

``data`` is what data_prep/shapes.py wrote into the site's store. step=0 asks the model before training.
"""

import sys

from hpc_mm.benchmark import Benchmark, Decoding, Prompt
from hpc_mm.evaluate import main

BENCHMARK = Benchmark(
    name="toy",
    kind="caption",
    prompt=Prompt(name="toy-caption", query="<image>", demonstration="<image>{answer}<|endofchunk|>"),
    decoding=Decoding(beams=1, max_new_tokens=32),
    metric="cider",
)
VALUES = {"data": "shapes/benchmark", "shots": (0, 2)}

if __name__ == "__main__":
    sys.exit(main(BENCHMARK, **VALUES))
