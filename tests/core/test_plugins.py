"""A class of the user's own is loaded from one file or an installed module, and nothing else."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Protocol

import pytest

from motet.core.errors import UserError
from motet.core.plugins import (
    is_reference,
    keep_source,
    load_class,
    parse_reference,
    source_sha256,
)

GOOD = (
    "from tests.core.test_plugins import Song\n\n\nclass Psalm(Song):\n    words = 'beatus vir'\n"
)


class Song:
    words = ""


class Chant(ABC):
    @abstractmethod
    def sing(self) -> str: ...


class Sings(Protocol):
    def sing(self) -> str: ...

    def rest(self) -> None: ...


def load(folder: Path, text: str, base: type = Song, sha256: str | None = None) -> type:
    return load_class(parse_reference(text, "song.use"), folder, base, "song.use", sha256)


def error(folder: Path, text: str, base: type = Song) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, text, base)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(folder: Path, text: str, name: str = "songs.py") -> Path:
    (folder / name).write_text(text)
    return folder


def test_a_class_of_a_file_is_one_object_in_a_process_and_its_folder_is_on_no_path(
    tmp_path: Path,
) -> None:
    before = list(sys.path)
    psalm = load(write(tmp_path, GOOD), "songs.py:Psalm")
    assert issubclass(psalm, Song)
    assert load(tmp_path, "songs.py:Psalm") is psalm
    assert sys.path == before
    assert "songs" not in sys.modules
    assert not list(tmp_path.glob("__pycache__"))


def test_an_edited_file_is_loaded_anew(tmp_path: Path) -> None:
    first = load(write(tmp_path, GOOD), "songs.py:Psalm")
    second = load(write(tmp_path, GOOD.replace("beatus", "Beatus")), "songs.py:Psalm")
    assert (first.words, second.words) == ("beatus vir", "Beatus vir")  # type: ignore[attr-defined]


def test_a_file_with_the_name_of_an_installed_module_shadows_nothing(tmp_path: Path) -> None:
    write(tmp_path, "import json\n" + GOOD + "    kept = json.dumps([1])\n", "json.py")
    assert load(tmp_path, "json.py:Psalm").kept == "[1]"  # type: ignore[attr-defined]
    code = "import json, sys; print(json.__file__)"
    kept = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert str(tmp_path) not in kept.stdout


def test_a_dataclass_with_text_annotations_loads(tmp_path: Path) -> None:
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n" + GOOD
    write(
        tmp_path,
        text + "    @dataclass(frozen=True)\n    class Options:\n        verses: int = 3\n",
    )
    assert load(tmp_path, "songs.py:Psalm").Options().verses == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("songs.py:Psalm", ("songs.py", None, "Psalm")),
        ("my-songs.py:Psalm", ("my-songs.py", None, "Psalm")),
        ("choir.songs:Psalm", (None, "choir.songs", "Psalm")),
    ],
)
def test_both_forms_are_read(text: str, reference: tuple[str | None, str | None, str]) -> None:
    found = parse_reference(text, "song.use")
    assert (found.file, found.module, found.attribute) == reference
    assert is_reference(text)


@pytest.mark.parametrize(
    "text",
    [
        "songs.py",
        "songs.py:",
        ":Psalm",
        "songs.py:Psalm.Inner",
        "../songs.py:Psalm",
        "/tmp/songs.py:Psalm",
        "sub/songs.py:Psalm",
        ".songs.py:Psalm",
        "a\\songs.py:Psalm",
        "not a module:Psalm",
        "choir..songs:Psalm",
    ],
)
def test_anything_else_is_refused_with_the_forms_that_work(text: str) -> None:
    assert is_reference(text)
    with pytest.raises(UserError, match=r"song.use: is .*next to run\.yaml"):
        parse_reference(text, "song.use")


def test_names_of_built_in_kinds_are_no_references() -> None:
    assert not is_reference("memorization")


@pytest.mark.parametrize(
    ("source", "line", "said"),
    [
        ("class Psalm(:\n", 1, "SyntaxError: invalid syntax"),
        ("x = 1\nprint(nobody)\n", 2, "NameError: name 'nobody' is not defined"),
        ("\n\nraise SystemExit(3)\n", 3, "SystemExit: 3"),
        ("import no_such_module\n", 1, "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def f():\n    1 / 0\nf()\n", 2, "ZeroDivisionError: division by zero"),
        ("class Psalm:\n    pass\n", 1, "Psalm must extend tests.core.test_plugins.Song"),
        ("\nPsalm = 3\n", 2, "Psalm is 3; it must be a class"),
        ("\ndef Psalm():\n    pass\n", 2, "it must be a class"),
    ],
)
def test_a_mistake_in_the_file_is_one_error_with_its_line(
    tmp_path: Path, source: str, line: int, said: str
) -> None:
    message = error(write(tmp_path, source), "songs.py:Psalm")
    assert message.startswith("song.use: is 'songs.py:Psalm'; ")
    assert f"{tmp_path}/songs.py:{line}: " in message
    assert said in message


def test_bytes_that_are_no_source_are_one_error(tmp_path: Path) -> None:
    for content in (b"\xff\xfe\x00", b"x = 1\0", b"# coding: nonsense\n", b"x = '\xff'\n"):
        (tmp_path / "songs.py").write_bytes(content)
        assert "songs.py" in error(tmp_path, "songs.py:Psalm")


def test_a_missing_class_or_file_is_told_with_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    assert "has no class 'Psalms' (did you mean 'Psalm'?)" in error(tmp_path, "songs.py:Psalms")
    assert "it has Psalm" in error(tmp_path, "songs.py:Xyz")
    assert "(did you mean 'songs.py'?)" in error(tmp_path, "song.py:Psalm")


def test_a_class_that_lacks_methods_is_told_which(tmp_path: Path) -> None:
    source = "from tests.core.test_plugins import Chant\nclass Psalm(Chant):\n    pass\n"
    assert ":2: Psalm lacks sing" in error(write(tmp_path, source), "songs.py:Psalm", Chant)
    write(tmp_path, "class Psalm:\n    def rest(self):\n        pass\n")
    assert ":1: Psalm lacks sing" in error(tmp_path, "songs.py:Psalm", Sings)
    write(tmp_path, "class Psalm:\n    def rest(self): ...\n    def sing(self): ...\n")
    assert load(tmp_path, "songs.py:Psalm", Sings).__name__ == "Psalm"


def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "in").mkdir()
    write(tmp_path / "out", GOOD)
    (tmp_path / "in" / "songs.py").symlink_to(tmp_path / "out" / "songs.py")
    assert "is a link to" in error(tmp_path / "in", "songs.py:Psalm")


@pytest.mark.parametrize("helper", ["helpers.py", "helpers/__init__.py", "helpers/deep.py"])
@pytest.mark.parametrize(
    "how", ["import helpers", "from helpers import x", "from .helpers import x"]
)
def test_a_file_that_imports_its_neighbour_is_refused_even_where_it_would_work(
    tmp_path: Path, helper: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / helper).parent.mkdir(exist_ok=True)
    (tmp_path / helper).write_text("x = 1\n")
    message = error(write(tmp_path, f"\n{how}\n{GOOD}"), "songs.py:Psalm")
    assert f"{tmp_path}/songs.py:2: imports 'helpers', which lies next to it" in message


def test_a_folder_of_data_with_the_name_of_a_module_disturbs_nothing(tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    assert load(write(tmp_path, "import json\n" + GOOD), "songs.py:Psalm")


def test_the_snapshot_alone_is_read_once_the_source_is_kept(tmp_path: Path) -> None:
    plugins = tmp_path / "code" / "plugins"
    reference = parse_reference("songs.py:Psalm", "song.use")
    keep_source(reference, write(tmp_path, GOOD), plugins)
    frozen = source_sha256(reference, plugins)
    assert frozen == hashlib.sha256(GOOD.encode()).hexdigest()
    (tmp_path / "songs.py").unlink()
    assert load(plugins, "songs.py:Psalm", sha256=frozen)
    write(plugins, GOOD.replace("beatus", "Beatus"))
    with pytest.raises(UserError, match=r"not the source that the run was frozen with; restore"):
        load(plugins, "songs.py:Psalm", sha256=frozen)
    assert [path.name for path in plugins.iterdir()] == ["songs.py"]


def test_an_installed_module_is_imported_hashed_and_kept_for_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    (site / "choirbook").mkdir(parents=True)
    (site / "choirbook" / "__init__.py").write_text("")
    write(site / "choirbook", GOOD)
    monkeypatch.syspath_prepend(str(site))
    reference = parse_reference("choirbook.songs:Psalm", "song.use")
    psalm = load(tmp_path, "choirbook.songs:Psalm")
    assert psalm is sys.modules["choirbook.songs"].Psalm
    plugins = tmp_path / "plugins"
    keep_source(reference, tmp_path, plugins)
    assert (plugins / "installed" / "choirbook.songs.py").read_text() == GOOD
    frozen = source_sha256(reference, plugins)
    write(site / "choirbook", GOOD + "# a newer version\n")
    with pytest.raises(UserError, match=r"the frozen source is .*choirbook\.songs\.py"):
        load(plugins, "choirbook.songs:Psalm", sha256=frozen)


def test_what_a_class_needs_of_its_own_package_is_frozen_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A helper, the helper's helper in a package below, and a base class; nothing else."""
    root = tmp_path / "site" / "scriptorium"
    sources = {
        "__init__.py": "",
        "songs.py": "from .notes import pitch\nfrom scriptorium import base\n" + GOOD,
        "base.py": "WORDS = 1\n",
        "notes.py": "def pitch():\n    from scriptorium.deep.scale import STEP\n    return STEP\n",
        "deep/__init__.py": "LEVEL = 2\n",
        "deep/scale.py": "from ..notes import pitch\nimport json\nSTEP = 7\n",
        "unrelated.py": "COLOUR = 'red'\n",
    }
    for name, text in sources.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    reference, plugins = parse_reference("scriptorium.songs:Psalm", "song.use"), tmp_path / "kept"
    keep_source(reference, tmp_path, plugins)
    kept = sorted(path.name for path in (plugins / "installed").iterdir())
    needed = ["base", "deep", "deep.scale", "notes", "songs"]
    assert kept == [f"scriptorium.{name}.py" for name in needed]
    frozen = source_sha256(reference, plugins)
    assert load(plugins, "scriptorium.songs:Psalm", sha256=frozen)
    (root / "unrelated.py").write_text("COLOUR = 'blue'\n")
    assert source_sha256(reference, plugins) == frozen
    for name in ("base.py", "notes.py", "deep/__init__.py", "deep/scale.py"):
        (root / name).write_text(sources[name] + "# another\n")
        module = "scriptorium." + name.removesuffix(".py").replace("/", ".")
        module = module.removesuffix(".__init__")
        with pytest.raises(UserError, match=rf"of its package is another \({module}\)"):
            load(plugins, "scriptorium.songs:Psalm", sha256=frozen)
        (root / name).write_text(sources[name])
    (root / "notes.py").unlink()
    with pytest.raises(UserError, match="not the source that the run was frozen with"):
        load(plugins, "scriptorium.songs:Psalm", sha256=frozen)


def test_a_module_that_is_not_there_or_fails_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "is not installed" in error(tmp_path, "no_such_choir:Psalm")
    assert "No module named 'no_such'" in error(tmp_path, "no_such.choir:Psalm")
    assert "has no Python source file" in error(tmp_path, "sys:Psalm")
    write(tmp_path, "\n1 / 0\n", "broken_choir.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "broken_choir.py:2: ZeroDivisionError" in error(tmp_path, "broken_choir:Psalm")


def test_plugins_load_without_anything_heavy() -> None:
    code = "import sys, motet.core.plugins; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "yaml", "omegaconf"} & set(done.stdout.split())
