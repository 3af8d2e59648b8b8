"""docs/architecture.md and docs/glossary.md agree with the code: the picture, the walks, the
names.
"""

from __future__ import annotations

import re
from itertools import groupby

import pytest

from tests.architecture import PAGE, page_with, picture, shortest
from tests.imports import ROOT, folder_graph, graph, module_name

TEXT = PAGE.read_text(encoding="utf-8")
WALKS = dict(re.findall(r"^### (.*?)\n(.*?)(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL))
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")


def walk(begin: str) -> list[str]:
    """The files of a walk, in order."""
    (text,) = (text for heading, text in WALKS.items() if heading.startswith(begin))
    return re.findall(r"^\d+\. `([\w/.]+)`", text, re.MULTILINE)


def test_the_picture_shows_the_imports_as_they_are() -> None:
    assert page_with(TEXT, picture()) == TEXT, "make docs draws it anew"


def test_an_arrow_that_follows_from_others_is_left_out() -> None:
    edges = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert shortest(edges) == {("a", "b"), ("b", "c")}


@pytest.mark.parametrize("heading", WALKS)
def test_the_files_of_a_walk_exist_and_have_to_do_with_each_other(heading: str) -> None:
    files = [name for name in walk(heading) if name.endswith(".py") and "/" in name]
    names = []
    for name in files:
        assert (ROOT / name).exists(), name
        names.append(module_name(ROOT / name))
    edges = {(a, b) for a in graph() for b in graph()[a]}
    # a registry of the same folder stands for the classes in it
    edges |= {
        (a, b)
        for a, via in edges
        for b in graph()[via]
        if b.rpartition(".")[0] == via.rpartition(".")[0]
    }
    for name in names[1:]:
        assert any((name, other) in edges or (other, name) in edges for other in names), name


@pytest.mark.parametrize(
    ("heading", "most"),
    [("An exposure", 18), ("`tp`", 12), ("The cost", 9), ("A new scheduler", 6), ("A member", 9)],
)
def test_a_walk_is_no_longer_than_it_says(heading: str, most: int) -> None:
    (said,) = (text for text in WALKS if text.startswith(heading))
    assert f"at most {most} files" in said
    assert 0 < len(walk(heading)) <= most


def test_an_exposure_is_followed_folder_by_folder() -> None:
    folders = [name.rpartition("/")[0] for name in walk("An exposure")]
    visits = [folder for folder, _ in groupby(folders)]
    again = {folder for folder in visits if visits.count(folder) > 1}
    assert again <= {"launcher/rank"}


def test_every_name_of_the_glossary_lives_where_it_says() -> None:
    rows = re.findall(r"^\| (.*?) \| .*? \| .*? \| `([\w/.]+)`(?: `(\w+)`)? \|$", GLOSSARY, re.M)
    assert len(rows) > 25
    lines = [line for line in GLOSSARY.splitlines() if line.startswith("| ")]
    assert len(rows) == len(lines) - 1, "a row that this test cannot read"
    for word, file, name in rows:
        path = ROOT / file
        assert path.exists(), word
        if name:
            text = path.read_text(encoding="utf-8")
            assert re.search(rf"^(class|def|    def) {name}\b|^ *{name}\b\s*[:=]", text, re.M), word


def test_every_folder_is_in_the_picture() -> None:
    drawn = picture()
    for folder in folder_graph():
        room, _, name = folder.partition("/")
        assert name == "." or f'{room}_{name}["{name}"]' in drawn, folder
