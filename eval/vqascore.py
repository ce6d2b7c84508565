"""How faithfully images show texts, by VQAScore (arXiv 2404.01291), on published benchmarks.

    python eval/vqascore.py benchmark=winoground checkpoint=runs/clip_flant5_xl data=winoground tasks=8

Benchmarks: winoground, eqben, tifa160, pickapic, seetrue, sugarcrepe, genai_bench, and pairs, of your own images with
true and false texts. ``data`` is the folder of the benchmark's published files.
"""

import sys

from hpc_mm.judging import main

if __name__ == "__main__":
    sys.exit(main())
