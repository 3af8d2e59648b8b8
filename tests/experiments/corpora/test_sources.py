"""Sources: every format gives its documents and ids; what cannot be read is named by line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from motet.core.errors import UserError
from motet.experiments.corpora import sources, splitting
from motet.experiments.corpora.blocks import ReadOptions
from motet.experiments.corpora.sources import (
    open_inputs,
    open_sources,
    read_documents,
    stdlib_sources,
)
from motet.experiments.corpora.splitting import split_text

RECORDS: list[dict[str, Any]] = [
    {"id": "first", "text": "Hello"},
    {"text": "no id: ü\n"},
    {"id": 7, "text": ""},
]


def json_lines(records: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def read(*inputs: object, **options: Any) -> list[tuple[str, str]]:
    return list(read_documents([str(name) for name in inputs], ReadOptions(**options)))


def expected(name: str, first: int) -> list[tuple[str, str]]:
    return [("first", "Hello"), (f"{name}:{first + 1}", "no id: ü\n"), ("7", "")]


def test_a_text_file_is_one_document_called_by_its_path(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfGr\xc3\xbc\xc3\x9fe\r\n")
    assert read(file) == [(str(file), "Grüße\r\n")]


def test_a_folder_gives_known_files_sorted_and_called_from_its_name_on(tmp_path: Path) -> None:
    names = ["b.md", "a/z.py", "a/b.rst", "c.txt.gz", "skip.bin", ".git/x.txt", "__pycache__/y.py"]
    for name in [*names, "settings.json"]:
        path = tmp_path / "books" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(b"zipped") if name.endswith("gz") else name.encode())
    (tmp_path / "books" / "d.jsonl").write_bytes(json_lines(RECORDS))
    documents = read(tmp_path / "books")
    text = [("books/a/b.rst", "a/b.rst"), ("books/a/z.py", "a/z.py"), ("books/b.md", "b.md")]
    lines = expected("books/d.jsonl", 1)
    assert documents == [*text, ("books/c.txt.gz", "zipped"), *lines]
    assert read(tmp_path / "books", glob="*.bin") == [("books/skip.bin", "skip.bin")]
    with pytest.raises(UserError, match=r"holds no \*.xyz"):
        read(tmp_path / "books", glob="*.xyz")


def test_every_file_of_a_folder_is_read_or_named_with_the_reason(tmp_path: Path) -> None:
    def line(text: str, **more: str) -> bytes:
        return json_lines([{"text": text, **more}])

    files = {
        "a.jsonl": line("a1") + line("a2"),
        "b.json": json.dumps([{"text": "b1"}, {"id": "two", "text": "b2"}], indent=1).encode(),
        "b2.json": json.dumps({"text": "pretty"}, indent=1).encode(),
        "b3.json": line("b3") + line("b4"),
        "c.jsonl.bz2": bz2.compress(line("c")),
        "c2.json.XZ": lzma.compress(json.dumps([{"text": "c2"}]).encode()),
        "c3.txt.bz2": bz2.compress(b"c3"),
        "d.csv": b"text\nd\n",
        "e.jsonl.lz4": b"?",
        "f": b"?",
        "package.json": b'{"name": "x"}',
        "settings.json": b"not json",
        "list.json": b"[1, 2]",
        "empty.json": b"",
        ".git/config": b"?",
        ".hidden.txt": b"?",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    sources, left_out = open_inputs([str(tmp_path)], ReadOptions())
    assert len(sources) == 7
    texts = dict(read(tmp_path))
    assert list(texts.values()) == ["a1", "a2", "b1", "b2", "pretty", "b3", "b4", "c", "c2", "c3"]
    assert texts[f"{tmp_path.name}/b.json:0"] == "b1"
    assert texts["two"] == "b2"
    assert {Path(p.setting).relative_to(tmp_path).as_posix(): p.message for p in left_out} == {
        "d.csv": "its suffix .csv is not known",
        "e.jsonl.lz4": "its suffix .lz4 is not known",
        "f": "it has no suffix",
        "package.json": "its first record has no field 'text' (set text_field)",
        "settings.json": "it is not JSON (Expecting value: line 1 column 1 (char 0))",
        "list.json": "its first record is int, not an object",
        "empty.json": "it is empty",
        ".git": "it is hidden",
        ".hidden.txt": "it is hidden",
    }
    with pytest.raises(UserError, match=r"d.csv: is a table, not text; save it as JSON lines"):
        read(tmp_path / "d.csv")
    with pytest.raises(UserError, match=r"settings.json:1: not JSON"):
        read(tmp_path / "settings.json")


def cut(text: str, split: str, piece_bytes: int = 7) -> list[str]:
    content = text.encode()
    pieces = [content[i : i + piece_bytes] for i in range(0, len(content), piece_bytes)]
    return list(split_text(pieces, split))


def test_a_long_text_is_cut_at_a_pattern_or_by_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splitting, "MARGIN", 16)
    stories = [f"Story {number}: Grüße.\n" for number in range(40)]
    assert cut("<|endoftext|>".join(stories), r"<\|endoftext\|>") == stories
    chapters = [f"CHAPTER {number}\nOf CHAPTER ends.\n" for number in range(40)]
    assert cut("".join(chapters), r"(?=^CHAPTER )") == chapters  # the heading stays
    assert cut("one\n\n\n\n\ntwo\n\nthree\n", r"\n{2,}") == ["one", "two", "three\n"]
    text = "".join(stories)
    pieces = cut(text, "50")
    assert "".join(pieces) == text
    assert all(len(piece) <= 50 and piece.endswith("\n") for piece in pieces)
    assert cut("a" * 7, "3") == ["aaa", "aaa", "a"]
    assert cut("ab cd ef", "4") == ["ab ", "cd ", "ef"]
    file = tmp_path / "book.txt"
    file.write_bytes("\ufeff".encode() + b"one\n---\nt\xffwo\n---\nthree\n")
    named = [(f"{file}:1", "one\n"), (f"{file}:3", "three\n")]
    assert read(file, split="^---\n", skip_bad=True) == named
    with pytest.raises(UserError, match=r"book.txt:2: the text is not valid Unicode"):
        read(file, split="^---\n")
    for split, why in (
        ("0", "0 characters"),
        ("(", "no regular"),
        ("x*", "matches nothing at all"),
    ):
        with pytest.raises(UserError, match=why):
            read(file, split=split)
    (tmp_path / "x.jsonl").write_bytes(json_lines(RECORDS))
    with pytest.raises(UserError, match="split='9' cuts text files, and no input is one"):
        read(tmp_path / "x.jsonl", split="9")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".json.gz"])
def test_json_lines_are_read_plain_and_compressed(tmp_path: Path, suffix: str) -> None:
    content = json_lines(RECORDS)
    if suffix.endswith(".gz"):
        content = gzip.compress(content)
    if suffix.endswith(".zst"):
        content = zstandard.compress(content)
    file = tmp_path / f"data{suffix}"
    file.write_bytes(content)
    assert read(file) == expected(str(file), 1)


def test_a_zst_file_of_several_frames_is_read_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl.zst"
    file.write_bytes(b"".join(zstandard.compress(json_lines([record])) for record in RECORDS))
    assert read(file) == expected(str(file), 1)


@given(st.lists(st.text(max_size=40), max_size=30), st.integers(1, 60), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_blocks_hold_whole_lines_and_do_not_depend_on_the_pieces_read(
    texts: list[str], block_bytes: int, piece_bytes: int
) -> None:
    content = json_lines([{"text": text} for text in texts])
    pieces = [content[i : i + piece_bytes] for i in range(0, len(content), piece_bytes)]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(sources, "BLOCK_BYTES", block_bytes)
        assert list(sources._cut_lines(pieces)) == list(sources._cut_lines([content]))
        file = Path(folder) / "x.jsonl"
        file.write_bytes(content)
        numbered = [(f"{file}:{line}", text) for line, text in enumerate(texts, start=1)]
        assert read(file) == numbered


def test_parquet_is_read_with_other_field_names(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.table({"body": [f"text {i}" for i in range(1200)], "n": list(range(1200))})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=500)
    documents = read(tmp_path / "x.parquet", text_field="body", id_field="n")
    assert documents == [(str(i), f"text {i}") for i in range(1200)]
    unnamed = read(tmp_path / "x.parquet", text_field="body")
    assert unnamed[1199][0] == f"{tmp_path / 'x.parquet'}:1199"
    with pytest.raises(UserError, match=r"has no field 'text'; it has body, n \(set text_field\)"):
        read(tmp_path / "x.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match=r"bad.parquet is not readable as parquet"):
        read(tmp_path / "bad.parquet")


def test_saved_data_sets_and_folders_of_data_files_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    rows = [{"id": f"row-{i}", "text": f"text {i}"} for i in range(5)]
    documents = [(row["id"], row["text"]) for row in rows]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "other": data}).save_to_disk(tmp_path / "many")
    assert read(tmp_path / "one") == documents
    assert read(tmp_path / "many", hub_split="other") == documents
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_bytes(json_lines(rows))
    for streaming in (True, False):
        assert read(f"hf:{tmp_path / 'files'}", streaming=streaming) == documents
    with pytest.raises(UserError, match=r"split='nope'\) cannot be loaded"):
        read(f"hf:{tmp_path / 'files'}", hub_split="nope")


@pytest.mark.parametrize(
    ("module", "name"), [("pyarrow.parquet", "x.parquet"), ("datasets", "hf:x")]
)
def test_a_missing_package_is_named_with_the_way_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"pip install 'motet\[data\]'"):
        open_sources([name], ReadOptions())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut of', "not a line of JSON"),
        (b'{"text": "\xff"}', "not a line of JSON"),
        (b"[1, 2]", "a JSON object is needed, not list"),
        (b'{"text": 5}', "field 'text' is int, not a string"),
        (b'{"text": null}', "field 'text' is NoneType, not a string"),
        (b'{"body": "x", "id": 1}', "has no field 'text'; it has body, id"),
        (b'{"text": "\\ud800"}', "not valid Unicode"),
    ],
)
def test_a_bad_line_is_named_or_left_out_and_counted(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'\n{"text": "good"}\n' + line + b'\n{"text": "good too"}')
    with pytest.raises(UserError, match=rf"data.jsonl:3: .*{reason}.*skip_bad"):
        read(file)
    options = ReadOptions(skip_bad=True)
    (block,) = open_sources([str(file)], options)[0].blocks(options)
    parsed = block.parse(options)
    assert [document.text for document in parsed.documents] == ["good", "good too"]
    (bad,) = parsed.bad
    assert "data.jsonl:3: " in bad


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"one\ntwo\nGr\xfc\xdfe")
    with pytest.raises(UserError, match=r"latin.txt:3: not UTF-8"):
        read(file)
    assert read(file, skip_bad=True) == []


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("suffix", list(PACK))
def test_a_compressed_file_that_was_cut_short_is_named(tmp_path: Path, suffix: str) -> None:
    pack = PACK[suffix]
    file = tmp_path / f"data.jsonl{suffix}"
    content = pack(json_lines([{"text": f"{i * i}"} for i in range(3000)]))
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=rf"data.jsonl{suffix} cannot be read"):
        read(file)
    file.write_bytes(b"")
    with pytest.raises(UserError, match=r"it is empty"):
        read(file)
    file.write_bytes(b"not compressed at all")
    with pytest.raises(UserError, match=rf"data.jsonl{suffix} cannot be read"):
        read(file)


def test_every_input_that_does_not_exist_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)2 problems.*nowhere.*neither"):
        read(tmp_path / "nowhere", tmp_path / "neither")


def test_the_standard_library_is_read_without_its_tests_and_installed_packages() -> None:
    paths = stdlib_sources()
    assert paths == sorted(paths)
    assert len(paths) > 300
    parts = {part for path in paths for part in path.parts[-3:]}
    assert not parts & {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    documents = read("stdlib:")
    assert len(documents) == len(paths)
    assert "json/decoder.py" in dict(documents)
