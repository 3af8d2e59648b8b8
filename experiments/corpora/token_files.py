"""Token files of other programs: where tokens lie in them, and what their headers say.

- `megatron`: Megatron-LM `NAME.bin` + `NAME.idx`. The index is magic `MMIDIDX\\0\\0`, u64 version
  1, u8 dtype code, u64 sequences, u64 entries of the document list; then i32 tokens per sequence,
  i64 byte offset per sequence, i64 document list (first sequence of each document, and the end).
  Source: megatron/core/datasets/indexed_dataset.py.
- `dolma`: Dolma/OLMo `.npy`, raw tokens without a header in spite of the name, or a true NumPy
  file (versions 1 to 3, one dimension). Source: the OLMo-core guide on data loading.
- `nanogpt`: `.bin` of raw tokens (nanoGPT), or with llm.c's header of 256 int32: magic 20240520,
  version 1 (uint16; modded-nanoGPT) or 20240801, version 7 (uint32), token count.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from motet.core.errors import UserError

I64 = npt.NDArray[np.int64]
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_HEADER = struct.Struct("<9sQBQQ")
MEGATRON_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
# Ids are never negative, so a signed file has the same bits as an unsigned one.
READABLE_DTYPES = {"uint16": "uint16", "int16": "uint16", "uint32": "uint32", "int32": "uint32"}
LLMC_HEADER_BYTES = 256 * 4
LLMC_DTYPES = {(20240520, 1): "uint16", (20240801, 7): "uint32"}


class TokenFile(NamedTuple):
    """Where the tokens lie in one foreign file."""

    path: Path
    dtype: str  # uint16 or uint32; "" for a file without a header
    offset_bytes: int
    n_tokens: int  # 0 for a file without a header
    document_starts: I64 | None = None  # None: found by looking for eod
    n_empty: int = 0  # documents of its list that hold no token

    def of_dtype(self, dtype: str) -> TokenFile:
        """Return a file without a header as one of tokens of `dtype`; others stay."""
        if self.dtype:
            return self
        return self._replace(
            dtype=dtype, n_tokens=self.path.stat().st_size // np.dtype(dtype).itemsize
        )


def read_megatron(path: Path) -> TokenFile:
    """Read `NAME.idx`, given that, `NAME.bin` or `NAME`."""
    base = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    idx, tokens = Path(f"{base}.idx"), Path(f"{base}.bin")
    content = _existing(idx).read_bytes()
    if len(content) < MEGATRON_HEADER.size or not content.startswith(MEGATRON_MAGIC):
        raise UserError(f"{idx} is not a Megatron index: it does not begin with MMIDIDX")
    _, version, code, n_sequences, n_entries = MEGATRON_HEADER.unpack_from(content)
    dtype = MEGATRON_DTYPES.get(code, f"code {code}")
    if version != 1 or dtype not in READABLE_DTYPES:
        raise UserError(f"{idx} has version {version}, dtype {dtype}; can read 1, uint16 or int32")
    at = MEGATRON_HEADER.size
    promised = at + 12 * n_sequences + 8 * n_entries
    if len(content) != promised:
        short = "is truncated" if len(content) < promised else "is longer than it says"
        raise UserError(
            f"{idx} {short}: {len(content)} bytes, {promised} for its {n_sequences} sequences and "
            f"{n_entries} entries of the document list"
        )
    lengths = np.frombuffer(content, "<i4", n_sequences, at).astype(np.int64)
    pointers = np.frombuffer(content, "<i8", n_sequences, at + 4 * n_sequences)
    documents = np.frombuffer(content, "<i8", n_entries, at + 12 * n_sequences)
    if (lengths < 0).any():
        raise UserError(f"{idx} is damaged: it has a sequence of {lengths.min()} tokens")
    _check_documents(idx, documents, n_sequences)
    itemsize = np.dtype(dtype).itemsize
    borders = np.concatenate([[0], np.cumsum(lengths)])
    if (pointers != borders[:-1] * itemsize).any():
        raise UserError(f"{idx} leaves gaps between sequences; cannot read that without copying")
    n_tokens = int(borders[-1])
    _check_size(tokens, n_tokens * itemsize, idx.name)
    begins, ends = borders[documents[:-1]], borders[documents[1:]]
    starts = begins[begins < ends]  # an empty document has no position
    n_empty = len(begins) - len(starts)
    return TokenFile(tokens, READABLE_DTYPES[dtype], 0, n_tokens, starts, n_empty)


def _check_documents(idx: Path, documents: I64, n_sequences: int) -> None:
    """Refuse a document list that does not go from the first sequence to the last, rising.

    An entry may stand twice: Megatron-LM writes that for a document without text.
    """
    wrong = ""
    if len(documents) < 2:
        wrong = f"has {len(documents)} entries, fewer than 2"
    elif documents[0] != 0:
        wrong = f"begins at sequence {documents[0]}, not 0"
    elif (np.diff(documents) < 0).any():
        place = int(np.flatnonzero(np.diff(documents) < 0)[0])
        wrong = f"falls from {documents[place]} to {documents[place + 1]} at entry {place + 1}"
    elif documents[-1] != n_sequences:
        wrong = f"ends at sequence {documents[-1]}, not at the {n_sequences} that there are"
    if wrong:
        raise UserError(
            f"{idx} is damaged: its document list {wrong}. Documents would be lost or joined; make "
            "the index again"
        )


def read_dolma(path: Path) -> TokenFile:
    """Read a `.npy` that is a true NumPy file, or raw tokens."""
    with _existing(path).open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            return TokenFile(path, "", 0, 0)
        file.seek(0)
        try:
            major, _ = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0
            if major > 1:
                read = np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
        except ValueError as error:
            raise UserError(f"{path} is a damaged NumPy file: {error}") from error
        offset_bytes = file.tell()
    if len(shape) != 1 or dtype.name not in READABLE_DTYPES or dtype.byteorder == ">":
        raise UserError(f"{path} holds {dtype} of shape {shape}; needs uint16 or uint32 [N]")
    _check_size(path, offset_bytes + shape[0] * dtype.itemsize, "its header")
    return TokenFile(path, READABLE_DTYPES[dtype.name], offset_bytes, int(shape[0]))


def read_nanogpt(path: Path) -> TokenFile:
    """Read a `.bin` with llm.c's header, or raw tokens."""
    with _existing(path).open("rb") as file:
        head = file.read(LLMC_HEADER_BYTES)
    if len(head) < LLMC_HEADER_BYTES:
        return TokenFile(path, "", 0, 0)
    magic, version, n_tokens = struct.unpack_from("<3i", head)
    if magic not in {known for known, _ in LLMC_DTYPES}:
        return TokenFile(path, "", 0, 0)
    if (magic, version) not in LLMC_DTYPES:
        raise UserError(f"{path} has header version {version}, which is unknown for {magic}")
    dtype = LLMC_DTYPES[magic, version]
    _check_size(path, LLMC_HEADER_BYTES + n_tokens * np.dtype(dtype).itemsize, "its header")
    return TokenFile(path, dtype, LLMC_HEADER_BYTES, n_tokens)


FORMATS: dict[str, Callable[[Path], TokenFile]] = {
    "megatron": read_megatron,
    "dolma": read_dolma,
    "nanogpt": read_nanogpt,
}


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    return path


def _check_size(path: Path, n_bytes: int, promised_by: str) -> None:
    size = _existing(path).stat().st_size
    if size != n_bytes:
        short = "is truncated" if size < n_bytes else "is longer than it should be"
        raise UserError(f"{path} {short}: {size} bytes, {promised_by} promises {n_bytes}")
