"""Somebody else's insertions, at their exact places: they are trained on, and nothing is asked of
them.

Rows have `position` (of the first token in the stream, counted in tokens), and `tokens` or `text`;
`experiment` and `unit` are names. Tokens are taken as they are. A text is tokenized as it stands,
without end-of-document tokens around it, so that it begins at its position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from motet.core.errors import Problem, UserError
from motet.core.hashing import sha256_hex
from motet.core.parsing import parse_json
from motet.experiments.corpora.blocks import needed
from motet.experiments.corpora.tokenizer import token_dtype
from motet.experiments.design.assignment import Question
from motet.experiments.design.decontaminate import Fixed
from motet.experiments.design.requests import Setting
from motet.experiments.stream.claims import Claims
from motet.experiments.stream.placement import Placed, Request, Texts
from motet.experiments.stream.random import text_keys

FORMAT = "motet-insertions"
RESERVED = "imported"
WHERE = "experiments.insertions"
REFUSED = {"moves_base": "moves the base text after it", "noise": "has noise on its embeddings"}


def read_insertions(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return (facts, rows) of a file that `motet experiments export` wrote, or of anybody's Parquet
    or JSON lines with the columns position and text (or tokens); facts are {} where it has none.

    Raises:
        UserError: it cannot be read, or a row lacks what it needs.
    """
    if path.suffix == ".parquet":
        parquet = needed("pyarrow.parquet", path)
        try:
            table = parquet.read_table(path)
            facts = parse_json((table.schema.metadata or {}).get(b"motet", b"{}"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is not readable as parquet: {error}") from None
        rows = table.to_pylist()
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            rows = [parse_json(line) for line in lines if line.strip()]
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is not readable as JSON lines: {error}") from None
        first = rows[0] if rows and isinstance(rows[0], dict) else {}
        facts = rows.pop(0) if first.get("format") == FORMAT else {}
    for number, row in enumerate(rows):
        if wrong := _row_wrong(row):
            raise UserError(f"{path}: row {number} {wrong}")
    return facts, rows


def _row_wrong(row: Any) -> str | None:
    if not isinstance(row, Mapping) or type(row.get("position")) is not int or row["position"] < 0:
        return "needs position: a whole number of tokens from 0"
    if told := next((why for name, why in REFUSED.items() if row.get(name)), None):
        return f"{told}, which cannot be imported"
    tokens = row.get("tokens")
    if tokens is not None:
        good = isinstance(tokens, list) and tokens and all(type(one) is int for one in tokens)
        return None if good else f"has tokens={tokens!r:.40}; they must be a list of numbers"
    good = isinstance(row.get("text"), str) and row["text"]
    return None if good else "has neither tokens nor text"


def fixed_of(path: Path, setting: Setting) -> Fixed:
    """Return the insertions of a file as exposures with their places.

    Raises:
        UserError: tokens of another tokenizer; a row that leaves its sequence or the run, or that
            overlaps another.
    """
    facts, rows = read_insertions(path)
    where = f"{WHERE}={path}"
    if not rows:
        raise UserError(f"{where}: has no insertions")
    with_tokens = any(row.get("tokens") is not None for row in rows)
    theirs = facts.get("tokenizer_sha256")
    if with_tokens and theirs not in (None, setting.tokenizer.sha256):
        raise UserError(
            f"{where}: its tokens are of another tokenizer ({str(theirs)[:12]}...); take out the "
            "column tokens, so that its texts are tokenized, or use that tokenizer"
        )
    dtype = token_dtype(setting.tokenizer.vocabulary_size)
    texts = _tokens_of(rows, setting, where)
    position = np.array([row["position"] for row in rows], dtype=np.int64)
    lengths = np.array([len(ids) for ids in texts], dtype=np.int64)
    _refuse_misplaced(position, lengths, setting, where)
    slot, offset = np.divmod(position, setting.sequence_length)
    names = [
        f"{number}:{row.get('experiment') or ''}/{row.get('unit') or ''}"
        for number, row in enumerate(rows)
    ]
    count = np.arange(len(rows), dtype=np.int32)
    request = Request(
        experiment=RESERVED,
        unit_keys=text_keys(names),
        unit=count,
        repetition=np.zeros(len(rows), dtype=np.int32),
        text=count,
        first_slot=slot,
        last_slot=slot + 1,
        texts=Texts.of(texts, dtype),
    )
    claims = Claims.none().add(position, position + lengths)
    return Fixed(request, Placed(slot, offset, claims), tuple(names))


def shown_problems(path: Path, questions: Sequence[Question]) -> list[Problem]:
    """Return the experiments whose units, held-out ones too, an imported set shows word for word:
    nobody drew that, so it would be no randomized comparison.
    """
    texts = {str(row.get("text") or "").strip() for row in read_insertions(path)[1]} - {""}
    found = []
    for question in questions:
        shown = [
            unit.id for unit in question.units if any(text.strip() in texts for text in unit.texts)
        ]
        if shown:
            message = (
                f"shows {len(shown)} units of {question.name} ({', '.join(shown[:3])}), whether "
                "they are held out or not; take other items, or leave those rows out"
            )
            found.append(Problem(WHERE, message))
    return found


def _tokens_of(
    rows: Sequence[Mapping[str, Any]], setting: Setting, where: str
) -> list[np.ndarray[Any, Any]]:
    bare = [row["text"] for row in rows if row.get("tokens") is None]
    encoded = iter(setting.tokenizer.encode_batch(bare))
    found = [
        np.array(row["tokens"] if row.get("tokens") is not None else next(encoded), dtype=np.int64)
        for row in rows
    ]
    vocabulary = setting.tokenizer.vocabulary_size
    for number, ids in enumerate(found):
        if not len(ids) or ids.min() < 0 or ids.max() >= vocabulary:
            raise UserError(f"{where}: row {number} has tokens outside 0 to {vocabulary - 1:,}")
    return found


def _refuse_misplaced(
    position: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], setting: Setting, where: str
) -> None:
    length = setting.sequence_length
    stop = position + lengths
    crossing = np.flatnonzero(position // length != (stop - 1) // length)
    if len(crossing):
        raise UserError(
            f"{where}: {len(crossing):,} of {len(position):,} rows (the first is {crossing[0]}) "
            f"cross the end of a sequence of {length:,} tokens; set data.sequence_length to that "
            "of the run that they come from"
        )
    end = setting.steps.slots_before(setting.steps_total) * length
    if len(late := np.flatnonzero(stop > end)):
        raise UserError(
            f"{where}: {len(late):,} of {len(position):,} rows (the first is {late[0]}) lie after "
            f"the end of this run at {end:,} tokens; train longer, or leave them out"
        )
    order = np.argsort(position, kind="stable")
    clash = np.flatnonzero(stop[order][:-1] > position[order][1:])
    if len(clash):
        one, other = order[clash[0]], order[clash[0] + 1]
        raise UserError(f"{where}: rows {one} and {other} overlap")


def facts_of_import(path: Path, fixed: Fixed) -> dict[str, Any]:
    """Return what a frozen definition says of an imported set."""
    return {
        "sha256": sha256_hex(path.read_bytes()),
        "insertions": len(fixed.names),
        "tokens": int(fixed.request.texts.lengths().sum()),
    }
