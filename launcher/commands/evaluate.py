"""`motet eval`: benchmarks of lm-evaluation-harness on the trained model."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path

from motet.core.errors import UserError
from motet.launcher.commands import common, options
from motet.launcher.commands.export import chosen_model, chosen_step, export, member_folder


def arguments(parser: argparse.ArgumentParser) -> None:
    """A run, which of its models, and the benchmarks."""
    options.dry_run(parser)
    options.run_folder(parser)
    parser.add_argument("--tasks", required=True, help="names, with commas between them")
    options.step_of_run(parser)
    parser.add_argument("--member", metavar="NAME", help="of its family (default: the whole model)")
    parser.add_argument("--limit", type=int, help="documents per task")


def harness_command(model: Path, tasks: str, output: Path, limit: int | None) -> list[str]:
    """Arguments of lm-evaluation-harness for an exported model."""
    command = [sys.executable, "-m", "lm_eval", "--model", "hf"]
    command += ["--model_args", f"pretrained={model},dtype=float32", "--tasks", tasks]
    command += ["--output_path", str(output)]
    return command + (["--limit", str(limit)] if limit is not None else [])


def run(arguments: argparse.Namespace) -> int:
    """Export the model if need be and run lm-evaluation-harness on it."""
    rundir = common.open_run(arguments.run)
    step = chosen_step(rundir, arguments.step)
    chosen = chosen_model(rundir, arguments.member)
    model = member_folder(rundir, step, chosen)
    output = rundir.evaluations / model.name
    command = harness_command(model, arguments.tasks, output, arguments.limit)
    if arguments.dry_run:
        print(shlex.join(command))
        return 0
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("motet eval needs lm-evaluation-harness: pip install 'motet[eval]'")
    if not (model / "config.json").exists():
        export(rundir, step, {model: chosen}, "float32")
    return subprocess.call(command)
