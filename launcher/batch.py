"""`python -m motet.launcher.batch begin|end RUN ...`: what a batch script calls (jobs/batch.py).

The name stays here because run folders of every age know it: a job executes the snapshot that its
run was frozen with, and a newer Motet submits it.
"""

from __future__ import annotations

import sys

from motet.core.marks import marking
from motet.launcher.jobs.batch import main

if __name__ == "__main__":
    with marking():
        sys.exit(main(sys.argv[1:]))
