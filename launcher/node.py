"""`python -m motet.launcher.node RUN`: what a job runs on each of its nodes (jobs/node.py).

The name stays here because run folders of every age know it: a job executes the snapshot that its
run was frozen with, and a newer Motet submits it.
"""

from __future__ import annotations

import sys

from motet.core.marks import marking
from motet.launcher.jobs.node import main

if __name__ == "__main__":
    with marking():
        sys.exit(main(sys.argv[1:]))
