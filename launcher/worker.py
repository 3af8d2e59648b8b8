"""`python -m motet.launcher.worker RUNDIR`: what torchrun starts on every rank (rank/worker.py).

The name stays here because run folders of every age know it: a run executes the snapshot that it
was frozen with, and a newer Motet resumes it.
"""

from __future__ import annotations

import sys

from motet.core.marks import marking
from motet.launcher.rank.worker import main

if __name__ == "__main__":
    with marking():
        sys.exit(main(sys.argv[1:]))
