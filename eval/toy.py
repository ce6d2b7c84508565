"""Captions of the shapes corpus's held-out scenes, before and after training, scored by CIDEr.

python eval/toy.py run=runs/toy [steps=0,latest] [samples=100]
"""

import sys

from hpc_mm.config import IMAGE_TOKEN
from hpc_mm.evaluate import Captions, main

BENCHMARK = Captions(data="shapes/heldout-pairs", prompt=IMAGE_TOKEN)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK, sys.argv[1:]))
