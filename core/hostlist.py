"""Lists of hosts as clusters write them, "n[1-3,07-09],a-b2". Pure."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from motet.core.errors import UserError

MOST_HOSTS = 65_536
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def expand(text: str) -> list[str]:
    """Return the host names of a list: "n[1-3,07-09],a-b2" has 7.

    Raises:
        UserError: it is no such list.
    """
    if not text:
        return []
    out: list[str] = []
    for part in _split(text):
        pieces = re.split(r"\[([^\[\]]*)\]", part)
        choices = [[p] if i % 2 == 0 else list(_numbers(p, text)) for i, p in enumerate(pieces)]
        for words in itertools.product(*choices):
            out.append("".join(words))
            if len(out) > MOST_HOSTS:
                raise UserError(f"the node list {text[:80]!r} has more than {MOST_HOSTS:,} hosts")
    wrong = [name for name in out if not _HOST.fullmatch(name)]
    if wrong:
        raise UserError(f"the node list {text[:80]!r} names {wrong[0]!r}, which is no host")
    return out


def _split(text: str) -> list[str]:
    """Parts at the commas outside of brackets."""
    return re.split(r",(?![^\[\]]*\])", text)


def _numbers(text: str, whole: str) -> Iterator[str]:
    """The numbers of one pair of brackets, with the zeros they are padded with."""
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise UserError(f"the node list {whole[:80]!r} has [{text}], which is no range")
        first, last = match[1], match[2] or match[1]
        if int(last) - int(first) >= MOST_HOSTS:
            raise UserError(f"the node list {whole[:80]!r} has more than {MOST_HOSTS:,} hosts")
        for number in range(int(first), int(last) + 1):
            yield str(number).zfill(len(first))
