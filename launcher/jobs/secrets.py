"""Secrets of a job: read on every node from files that only their owner can read."""

from __future__ import annotations

import os
import stat

from motet.core.errors import UserError

MOST_SECRET_BYTES = 65_536


def read_secret(name: str, path: str, section: str) -> str:
    """Return what a secret's file holds.

    Args:
        name: of the variable; `section` of run.yaml names its file.

    Raises:
        UserError: it is missing, empty, or others may read it. The message holds nothing of it.
    """
    shown = f"{section}.secrets: {name}={path}"
    try:
        with open(path, "rb") as file:
            facts = os.fstat(file.fileno())
            content = file.read(MOST_SECRET_BYTES + 1)
    except OSError as error:
        raise UserError(f"{shown} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise UserError(f"{shown} is not a file of yours alone; chmod 600 {path}")
    text = content.decode("utf-8", errors="replace").strip()
    if not text or len(content) > MOST_SECRET_BYTES or not text.isprintable():
        raise UserError(f"{shown} must hold the secret as one line")
    return text
