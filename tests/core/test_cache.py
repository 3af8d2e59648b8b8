"""What can be computed again is kept, and nothing is lost when it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from motet.core.cache import cache_file, recall, remember


def test_a_result_is_kept_by_kind_and_key_and_a_damaged_or_unwritable_file_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = cache_file("power", "0a1b")
    assert file == tmp_path / "cache" / "motet" / "power" / "0a1b.json"
    assert recall(file) is None
    remember(file, {"size": 0.5})
    assert recall(file) == {"size": 0.5}
    file.write_text("{")
    assert recall(file) is None
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    remember(cache_file("power", "0a1b"), {"size": 0.5})
    assert recall(cache_file("power", "0a1b")) is None
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_file("scans", "2c") == tmp_path / ".cache" / "motet" / "scans" / "2c.json"
