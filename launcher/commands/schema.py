"""`motet schema`: the JSON Schema of a file that people write, for their editor."""

from __future__ import annotations

import argparse
import json

FILES = ("run", "cluster")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which file."""
    parser.add_argument("file", choices=FILES, help="run.yaml or cluster.yaml")


def run(arguments: argparse.Namespace) -> int:
    """Print the schema."""
    if arguments.file == "run":
        from motet.launcher.config.json_schema import run_schema as schema
    else:
        from motet.parallel.cluster.json_schema import cluster_schema as schema
    print(json.dumps(schema(), indent=1))
    return 0
