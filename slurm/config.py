"""What a batch job is asked with, and the pattern that every text of it must match. Pure.

A text ends up in an `#SBATCH` line, in a line of shell, or in the environment. Each has an
allow-pattern: what it does not name (line breaks, quotes, `$`, backticks, `;`, blanks, control
characters) is refused, here before anything is asked of Slurm and once more where the script is
written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from motet.core.jobs import NodeGroup

MOST_SHOWN = 60
MAIL_TYPES = ("ALL", "BEGIN", "END", "FAIL", "REQUEUE", "TIME_LIMIT", "TIME_LIMIT_80", "NONE")
VARIABLES = ("SLURM_", "SBATCH_", "SRUN_")
"""What begins the names of Slurm's own variables."""
SIGNAL_EARLY_S = 60
"""Slurm may send the signal before a time limit so much too early (measured, and in its manual)."""


class Pattern(NamedTuple):
    """An allow-pattern, the most characters, how it reads in a message, and whether letters beyond
    ASCII are letters.
    """

    regex: str
    most: int
    what: str
    flags: re.RegexFlag = re.ASCII


_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_LETTER = r"\w\u0300-\u036f._+,:=@-"  # with combining accents
_FOLDER = rf"[{_LETTER}](?:[ {_LETTER}]*[{_LETTER}])?"
"""A part of a path: blanks stand inside, not at its ends."""
PATTERNS = {
    "name": Pattern(_WORD, 128, "letters, digits, '.', '_' and '-'"),
    "partition": Pattern(
        rf"{_WORD}(,{_WORD})*", 255, "names of partitions with commas between them"
    ),
    "account": Pattern(_WORD, 128, "letters, digits, '.', '_' and '-'"),
    "qos": Pattern(_WORD, 128, "letters, digits, '.', '_' and '-'"),
    "reservation": Pattern(rf"{_WORD}(,{_WORD})*", 255, "letters, digits, '.', '_' and '-'"),
    "constraint": Pattern(
        r"[A-Za-z0-9\[(][A-Za-z0-9._:=\[\]()&|,*-]*", 255, "features joined by '&' or '|'"
    ),
    "time": Pattern(
        r"\d{1,6}|\d{1,6}:\d{1,2}|\d{1,5}:\d{1,2}:\d{1,2}|\d{1,4}-\d{1,2}(:\d{1,2}){0,2}",
        16,
        "a time as Slurm writes it: MINUTES, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS",
    ),
    "memory": Pattern(r"\d{1,9}[KMGT]?", 10, "a number with K, M, G or T, such as 64G"),
    "gpu_type": Pattern(r"[A-Za-z0-9][A-Za-z0-9._-]*", 64, "letters, digits, '.', '_' and '-'"),
    "mail_user": Pattern(
        r"[A-Za-z0-9][A-Za-z0-9._+-]*(@[A-Za-z0-9][A-Za-z0-9.-]*)?", 254, "an address or a user"
    ),
    "modules": Pattern(r"[A-Za-z0-9][A-Za-z0-9._+/-]*", 128, "a module such as cuda/12.4"),
    "container": Pattern(r"[A-Za-z0-9._/+,:=@-]+", 512, "a word of letters, digits and ._/+,:=@-"),
    "srun": Pattern(
        r"--(container-[a-z-]+|mpi|network|cpu-bind|gpu-bind|mem-bind|distribution)"
        r"(=[A-Za-z0-9._/+,:=@#-]+)?",
        512,
        "--container-..., --mpi, --network, --cpu-bind, --gpu-bind, --mem-bind or --distribution, "
        "with a value",
    ),
    "dependency": Pattern(
        r"(after|afterany|afterok|afternotok|aftercorr|afterburstbuffer)"
        r"(:\d{1,10}(_\d{1,10})?(\+\d{1,6})?)+",
        255,
        "such as afterok:123 or afterany:123:124",
    ),
    "variable": Pattern(r"[A-Za-z_][A-Za-z0-9_]*", 128, "a name of letters, digits and '_'"),
    "value": Pattern(
        r"[A-Za-z0-9 ._/+,:=@%^~-]*", 1024, "letters, digits, blanks and ._/+,:=@%^~-"
    ),
    "path": Pattern(
        rf"/(?:(?:{_FOLDER})?/)*(?:{_FOLDER})?",
        1024,
        "an absolute path of letters, digits, blanks and ._/+,:=@-",
        re.UNICODE,
    ),
}


def fault(kind: str, value: str) -> str:
    """Return why a text may not be handed to Slurm, or "".

    Args:
        kind: key of `PATTERNS`.
    """
    pattern = PATTERNS[kind]
    if len(value) > pattern.most:
        return f"{shown(value)} has {len(value):,} characters; at most {pattern.most}"
    if not re.fullmatch(pattern.regex, value, pattern.flags):
        return f"{shown(value)} cannot be handed to Slurm; it is {pattern.what}"
    return ""


def shown(value: str) -> str:
    """A text in a message: control characters escaped, and cut."""
    cut = value if len(value) <= MOST_SHOWN else value[:MOST_SHOWN] + "..."
    return ascii(cut)


def seconds(time: str) -> int | None:
    """Return the seconds of a time limit, None for "" (the partition's own limit).

    `12:30` is twelve and a half minutes, as sbatch reads it.

    Raises:
        ValueError: it is none.
    """
    if not time:
        return None
    if not re.fullmatch(PATTERNS["time"].regex, time, re.ASCII):
        raise ValueError(f"{shown(time)} is no time limit")
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, secs = [*parts, 0, 0][:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + secs
    if len(parts) == 1:
        return parts[0] * 60
    if len(parts) == 2:
        return parts[0] * 60 + parts[1]
    return (parts[0] * 60 + parts[1]) * 60 + parts[2]


@dataclass(frozen=True)
class JobComponent(NodeGroup):
    """Nodes of one kind: a component of a heterogeneous job, in Slurm's words.

    Attributes:
        memory: per node, such as "64G"; "" = the partition's default.
    """

    memory: str = ""
    constraint: str = ""
    reservation: str = ""
    exclusive: bool = False

    def __post_init__(self) -> None:
        refuse_faults(
            (name, getattr(self, name))
            for name in ("partition", "gpu_type", "memory", "constraint", "reservation")
        )


def refuse_faults(texts: Iterable[tuple[str, str]]) -> None:
    """Raise `ValueError` for the first (kind, text) that may not be handed to Slurm; "" is not
    handed on.
    """
    for kind, value in texts:
        why = fault(kind, value) if value else ""
        if why:
            raise ValueError(f"{kind}: {why}")


@dataclass(frozen=True)
class BatchRequest:
    """A batch job for one run, or for an array of runs.

    Attributes:
        name: of the job.
        run: folder of the run; of an array, its path up to the seed.
        groups: more than one makes a heterogeneous job.
        hook: module of python that the script calls before and after its step: `begin RUN` prints
            the number of the attempt, or nothing when nothing is left to do; `end RUN CODE ASKED`
            says by a `JobExit` what becomes of the job.
        node: module that the step runs once on each node.
        array: the task ids, which are the seeds; () = no array.
        array_limit: most tasks at once; 0 = all.
        time: raw, as Slurm writes it; "" = the partition's.
        signal_s: how long before its time limit the job is told.
        requeue: "self" (the script asks for it), "site" (it waits to be requeued) or "never".
        chained: whether another job of the run waits for the end of this one.
        passed: names of variables of the user's shell that the job gets.
        variables: (name, value) that the script sets.
        container: words before python.
        srun: further arguments of srun.
    """

    name: str
    run: str
    python: str
    groups: tuple[JobComponent, ...]
    hook: str
    node: str
    array: tuple[int, ...] = ()
    array_limit: int = 0
    account: str = ""
    qos: str = ""
    time: str = ""
    signal_s: int = 120
    requeue: str = "self"
    chained: bool = False
    mail_user: str = ""
    mail_type: tuple[str, ...] = ()
    dependency: tuple[str, ...] = ()
    passed: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    modules: tuple[str, ...] = ()
    container: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        refuse_faults(self._texts())
        if not self.groups:
            raise ValueError("a job needs nodes")

    def _texts(self) -> list[tuple[str, str]]:
        single = ("name", "account", "qos", "time", "mail_user")
        lists = ("dependency", "modules", "container", "srun")
        out = [(name, getattr(self, name)) for name in single]
        out += [(name, word) for name in lists for word in getattr(self, name)]
        out += [("name", word) for word in (*self.mail_type, self.requeue)]
        out += [("path", self.run), ("path", self.python)]
        out += [("name", self.hook), ("name", self.node)]
        out += [("variable", name) for name in (*self.passed, *dict(self.variables))]
        return out + [("value", value) for _, value in self.variables]
