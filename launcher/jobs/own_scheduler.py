"""A scheduler of the user's own is held to the protocol: whatever its methods raise or give that is
not what was asked for becomes one error with file and line.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from motet.core.errors import Problem
from motet.core.jobs import JOB_ID, CurrentJob, JobNode, JobRecord, JobState
from motet.core.plugins import fault, mistakes_of
from motet.launcher.jobs.scheduler import JobRequest, Scheduler

SETTING = "scheduler"


def guarded(kind: type[Scheduler]) -> type[Scheduler]:
    """Return a class like a user's own whose methods raise users' errors only.

    Raises:
        PluginError: its class variables are not what they must be.
    """
    for name in ("title", "queue_hint"):
        if not isinstance(value := getattr(kind, name), str):
            raise fault(kind, SETTING, f"has {name}={value!r:.60}; it must be text")
    names = kind.recorded
    if not isinstance(names, tuple) or not all(isinstance(name, str) and name for name in names):
        raise fault(kind, SETTING, f"has recorded={names!r:.60}; it must be a tuple of texts")
    methods = {name: _method(kind, name) for name in _GIVES}
    made = type(kind.__name__, (kind,), methods)
    made.__module__, made.__qualname__ = kind.__module__, kind.__qualname__
    return made


def _method(kind: type[Scheduler], name: str) -> Callable[..., Any]:
    own, (right, wanted) = getattr(kind, name), _GIVES[name]

    @wraps(own)
    def asked(self: Scheduler, *arguments: Any, **named: Any) -> Any:
        with mistakes_of(kind, SETTING):
            given = own(self, *arguments, **named)
        if not right(given):
            raise fault(kind, SETTING, f"gives {given!r:.80} from {name}; it must be {wanted}")
        return given

    return asked


def _is_request(given: Any) -> bool:
    good = isinstance(given, JobRequest) and bool(given.groups) and given.chain >= 1
    return good and all(group.nodes >= 1 and group.processes >= 1 for group in given.groups)


def _is_size(given: Any) -> bool:
    return isinstance(given, tuple) and [type(number) for number in given] == [int, int]


def _is_id(given: Any) -> bool:
    return isinstance(given, str) and JOB_ID.fullmatch(given) is not None


def _are_records(given: Any) -> bool:
    return isinstance(given, dict) and all(
        isinstance(record, JobRecord) and isinstance(record.state, JobState) and _is_id(id_)
        for id_, record in given.items()
    )


def _are_problems(given: Any) -> bool:
    return isinstance(given, list) and all(isinstance(problem, Problem) for problem in given)


def _is_job(given: Any) -> bool:
    return given is None or (isinstance(given, CurrentJob) and _is_id(given.id))


def _is_text(given: Any) -> bool:
    return isinstance(given, str)


def _is_node(given: Any) -> bool:
    return isinstance(given, JobNode)


def _anything(given: Any) -> bool:
    return True


_TEXT = (_is_text, "text")
_RECORDS = (_are_records, "a dict of JobRecord by job id, each with a JobState")
_GIVES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "request": (_is_request, "a JobRequest with groups of nodes, each of at least one process"),
    "size": (_is_size, "(nodes, processes)"),
    "problems": (_are_problems, "a list of Problem"),
    "script": _TEXT,
    "dependency": _TEXT,
    "available": _TEXT,
    "trial": _TEXT,
    "submit": (_is_id, "a job id: text of letters, digits, '.', '_' and '-'"),
    "query": _RECORDS,
    "history": _RECORDS,
    "cancel": (_anything, ""),
    "signal": (_anything, ""),
    "requeue": (_anything, ""),
    "current_job": (_is_job, "a CurrentJob, or None outside of a job"),
    "this_node": (_is_node, "a JobNode"),
}
"""What each method must give: whether a value is right, and what is wanted in words."""
