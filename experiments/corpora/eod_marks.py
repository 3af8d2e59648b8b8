"""Where the end-of-document token stands in each document: at its end, at its start, or at both.

Most programs end documents with it. llm.c begins them with it, and where it is the token for the
beginning of text as well (BOS = EOS) it stands at both sides; read as ends, such files have twice
as many documents, and each mark is cut off from its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from motet.core.errors import UserError, suggest

I64 = npt.NDArray[np.int64]
END, START, BOTH = "end", "start", "both"
EOD_MARKS = (END, START, BOTH)
TOLD = {
    END: "at the end of each document",
    START: "at the start of each document",
    BOTH: "at both ends of each document",
}


class MarkedTokens(NamedTuple):
    """Tokens in a row whose documents are found by their marks."""

    first: int  # position of the first token
    n_tokens: int
    eods: I64  # positions of the end-of-document token, counted from `first`

    def opens(self) -> I64:
        """Return those at even places if the segment begins with one, else those at odd ones."""
        return self.eods[0 if self._begins else 1 :: 2]

    def closes(self) -> I64:
        return self.eods[1 if self._begins else 0 :: 2]

    @property
    def _begins(self) -> bool:
        return len(self.eods) > 0 and int(self.eods[0]) == 0

    def is_start(self) -> bool:
        """Return whether it begins with a mark and does not end with one."""
        return self._begins and int(self.eods[-1]) != self.n_tokens - 1

    def unpaired(self) -> int | None:
        """Return the position of a mark that does not fit documents with one at both ends, or None.

        The first document may lack its beginning and the last one its end.
        """
        opens, closes = self.opens(), self.closes()
        if self._begins:
            opens = opens[1:]
        count = min(len(opens), len(closes))
        wrong = np.flatnonzero(opens[:count] != closes[:count] + 1)
        if len(wrong):
            return self.first + int(opens[wrong[0]])
        if len(closes) > count and int(closes[-1]) != self.n_tokens - 1:
            return self.first + int(closes[-1])
        return None

    def is_both(self) -> bool:
        """Return whether documents have a mark at both ends: all of them, or two whole ones."""
        if self.unpaired() is not None:
            return False
        closed = len(self.eods) > 0 and int(self.eods[-1]) == self.n_tokens - 1
        if self._begins and closed:
            return len(self.eods) % 2 == 0
        return not closed and len(self.eods) >= 4

    def starts(self, marks: str) -> I64:
        """Return where documents begin, as positions."""
        begins = self.eods + 1
        if marks != END:
            begins = self.opens() if marks == BOTH else self.eods
        begins = np.union1d([0], begins)
        return self.first + begins[begins < self.n_tokens].astype(np.int64)


def marks_of(segments: Sequence[MarkedTokens]) -> str:
    """Return where the marks stand in all of `segments`; at the end where that is not certain."""
    if all(segment.is_both() for segment in segments):
        return BOTH
    if all(segment.is_start() for segment in segments):
        return START
    return END


def marks_of_documents(first: npt.NDArray[np.bool_], last: npt.NDArray[np.bool_]) -> str:
    """Return where the marks stand in known documents of two tokens or more.

    Args:
        first, last: bool [documents], whether that token of the document is a mark.
    """
    if len(first) and first.all() and last.all():
        return BOTH
    if len(first) and first.all() and not last.any():
        return START
    return END


def check_marks(marks: str | None, segments: Sequence[MarkedTokens]) -> None:
    """Raise `UserError` for marks that do not exist, or that the tokens do not have."""
    if marks is None:
        return
    if marks not in EOD_MARKS:
        known = ", ".join(EOD_MARKS)
        raise UserError(
            f"eod_marks={marks!r} is unknown{suggest(marks, EOD_MARKS)}; one of: {known}"
        )
    if marks == BOTH:
        for segment in segments:
            position = segment.unpaired()
            if position is not None:
                raise UserError(
                    f"eod_marks='both', but the end-of-document token at token {position:,} has no "
                    "partner beside it; documents do not have one at both ends"
                )
