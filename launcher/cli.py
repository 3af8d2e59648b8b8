"""The command line: the list of commands, exit codes and messages. What a command takes and does
lies in `commands/`.

Only the asked command is imported, so that `motet --help` is instant.

Exit codes: 0 done · 1 a check or an audit failed · 2 a mistake of the user's · 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from motet.core.errors import UserError
from motet.core.marks import marking
from motet.launcher.commands.options import EXIT_USER_ERROR, Parser

EXIT_INTERRUPTED = 130
_DISK_ERRORS = (errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EROFS, errno.EDQUOT)
COMMANDS: Mapping[str, tuple[str, str]] = {
    # words: (module below commands/, help); a group has no module
    "demo": (
        "demo",
        "train on the text of Python's standard library, with experiments, and report",
    ),
    "init": ("init", "write a commented run.yaml to start from"),
    "data": ("", "text -> token shards; what is in them"),
    "data prepare": ("data.prepare", "tokenize text into a corpus"),
    "data index": ("data.index", "make a corpus over existing token files"),
    "data inspect": ("data.inspect", "documents and tokens of a corpus"),
    "data sample": ("data.sample", "passages of a corpus as items of an experiment"),
    "experiments": ("", "register questions, see their plan first"),
    "experiments list": ("experiments.list", "built-in experiments, or those of a run"),
    "experiments new": ("experiments.new", "write an experiment of your own, and a test of it"),
    "experiments check": ("experiments.check", "report every problem at once"),
    "experiments freeze": ("experiments.freeze", "write the definition that is signed off"),
    "experiments export": ("experiments.export", "write the exact insertions, for others"),
    "experiments import": ("experiments.import_", "check somebody else's insertions for a run"),
    "experiments power": ("experiments.power", "smallest effect that each can detect"),
    "experiments preview": ("experiments.preview", "decode sample exposures in their context"),
    "experiments scan": ("experiments.scan", "find units that the corpora hold, with their places"),
    "experiments audit": ("experiments.audit", "prove what the final weights consumed"),
    "layout": ("", "how a run is split over ranks"),
    "layout show": ("layout.show", "draw the rank grid and the pipeline's timeline"),
    "family": ("", "the models that one run delivers"),
    "family show": ("family.show", "draw the members: sizes, FLOPs, memory, what they share"),
    "family divergence": ("family.divergence", "how far neighbouring members lie apart"),
    "family draft": ("family.draft", "how often the largest accepts what smaller members draft"),
    "cluster": ("", "what the machines and their links really are"),
    "cluster probe": ("cluster.probe", "measure, and write it down"),
    "cluster show": ("cluster.show", "draw a cluster: groups and links"),
    "plan": ("plan.ask", "ranked layouts with time, memory, cost"),
    "train": ("train", "train here (starts torchrun)"),
    "submit": ("submit", "run it on Slurm, as a batch job"),
    "resume": ("resume", "go on from the last checkpoint"),
    "report": ("report", "the answers, as one HTML file"),
    "compare": ("compare", "runs side by side: settings, losses, effects"),
    "verify": ("verify", "check a whole run folder, and name every damaged thing"),
    "eval": ("evaluate", "lm-evaluation-harness"),
    "export": ("export", "Hugging Face checkpoint of the model, or a table of what was found"),
    "status": ("status", "what runs do, or one in detail"),
    "ls": ("listing", "list runs, in short"),
    "logs": ("logs", "what the ranks of a run printed"),
    "cancel": ("cancel", "save and stop a run; end its jobs"),
    "completion": ("completion", "completion of commands and options for a shell"),
    "schema": ("schema", "JSON Schema of run.yaml or cluster.yaml, for editors"),
    "slurm": ("", "a private Slurm of four nodes on this machine"),
    "slurm testbed": ("slurm.testbed", "start it, break it, mend it, stop it (as root)"),
}


class _Command(Parser):
    """One command; its module is imported when its arguments are parsed, and not before. A group
    has no module.
    """

    def __init__(self, *, module: str = "", **options: Any) -> None:
        super().__init__(**options)
        self._module = module

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        self.fill()
        return super().parse_known_args(args, namespace)

    def fill(self) -> None:
        """Import the module and take its arguments."""
        if self._module:
            module = importlib.import_module(f"motet.launcher.commands.{self._module}")
            self.set_defaults(command=module.run)
            module.arguments(self)
            self._module = ""


def build_parser(*, fill: bool = False) -> argparse.ArgumentParser:
    """All commands; with `fill`, the arguments of all of them."""
    from motet import __version__

    parser = Parser(
        prog="motet",
        description="Train a language model once and answer many questions with that one run.",
        epilog=(
            "Any setting of a run.yaml can be given after it, as a.b.c=value. See "
            "docs/reference.md. `motet help COMMAND` tells of one command."
        ),
    )
    parser.add_argument("-V", "--version", action="version", version=f"motet {__version__}")
    parser.set_defaults(whole_parser=partial(build_parser, fill=True))
    groups = {"": parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Command)}
    for words, (module, help_text) in COMMANDS.items():
        head, _, name = words.rpartition(" ")
        if module:
            command = groups[head].add_parser(
                name, module=module, help=help_text, description=help_text
            )
            if fill:
                command.fill()
        else:
            group = groups[head].add_parser(name, help=help_text)
            groups[words] = group.add_subparsers(metavar="COMMAND", required=True)
    return parser


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Settings may stand before and after options: argparse alone takes only one group of them.

    Words that ask for nothing yet, `motet` or `motet data`, are answered with help.
    """
    parser = build_parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    elif not words or not COMMANDS.get(" ".join(words), ("a module",))[0]:
        words = [*words, "--help"]
    parsed, rest = parser.parse_known_args(words)
    if rest and not (hasattr(parsed, "settings") and all(re.match(r"[^-=]+=", r) for r in rest)):
        parser.error(f"unknown argument: {' '.join(rest)}; see --help")
    if rest:
        parsed.settings = [*parsed.settings, *rest]
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    with marking():
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        parsed = _parse(arguments)
        code = parsed.command(parsed) or 0
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
