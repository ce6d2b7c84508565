"""``hpc-mm VERB ...`` is ``python -m hpc_mm.VERB ...``: every module here that can be run is a verb."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def verbs() -> list[str]:
    files = Path(__file__).parent.glob("[a-z]*.py")
    return sorted(file.stem for file in files if '\nif __name__ == "__main__":' in file.read_text())


def main() -> None:
    """Run the verb's module in this process, with the words after it."""
    known = verbs()
    if len(sys.argv) < 2 or sys.argv[1] in ("--help", "-h", "help"):
        print(f"hpc-mm VERB key=value ...   verbs: {', '.join(known)}")
        return
    verb = sys.argv.pop(1)
    if verb not in known:
        from hpc_mm.config import unknown

        print(f"hpc_mm: {unknown('verb', verb, known)}", file=sys.stderr)
        sys.exit(2)
    runpy.run_module(f"hpc_mm.{verb}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
