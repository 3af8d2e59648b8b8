"""The exact insertions of a study, for others: a row for each, with its place, text and tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from motet.core.errors import UserError
from motet.core.files import whole_file
from motet.core.hashing import canonical_json
from motet.core.parsing import parse_json
from motet.experiments.corpora.blocks import needed
from motet.experiments.corpora.tokenizer import Tokenizer
from motet.experiments.design.frozen import read_definition
from motet.experiments.design.imported import FORMAT
from motet.experiments.stream.exposure_plan import ExposurePlan
from motet.experiments.stream.placement import NOISE_FLAG, PLACEBO_FLAG, SHIFT_FLAG

ROWS_AT_ONCE = 4096
Row = dict[str, Any]


def insertions(folder: Path, tokenizer: Tokenizer) -> Iterator[Row]:
    """Yield every insertion of a frozen study (`plan/` of a run) in the order of its place.

    position: of its first token in the stream of the run, slot x sequence_length + offset; tokens:
    with the end-of-document tokens around it; text: the same without those; arm: null for what
    belongs to no question; placebo: base text for a held-out unit; moves_base: the base text after
    it was moved to the right, not overwritten; noise: the embeddings of its tokens had noise.
    """
    plan = ExposurePlan(folder / "exposures.plan")
    units = [_units(folder, name) for name in plan.experiments]
    rows = plan.exposures()
    for number in range(len(rows)):
        experiment = int(rows.experiment[number])
        slot, offset, flags = (
            int(column[number]) for column in (rows.slot, rows.offset, rows.flags)
        )
        tokens = _tokens_at(plan, slot, offset)
        unit, arm = units[experiment][int(rows.unit[number])]
        yield {
            "position": slot * plan.sequence_length + offset,
            "text": tokenizer.decode(tokens[tokens != tokenizer.eod]),
            "tokens": tokens.tolist(),
            "experiment": plan.experiments[experiment],
            "unit": unit,
            "arm": arm,
            "repetition": int(rows.repetition[number]),
            "placebo": bool(flags & PLACEBO_FLAG),
            "moves_base": bool(flags & SHIFT_FLAG),
            "noise": bool(flags & NOISE_FLAG),
        }


def _tokens_at(plan: ExposurePlan, slot: int, offset: int) -> np.ndarray[Any, Any]:
    return next(
        np.asarray(tokens, dtype=np.int64) for at, tokens in plan.lookup(slot) if at == offset
    )


def _units(folder: Path, name: str) -> list[tuple[str, str | None]]:
    """(id, arm) of every unit of an experiment; what is replaced in the base text has no arm."""
    lines = (folder / "units" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["id"], row.get("arm")) for row in map(parse_json, lines)]


def facts_of(folder: Path) -> Row:
    """Return what whoever uses a set of insertions has to know."""
    definition, sha256 = read_definition(folder)
    kept = ("seed", "steps_total", "batch", "sequence_length", "tokenizer_sha256", "plan_sha256")
    return {
        "format": FORMAT,
        "version": 1,
        "definition_sha256": sha256,
        **{name: definition[name] for name in kept},
    }


def write_insertions(folder: Path, tokenizer: Tokenizer, path: Path) -> int:
    """Write the insertions of a frozen study as Parquet, or as JSON lines where the name ends with
    .jsonl, and return how many they are.

    The facts are the metadata "motet" of the Parquet schema, or the first line.

    Raises:
        UserError: Parquet is asked for and pyarrow is not installed.
    """
    if path.suffix == ".jsonl":
        count = 0
        with whole_file(path) as file:
            file.write((canonical_json(facts_of(folder)) + "\n").encode())
            for row in insertions(folder, tokenizer):
                file.write((canonical_json(row) + "\n").encode())
                count += 1
        return count
    if path.suffix != ".parquet":
        raise UserError(f"{path}: give a name that ends with .parquet or .jsonl")
    return _write_parquet(folder, tokenizer, path)


def _write_parquet(folder: Path, tokenizer: Tokenizer, path: Path) -> int:
    pa, parquet = needed("pyarrow", path), needed("pyarrow.parquet", path)
    texts, flags = ("text", "experiment", "unit", "arm"), ("placebo", "moves_base", "noise")
    schema = pa.schema(
        [
            pa.field("position", pa.int64()),
            *(pa.field(name, pa.string()) for name in texts),
            pa.field("tokens", pa.list_(pa.int32())),
            pa.field("repetition", pa.int32()),
            *(pa.field(name, pa.bool_()) for name in flags),
        ],
        metadata={"motet": canonical_json(facts_of(folder))},
    )
    count, waiting = 0, list[Row]()
    with whole_file(path) as file, parquet.ParquetWriter(file, schema) as writer:
        for row in insertions(folder, tokenizer):
            waiting.append(row)
            count += 1
            if len(waiting) == ROWS_AT_ONCE:
                writer.write_table(pa.Table.from_pylist(waiting, schema))
                waiting = []
        writer.write_table(pa.Table.from_pylist(waiting, schema))
    return count
