from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from motet.core import hashing
from motet.core.hashing import canonical_json, sha256_file, sha256_hex


def test_equal_values_have_one_text_and_it_is_json() -> None:
    assert canonical_json({"b": [1, 2.5], "a": "é"}) == '{"a":"é","b":[1,2.5]}'
    assert canonical_json({"a": "é", "b": [1, 2.5]}) == canonical_json({"b": [1, 2.5], "a": "é"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


def test_text_is_hashed_as_utf8_and_bytes_as_they_are() -> None:
    expected = hashlib.sha256("é".encode()).hexdigest()
    assert sha256_hex("é") == sha256_hex("é".encode()) == sha256_hex(memoryview("é".encode()))
    assert sha256_hex("é") == expected


def test_a_file_is_hashed_in_pieces_that_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "_PIECE_BYTES", 4)
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    told: list[int] = []
    assert sha256_file(path, told.append) == sha256_hex(b"0123456789")
    assert told == [4, 4, 2]
