"""The files of a Hugging Face folder, as far as headers and bytes tell; no tensor is made.

A safetensors file is u64 n, a JSON header of n bytes (name -> dtype, shape, data_offsets), and the
tensors' bytes. Source: the format's description at github.com/huggingface/safetensors.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from motet.core.parsing import parse_json
from motet.models.config import ModelConfig, ModelError
from motet.models.hf_config import config_from_hf

INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
PIECE_BYTES = 1 << 24
# dtype -> (unsigned type of its width, its exponent bits: all of them set is infinite or no number)
EXPONENTS = {
    "F64": ("<u8", 0x7FF0000000000000),
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}


class StoredTensor(NamedTuple):
    """Where one tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    first: int  # byte of the file
    stop: int

    def pieces(self, dtype: str = "u1") -> Iterator[npt.NDArray[Any]]:
        """Yield its bytes, as items of a type."""
        with self.file.open("rb") as file:
            file.seek(self.first)
            left = self.stop - self.first
            while left:
                content = file.read(min(left, PIECE_BYTES))
                left -= len(content)
                yield np.frombuffer(content, dtype)


def config_of_folder(folder: Path) -> ModelConfig:
    """Return the sizes of a folder's model; its output head is tied if it is in the weights, too.

    Where config.json ties it, but the weights hold a head that differs from the embedding, it was
    trained by itself: it stays apart, as in transformers.

    Raises:
        ModelError: as `config_from_hf` and `stored_tensors` do.
    """
    text = read_json(folder / "config.json")
    try:
        config = config_from_hf(text)
    except ModelError:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{folder / 'config.json'}: a value is of another type than it should be: {error}"
        ) from None
    if config.tied_embeddings and _has_own_head(stored_tensors(folder)):
        return replace(config, tied_embeddings=False)
    return config


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a folder's safetensors files, by name.

    Raises `ModelError` naming a file that is cut short or damaged.
    """
    return {name: found for file in weight_files(folder) for name, found in _header(file).items()}


def check_finite(tensors: dict[str, StoredTensor]) -> None:
    """Raise `ModelError` naming a tensor that holds an infinite value, or no number, or is
    quantized; reads all.
    """
    check_plain(tensors)
    for name, tensor in tensors.items():
        width, bits = EXPONENTS.get(tensor.dtype, ("", 0))
        if width and any(((piece & bits) == bits).any() for piece in tensor.pieces(width)):
            raise ModelError(
                f"{tensor.file}: tensor {name} holds NaN or infinite values; the model is broken, "
                "use an earlier checkpoint"
            )


def check_plain(tensors: dict[str, StoredTensor]) -> None:
    """Raise `ModelError` naming weights that are stored as integers or as eight-bit floats: what
    they stand for is their value times a scale, which is not read.
    """
    for name, tensor in tensors.items():
        if name.endswith((".weight", ".bias")) and tensor.dtype not in EXPONENTS:
            raise ModelError(
                f"{tensor.file}: tensor {name} is quantized ({tensor.dtype}); only "
                f"{', '.join(EXPONENTS)} are read: save the model dequantized"
            )


def _header(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ModelError(f"{file} is cut short: {size:,} bytes do not hold its header")
        try:
            header: dict[str, Any] = parse_json(opened.read(length))
            header.pop("__metadata__", None)
            found = {
                name: StoredTensor(
                    file,
                    entry["dtype"],
                    tuple(entry["shape"]),
                    *(8 + length + offset for offset in entry["data_offsets"]),
                )
                for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{file} is not a safetensors file: {error!r}") from error
    promised = max((tensor.stop for tensor in found.values()), default=8 + length)
    if size != promised:
        what = "cut short" if size < promised else "damaged"
        raise ModelError(f"{file} is {what}: {size:,} bytes, its header promises {promised:,}")
    return found


def _has_own_head(tensors: dict[str, StoredTensor]) -> bool:
    """Return whether the weights hold a head that differs from the embedding."""
    head, embedding = tensors.get(HEAD), tensors.get(EMBEDDING)
    if head is None or embedding is None:
        return False
    if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
        return True
    pieces = zip(head.pieces(), embedding.pieces(), strict=True)
    return any(not np.array_equal(one, other) for one, other in pieces)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder: the single one, else those of its index.

    That order is transformers' own: an index beside a single file is left over from a save in
    parts. Raises `ModelError` if there are none, or the index names others.
    """
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if (folder / INDEX).exists():
        listed = read_json(folder / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise ModelError(f"{folder / INDEX} has no weight_map of tensors")
        names = sorted(set(map(str, listed.values())))
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ModelError(
                    f"{folder / INDEX} names {name!r}, not a safetensors file beside it"
                )
            if not (folder / name).exists():
                raise ModelError(f"{folder / name} is missing; {INDEX} names it")
        return [folder / name for name in names]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise ModelError(
            f"{folder} has only pickled weights, which can run code and are not read; save the "
            "model "
            "as safetensors first (transformers: model.save_pretrained)"
        )
    raise ModelError(f"{folder} has no model.safetensors and no {INDEX}")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; `ModelError` if there is none."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist") from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value
