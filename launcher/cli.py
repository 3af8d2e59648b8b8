"""The command line: arguments, exit codes and messages. What a command does lies in `commands/`.

Nothing heavy is imported here, so that `motet --help` is instant.

Exit codes: 0 done · 1 a check or an audit failed · 2 a mistake of the user's · 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from motet.core.errors import UserError, suggest

PRIVATE_UMASK = 0o077
EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130
_DISK_ERRORS = (errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EROFS, errno.EDQUOT)
_SETTINGS_HELP = "any setting of docs/reference.md, such as training.steps=100"


class _Parser(argparse.ArgumentParser):
    """Suggests the nearest command when one is misspelt."""

    def error(self, message: str) -> NoReturn:
        match = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if match:
            options = [option.strip(" '") for option in match[2].split(",")]
            hint = suggest(match[1], options)
            message = f"{match[1]!r} is no command{hint}; there are {', '.join(options)}"
        self.exit(EXIT_USER_ERROR, f"{self.prog}: {message}\n")


def _command(
    group: Any, name: str, target: str, help_text: str, *, dry_run: bool = False, json: bool = False
) -> argparse.ArgumentParser:
    """Add one command; `target` is "module:function" under `commands/`."""
    parser = group.add_parser(name, help=help_text, description=help_text)
    parser.set_defaults(target=target)
    if dry_run:
        parser.add_argument(
            "--dry-run", action="store_true", help="print what would be done, and do nothing"
        )
    if json:
        parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    return parser


def _settings_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument("run_yaml", metavar="RUN.yaml", nargs=None if required else "?")
    parser.add_argument("settings", metavar="a.b.c=value", nargs="*", help=_SETTINGS_HELP)


def _nodes_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nnodes",
        type=int,
        default=1,
        metavar="N",
        help="machines; give each the same command (default: 1)",
    )
    parser.add_argument(
        "--node-rank", type=int, default=0, metavar="K", help="which machine this is, from 0"
    )
    parser.add_argument(
        "--endpoint", default="", metavar="HOST:PORT", help="of machine 0, with a free port"
    )


def _add_start_commands(commands: Any) -> None:
    demo = _command(
        commands,
        "demo",
        "demo:run",
        "train on the text of Python's standard library, with experiments, and report",
        dry_run=True,
    )
    demo.add_argument("--steps", type=int, help="length of the run")
    demo.add_argument("--folder", default=".", help="where corpora/ and runs/ go")
    demo.add_argument("settings", metavar="a.b.c=value", nargs="*", help=_SETTINGS_HELP)
    init = _command(
        commands, "init", "init:run", "write a commented run.yaml to start from", dry_run=True
    )
    init.add_argument("name", metavar="NAME", help="name of the run and of the new folder")


def _add_data_commands(commands: Any) -> None:
    data = commands.add_parser("data", help="text -> token shards; what is in them")
    group = data.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    prepare = _command(
        group, "prepare", "data:prepare", "tokenize text into a corpus", dry_run=True
    )
    prepare.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="+",
        help="files, folders, .jsonl(.gz|.zst), .parquet, saved data sets, hf:NAME, or stdlib:",
    )
    prepare.add_argument("--output", required=True, metavar="FOLDER", help="the corpus to write")
    which = prepare.add_mutually_exclusive_group()
    which.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json or Hugging Face folder")
    which.add_argument(
        "--vocabulary-size", type=int, metavar="N", help="train a BPE of N tokens (default 32768)"
    )
    prepare.add_argument("--eod-token", metavar="TEXT", help="end of document (default: found)")
    prepare.add_argument("--text-field", default="text", help="field of the text (default: text)")
    prepare.add_argument("--id-field", default="id", help="field of the id (default: id)")
    prepare.add_argument("--glob", help="which files of a folder, such as '**/*.txt'")
    prepare.add_argument("--config", help="configuration of a data set")
    prepare.add_argument("--split", default="train", help="split of a data set (default: train)")
    prepare.add_argument(
        "--streaming", action="store_true", help="read a data set while loading it"
    )
    prepare.add_argument("--skip-bad", action="store_true", help="leave out unreadable documents")
    prepare.add_argument("--max-documents", type=int, metavar="N", help="stop after N documents")
    prepare.add_argument("--processes", type=int, default=0, help="default: decided by the input")
    prepare.add_argument("--quiet", action="store_true", help="no progress bar")
    index = _command(
        group, "index", "data:index", "make a corpus over existing token files", dry_run=True
    )
    index.add_argument(
        "files", metavar="FILE", nargs="+", help="Megatron .bin, Dolma .npy, nanoGPT .bin"
    )
    index.add_argument("--output", required=True, metavar="FOLDER", help="the corpus to write")
    index.add_argument(
        "--format", default="auto", choices=("auto", "megatron", "dolma", "nanogpt"), dest="layout"
    )
    index.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json or Hugging Face folder")
    index.add_argument("--dtype", choices=("uint16", "uint32"), help="of files without a header")
    index.add_argument("--eod", type=int, metavar="ID", help="end-of-document token")
    index.add_argument("--vocabulary-size", type=int, metavar="N", help="without a tokenizer")
    show = _command(group, "inspect", "data:inspect", "documents and tokens of a corpus", json=True)
    show.add_argument("path", metavar="CORPUS|RUN|RUN.yaml")
    show.add_argument("--documents", type=int, default=3, metavar="N", help="how many to show")
    show.add_argument("--first", type=int, default=0, metavar="N", help="first document to show")
    show.add_argument("--slot", type=int, metavar="N", help="decode this training sequence")
    show.add_argument("--verify", action="store_true", help="check the SHA-256 of every shard")


def _add_experiment_commands(commands: Any) -> None:
    parser = commands.add_parser("experiments", help="register questions, see their plan first")
    group = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    listing = _command(
        group, "list", "experiments:show_list", "built-in experiments, or those of a run", json=True
    )
    _settings_arguments(listing, required=False)
    check = _command(group, "check", "experiments:check", "report every problem at once", json=True)
    _settings_arguments(check)
    power = _command(
        group, "power", "experiments:power", "smallest effect that each can detect", json=True
    )
    _settings_arguments(power)
    preview = _command(
        group, "preview", "experiments:preview", "decode sample exposures in their context"
    )
    preview.add_argument("--count", type=int, default=3, metavar="N", help="per experiment")
    _settings_arguments(preview)
    audit = _command(
        group, "audit", "experiments:audit", "prove what the final weights consumed", json=True
    )
    audit.add_argument("--replay", action="store_true", help="recompute every digest from the data")
    audit.add_argument("run", metavar="RUN", help="folder of the run")


def _add_layout_commands(commands: Any) -> None:
    parser = commands.add_parser("layout", help="how a run is split over ranks")
    group = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    show = _command(
        group, "show", "layout:show", "draw the rank grid and the pipeline's timeline", json=True
    )
    show.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default: 1)")
    _settings_arguments(show)


def _add_plan_command(commands: Any) -> None:
    plan = _command(
        commands,
        "plan",
        "plan:run",
        "ranked layouts with time, memory, cost",
        dry_run=True,
        json=True,
    )
    plan.add_argument("--cluster", metavar="FILE", help="cluster.yaml (default: this machine)")
    plan.add_argument("--top", type=int, default=8, metavar="N", help="layouts shown (default 8)")
    plan.add_argument("--why", metavar="DEGREES", help="why not, such as tp=4,pp=2; or all")
    plan.add_argument("--html", metavar="FILE", help="the pipeline's timeline, memory over time")
    plan.add_argument("--write", metavar="FILE", help="layout.yaml of the best layout")
    plan.add_argument("--pick", type=int, metavar="N", help="write this one instead of the best")
    plan.add_argument("--budget", metavar="NUMBERgpu-hours", help="largest model that it trains")
    plan.add_argument("--budget-price", type=float, metavar="NUMBER", help="the same, for a price")
    plan.add_argument("--days", type=float, metavar="NUMBER", help="the same, in so many days")
    fastest = "the shortest time for this model within the budget, instead"
    plan.add_argument("--fastest", action="store_true", help=fastest)
    probe = "train a layout for a minute (default: the one that tells most), calibrate, plan again"
    plan.add_argument("--probe", nargs="?", type=int, const=0, metavar="N", help=probe)
    plan.add_argument(
        "--history",
        nargs="?",
        const="runs",
        metavar="RUNS",
        help="predicted and measured, by attempt",
    )
    plan.add_argument(
        "--calibrate", action="append", metavar="RUNS", help="fit constants to the runs in a folder"
    )
    output = (
        "cluster.yaml with fitted constants (default: --probe calibrated.yaml, --calibrate prints)"
    )
    plan.add_argument("--output", metavar="FILE", help=output)
    plan.add_argument("--force", action="store_true", help="replace --output when it exists")
    _settings_arguments(plan, required=False)


def _add_cluster_commands(commands: Any) -> None:
    parser = commands.add_parser("cluster", help="what the machines and their links really are")
    group = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    probe = _command(
        group, "probe", "cluster:probe", "measure, and write it down", dry_run=True, json=True
    )
    probe.add_argument("--output", default="cluster.yaml", metavar="FILE", help="cluster.yaml")
    probe.add_argument("--force", action="store_true", help="replace the file when it exists")
    probe.add_argument("--processes", type=int, metavar="N", help="here (default: one per GPU)")
    probe.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    probe.add_argument(
        "--groups", nargs="+", metavar="NAME:HOSTS", help="such as ib:n[1-2] (default: measured)"
    )
    probe.add_argument("--nnodes", type=int, metavar="N", help="machines, when not under srun")
    probe.add_argument("--node-rank", type=int, metavar="R", help="of this one, from 0")
    probe.add_argument("--endpoint", metavar="HOST:PORT", help="where they meet: the first one")
    seconds = "of one series of transfers (default 1.5)"
    probe.add_argument("--seconds", type=float, default=1.5, metavar="S", help=seconds)
    wait = "seconds to wait for other machines (default 300)"
    probe.add_argument("--wait", type=float, default=300.0, metavar="S", help=wait)
    show = _command(group, "show", "cluster:show", "draw a cluster: groups and links", json=True)
    show.add_argument(
        "what", metavar="FILE|RUN", nargs="?", help="cluster.yaml, or a run (default: this machine)"
    )
    show.add_argument("--catalogue", action="store_true", help="known devices, with sources")
    show.add_argument("--svg", metavar="FILE", help="also as a picture")
    show.add_argument("--html", metavar="FILE", help="also as a page")
    for one in (probe, show):
        one.add_argument("--from-slurm", action="store_true", help="nodes that Slurm lists")
        one.add_argument("--partition", metavar="NAME", help="with --from-slurm: only its nodes")


def _add_run_commands(commands: Any) -> None:
    train = _command(commands, "train", "train:run", "train here (starts torchrun)", dry_run=True)
    _settings_arguments(train)
    _nodes_arguments(train)
    submit = _command(
        commands, "submit", "submit:run", "run it on Slurm, as a batch job", dry_run=True
    )
    _settings_arguments(submit)
    resume = _command(
        commands, "resume", "train:resume", "go on from the last checkpoint", dry_run=True
    )
    resume.add_argument("run", metavar="RUN", help="folder of the run")
    resume.add_argument("settings", metavar="a.b.c=value", nargs="*", help="see docs/reference.md")
    _nodes_arguments(resume)
    report = _command(
        commands, "report", "report:run", "the answers, as one HTML file", dry_run=True, json=True
    )
    report.add_argument("run", metavar="RUN", help="folder of the run")
    evaluate = _command(commands, "eval", "export:evaluate", "lm-evaluation-harness", dry_run=True)
    evaluate.add_argument("run", metavar="RUN", help="folder of the run")
    evaluate.add_argument("--tasks", required=True, help="names, with commas between them")
    evaluate.add_argument("--step", type=int, help="checkpoint (default: the last)")
    evaluate.add_argument("--limit", type=int, help="documents per task")
    export = _command(
        commands, "export", "export:run", "Hugging Face checkpoint of the model", dry_run=True
    )
    export.add_argument("run", metavar="RUN", help="folder of the run")
    export.add_argument("--step", type=int, help="checkpoint (default: the last)")
    export.add_argument("--output", metavar="FOLDER", help="default: RUN/members/step-N")
    export.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))


def _add_follow_commands(commands: Any) -> None:
    def runs_folder(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--runs", default="runs", metavar="FOLDER", help="default: runs")

    status = _command(commands, "status", "status:run", "what runs do, or one in detail", json=True)
    status.add_argument("run", metavar="RUN", nargs="?", help="folder of a run (default: all)")
    runs_folder(status)
    status.add_argument("--watch", action="store_true", help="redraw until nothing runs or waits")
    listing = _command(commands, "ls", "listing:run", "list runs, in short", json=True)
    runs_folder(listing)
    logs = _command(commands, "logs", "logs:run", "what the ranks of a run printed", json=True)
    logs.add_argument("run", metavar="RUN", help="folder of the run")
    runs_folder(logs)
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the run ends")
    logs.add_argument("--rank", metavar="R", help="only this rank, or slurm for the job's output")
    logs.add_argument("--attempt", type=int, metavar="N", help="default: the newest")
    logs.add_argument("--lines", type=int, metavar="N", help="last lines of each rank (default 20)")
    cancel = _command(
        commands,
        "cancel",
        "cancel:run",
        "save and stop a run; end its jobs",
        dry_run=True,
        json=True,
    )
    cancel.add_argument("run", metavar="RUN", help="folder of the run")
    runs_folder(cancel)
    cancel.add_argument("--now", action="store_true", help="kill it, without a checkpoint first")
    cancel.add_argument(
        "--wait",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="how long to wait (default 300)",
    )


def _add_slurm_commands(commands: Any) -> None:
    slurm = commands.add_parser("slurm", help="a private Slurm of four nodes on this machine")
    rooms = slurm.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    testbed = rooms.add_parser("testbed", help="start it, break it, mend it, stop it (as root)")
    group = testbed.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    def add(name: str, help_text: str, **options: bool) -> argparse.ArgumentParser:
        target = f"testbed:{name.replace('-', '_')}"
        parser = _command(group, name, target, help_text, **options)
        folder = "/var/lib/motet-testbed"
        parser.add_argument("--folder", default=folder, metavar="F", help=f"default: {folder}")
        return parser

    start = add("start", "start it and wait until every node is idle", dry_run=True)
    start.add_argument(
        "--rate", type=float, default=1000.0, metavar="MBIT", help="of the link (default 1000)"
    )
    add("stop", "end and remove all of it, also after a crash", dry_run=True)
    add("status", "its nodes, daemons and link", json=True)
    add("env", "shell lines that let sbatch and motet use it: eval them")
    rate = add("rate", "shape the link between its two clusters", dry_run=True)
    rate.add_argument("mbit", type=float, metavar="MBIT", help="Mbit/s in each direction")
    cut = add("cut", "pull a node's network cable", dry_run=True)
    crash = add("crash", "kill a host, as if its power failed", dry_run=True)
    crash.add_argument("host", metavar="HOST", help="n1 to n4, or ctl for the controller")
    mend = add("mend", "put the cable back and start slurmd anew", dry_run=True)
    for parser in (cut, mend):
        parser.add_argument("node", metavar="NODE", help="n1 to n4")
    add("restart-controller", "start slurmctld anew from its saved state", dry_run=True)


def build_parser() -> argparse.ArgumentParser:
    """All commands."""
    from motet import __version__

    parser = _Parser(
        prog="motet",
        description="Train a language model once and answer many questions with that one run.",
        epilog=(
            "Any setting of a run.yaml can be given after it, as a.b.c=value. See "
            "docs/reference.md."
        ),
    )
    parser.add_argument("--version", action="version", version=f"motet {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    _add_start_commands(commands)
    _add_data_commands(commands)
    _add_experiment_commands(commands)
    _add_layout_commands(commands)
    _add_cluster_commands(commands)
    _add_plan_command(commands)
    _add_run_commands(commands)
    _add_follow_commands(commands)
    _add_slurm_commands(commands)
    return parser


def _target(name: str) -> Callable[[argparse.Namespace], int | None]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(f"motet.launcher.commands.{module}"), function)  # type: ignore[no-any-return]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Settings may stand before and after options: argparse alone takes only one group of them."""
    parser = build_parser()
    parsed, rest = parser.parse_known_args(arguments)
    if rest and not (hasattr(parsed, "settings") and all(re.match(r"[^-=]+=", r) for r in rest)):
        parser.error(f"unknown argument: {' '.join(rest)}; see --help")
    if rest:
        parsed.settings = [*parsed.settings, *rest]
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    os.umask(PRIVATE_UMASK)
    parsed = _parse(arguments)
    try:
        code = _target(parsed.target)(parsed) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"motet: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("motet: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        print(f"motet: {error.filename or 'the disk'}: {error.strerror}", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
