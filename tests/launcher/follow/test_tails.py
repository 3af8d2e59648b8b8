"""Ends of files: lines made harmless, read from behind, followed while others write."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from motet.launcher.follow.tails import BLOCK_BYTES, LONGEST_LINE_BYTES, Tail, clean, last_bytes


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (b"plain \xc3\xa9\n", "plain é"),
        (b"\x1b[1;31mred\x1b[0m", "red"),
        (b"10%\r 50%\r100%\r\n", "100%"),
        (b"\x1b]0;title\x07text", "text"),
        (b"\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        (b"\x1bPpayload\x1b\\after", "after"),
        (b"bell\x07 back\x08", "bell\\x07 back\\x08"),
        (b"a\tb", "a\tb"),
        (b"\xff\xfebytes", "\ufffd\ufffdbytes"),
        ("turned \u202e around".encode(), "turned \\u202e around"),
        ("c1 \x9b31mx".encode(), "c1 x"),
        (b"\x1b", "\\x1b"),
        (b"", ""),
    ],
)
def test_a_line_can_do_a_terminal_no_harm(line: bytes, shown: str) -> None:
    assert clean(line) == shown
    assert "\x1b" not in clean(line)


def test_only_the_last_lines_of_a_large_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    lines = [f"line {i} {'x' * (i % 97)}" for i in range(200_000)]
    path.write_text("\n".join(lines) + "\n")
    assert path.stat().st_size > 100 * BLOCK_BYTES
    started_s = time.perf_counter()
    for count in (1, 20, 3000):
        assert Tail(path, count).read() == lines[-count:]
    assert Tail(path, 0).read() == []
    assert time.perf_counter() - started_s < 1.0


@pytest.mark.parametrize("text", ["", "\n", "a", "a\n", "a\nb", "a\nb\n", "\n\n\n", "a\n\nb\n"])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 10])
def test_the_last_lines_are_those_of_the_whole_file(tmp_path: Path, text: str, count: int) -> None:
    path = tmp_path / "log"
    path.write_text(text)
    assert Tail(path, count).read(flush=True) == (text.splitlines()[-count:] if count else [])


def test_a_followed_file_gives_each_line_once_and_a_torn_one_when_it_is_whole(
    tmp_path: Path,
) -> None:
    path = tmp_path / "log"
    path.write_text("one\ntw")
    tail = Tail(path, 10)
    assert tail.read() == ["one"]
    assert tail.read() == []
    with path.open("a") as stream:
        stream.write("o\nthree")
    assert tail.read() == ["two"]
    assert tail.read(flush=True) == ["three"]
    assert tail.read(flush=True) == []


def test_a_file_that_begins_later_is_cut_or_replaced_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "log"
    tail = Tail(path, 5)
    assert tail.read() == []
    path.write_text("first\n")
    assert tail.read() == ["first"]
    path.write_text("cut\n")
    assert tail.read() == ["cut"]
    (tmp_path / "new").write_text("another file, longer than the one before\n")
    (tmp_path / "new").rename(path)
    assert tail.read() == ["another file, longer than the one before"]
    path.unlink()
    assert tail.read() == []


def test_a_line_without_an_end_is_shown_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"x" * (3 * LONGEST_LINE_BYTES))
    pieces = Tail(path, 1).read()
    assert [len(piece) for piece in pieces] == [LONGEST_LINE_BYTES] * 2


def test_the_last_bytes_begin_with_a_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_text("first line\nsecond line\nthird")
    assert last_bytes(path, 12) == b"third"
    assert last_bytes(path, 1000) == path.read_bytes()
    assert last_bytes(tmp_path / "missing", 10) == b""
