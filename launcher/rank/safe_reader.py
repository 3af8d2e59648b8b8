"""Reading a distributed checkpoint without running code that someone put into it.

DCP keeps its index as a pickle, and pickles can call any function. This reader unpickles it with an
allow-list of the plain record types that an index consists of, and refuses any entry that is not a
tensor (those would be unpickled too).
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from motet.core.errors import UserError

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


class _IndexUnpickler(pickle.Unpickler):
    """Builds the records of an index and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, which no checkpoint index needs"
        )


class SafeReader(FileSystemReader):
    """A FileSystemReader for checkpoints of tensors, whose index cannot run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index.

        Raises:
            UserError: the index is damaged, holds anything but plain records, or an entry that is
                not a tensor.
        """
        path = Path(self.path) / ".metadata"
        try:
            metadata = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
        except FileNotFoundError:
            raise UserError(f"checkpoint {path.parent}: its index .metadata is missing") from None
        except Exception as error:  # a damaged pickle can raise anything
            raise UserError(f"checkpoint {path.parent}: its index was refused: {error}") from None
        entries = getattr(metadata, "state_dict_metadata", None)
        if not isinstance(metadata, Metadata) or not isinstance(entries, dict):
            raise UserError(f"checkpoint {path.parent}: its index is not one")
        for name, entry in entries.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise UserError(f"checkpoint {path.parent}: {name!r} is not a tensor; refused")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
