"""What a user's own class computes may rest on its source alone: while its methods run, files that
no hash covers cannot be opened.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

SYSTEM = ("/usr", "/lib", "/lib64", "/etc", "/proc", "/sys", "/dev")
CODE = (".py", ".pyc", ".so", ".pth")
_SEALED: ContextVar[FrameType | None] = ContextVar("sealed", default=None)
_hooked = False


class UnfrozenFile(RuntimeError):
    """A file was opened that is not part of the run."""


@contextmanager
def sealed() -> Iterator[None]:
    """Let nothing be opened but what is installed.

    Raises, in the code that opens it:
        UnfrozenFile: a file that could be another one when the run is reported on.
    """
    global _hooked
    if not _hooked:
        sys.addaudithook(_watch)  # stays for the life of the process; it costs a look at a flag
        _hooked = True
    token = _SEALED.set(sys._getframe(2))  # whose `with` this is, behind contextlib's own frame
    try:
        yield
    finally:
        _SEALED.reset(token)


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or (boundary := _SEALED.get()) is None:
        return
    name = arguments[0]
    if _importing(boundary):
        return
    if isinstance(name, (str, bytes, os.PathLike)) and not _installed(os.fsdecode(name)):
        raise UnfrozenFile(
            f"opens {os.fsdecode(name)}, which is not frozen with the run: another content would "
            "give another answer; write it into the class's file, or into the items"
        )


def _importing(boundary: FrameType) -> bool:
    """Whether an import inside the sealed code opens the file: packages read what they like."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame is not boundary:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _installed(name: str) -> bool:
    """Whether a path is code, or belongs to the system or to what is installed."""
    if name.endswith(CODE) or name.startswith("<"):
        return True
    path = os.path.abspath(name)
    here = os.getcwd()
    roots = [sys.prefix, sys.base_prefix, *SYSTEM]
    roots += [os.path.abspath(entry) for entry in sys.path if entry]
    return any(path.startswith(f"{root}{os.sep}") for root in roots if root != here)
