"""Reading a distributed checkpoint without running code that someone put into it.

DCP keeps its index as a pickle, and pickles can call any function. This reader unpickles it with an
allow-list of the plain record types that an index consists of, and refuses any entry that is not a
tensor (those would be unpickled too).
"""

from __future__ import annotations

import io
import pickle
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from motet.core.errors import UserError
from motet.core.files import read_json
from motet.core.hashing import sha256_hex

_RECORDS = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *(
        (_RECORDS, name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "BytesStorageMetadata",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
}


_NO_STATE = "it changes {}, which is not a record that it made"


class _IndexUnpickler(pickle._Unpickler):
    """Builds the records of an index and nothing else.

    The reader in Python, which can be told what BUILD may do: with a class on the stack, that sets
    attributes of the class itself, for the whole process.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, which no checkpoint index needs"
        )

    def load_build(self) -> None:
        """Give a record its fields: those of its class, and no others."""
        stack: list[Any] = self.stack  # type: ignore[attr-defined]
        state, record = stack.pop(), stack[-1]
        kind = type(record)
        if isinstance(record, type) or not is_dataclass(record):
            raise pickle.UnpicklingError(_NO_STATE.format(repr(record)[:80]))
        if isinstance(record, TensorProperties) and type(state) is tuple:
            record.__setstate__(state)
            return
        known = {field.name for field in fields(kind)}
        if type(state) is not dict or not known.issuperset(state):
            raise pickle.UnpicklingError(f"it gives a {kind.__name__} other fields than its own")
        for name, value in state.items():
            object.__setattr__(record, name, value)

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: load_build,
    }


class SafeReader(FileSystemReader):
    """A FileSystemReader for checkpoints of tensors, whose index cannot run code; it reads no file
    that the checkpoint's manifest does not list.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index, whose hash is checked before anything is made of it.

        Raises:
            UserError: the index is damaged, holds anything but plain records, an entry that is not
                a tensor, or names a file that the manifest does not list.
        """
        folder = Path(self.path)
        listed = read_json(folder / "manifest.json").get("files")
        try:
            metadata = _IndexUnpickler(io.BytesIO(_index(folder, listed))).load()
        except UserError:
            raise
        except Exception as error:  # a damaged pickle can raise anything
            raise UserError(f"checkpoint {folder}: its index was refused: {error}") from None
        entries = getattr(metadata, "state_dict_metadata", None)
        stored = getattr(metadata, "storage_data", None)
        if (
            not isinstance(metadata, Metadata)
            or not isinstance(entries, dict)
            or not isinstance(stored, dict)
        ):
            raise UserError(f"checkpoint {folder}: its index is not one")
        for name, entry in entries.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise UserError(f"checkpoint {folder}: {name!r} is not a tensor; refused")
        for place in stored.values():
            file = getattr(place, "relative_path", None)
            if not isinstance(file, str) or Path(file).name != file or file not in listed:
                raise UserError(
                    f"checkpoint {folder}: its index names {str(file)!r}, which its manifest does "
                    "not list; refused"
                )
            if getattr(place, "transform_descriptors", None):
                raise UserError(f"checkpoint {folder}: {file} is to be transformed; refused")
        if not isinstance(metadata.storage_meta, StorageMeta):
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _index(folder: Path, listed: Any) -> bytes:
    """The bytes of an index, as the manifest knows them."""
    try:
        content = (folder / ".metadata").read_bytes()
    except FileNotFoundError:
        raise UserError(f"checkpoint {folder}: its index .metadata is missing") from None
    known = listed.get(".metadata") if isinstance(listed, dict) else None
    if not isinstance(known, dict):
        raise UserError(f"checkpoint {folder}: its manifest does not list its index; refused")
    if known.get("sha256") != sha256_hex(content):
        raise UserError(f"checkpoint {folder}: .metadata was altered since it was written")
    return content
