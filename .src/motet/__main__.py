"""`python -m motet` is `motet`."""

from __future__ import annotations

import sys

from motet.launcher.cli import main

if __name__ == "__main__":
    sys.exit(main())
