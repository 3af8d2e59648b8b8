"""The pages agree with the code: links, paths, tests, commands and settings that they name
exist.
"""

from __future__ import annotations

import dataclasses
import re
import runpy
import shlex
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

from motet.experiments.design.parser import KEYS
from motet.launcher import cli
from motet.launcher.commands import options
from motet.launcher.config.sections import RunSettings
from motet.launcher.config.typed import fields_of
from motet.models.family.nested import OPTIONS
from motet.models.family.progressive import OPTIONS as PROGRESSIVE

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / n for n in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEREDOC = re.compile(r"<<'(\w+)'([^\n]*)\n.*?^\1$", re.MULTILINE | re.DOTALL)
PATH = re.compile(
    r"(?<![\w./-])((?:docs|tests|bench|core|launcher|experiments|models|parallel|slurm)/[\w./-]*\.\w+)"
    r"(?:::(\w+))?"
)
SETTING = re.compile(
    r"(?<![\w./-])((?:model|data|batch|training|experiments|probes|checkpoint|layout|metrics)"
    r"(?:\.[a-z_0-9*]+)+)(?![\w(/])"
)
FILE_SUFFIXES = (".md", ".py", ".json", ".jsonl", ".yaml", ".npz")
MODULES = re.compile(r"motet\.[\w.]+")
PLACEHOLDER = "a.b.c"


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    plain = re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", ""))
    return plain.replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return {slug(h) for h in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def shell_lines(text: str) -> Iterator[str]:
    """Yield the command lines of the shell blocks, without the files that they write."""
    for language, block in FENCE.findall(text):
        if language == "sh":
            joined = HEREDOC.sub(r"\2", block).replace("\\\n", " ")
            yield from joined.splitlines()


def commands(text: str) -> Iterator[list[str]]:
    """Yield the arguments of every `motet ...` of the shell blocks."""
    for line in shell_lines(text):
        for piece in re.split(r"[;|&]+", line.partition(" #")[0]):
            words = shlex.split(piece)
            while words and "=" in words[0]:
                words.pop(0)
            if words[:1] == ["motet"]:
                yield words[1:]


def known_setting(path: str) -> bool:
    """Return whether a.b.c is a setting; numbers and `*` stand for places in a list."""
    hint: Any = RunSettings
    for key in path.split("."):
        if dataclasses.is_dataclass(hint):
            fields = fields_of(typing.cast(type, hint))
            if key == "*":
                return True
            if key not in fields:
                return False
            hint = fields[key][1]
        elif typing.get_origin(hint) is tuple and (key == "*" or key.isdecimal()):
            hint = typing.get_args(hint)[0]
        elif typing.get_origin(hint) is Mapping:
            own = ("layout.deepspeed.", "scheduler_options.")  # keys of others
            family = path.startswith("family.options.") and key in {*OPTIONS, *PROGRESSIVE}
            return key in KEYS or path.startswith(own) or family
        else:
            return False
    return True


def setting_names(text: str) -> set[str]:
    """Return the dotted settings that a page names in code, in prose or in commands."""
    pieces = [MODULES.sub("", piece) for piece in inline_code(text)]
    pieces += [" ".join(arguments) for arguments in commands(text)]
    named = {match for piece in pieces for match in SETTING.findall(piece)}
    return {name for name in named if not name.endswith(FILE_SUFFIXES)}


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command line's own parser; a mistake raises instead of exiting."""

    def fail(self: object, message: str) -> NoReturn:
        raise ValueError(message)

    monkeypatch.setattr(options.Parser, "error", fail)
    return cli._parse


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_test_that_a_page_names_exists(page: Path) -> None:
    for name, test in PATH.findall(page.read_text(encoding="utf-8")):
        path = ROOT / name
        assert path.exists(), name
        assert not test or f"def {test}(" in path.read_text(encoding="utf-8"), f"{name}::{test}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_one(page: Path, parse: Any) -> None:
    text = page.read_text(encoding="utf-8")
    for arguments in commands(text):
        parse(arguments)
    for code in inline_code(text):
        if not re.match(r"motet [a-z]", code) or " | " in code:
            continue
        words = ["1" if word == "N" else word for word in shlex.split(code)[1:]]
        why = ""
        try:
            parse(words)
        except ValueError as error:
            why = str(error)
        except SystemExit:  # --help
            pass
        assert not why or "required" in why, f"{code}: {why}"  # prose may leave arguments out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_that_a_page_names_exists(page: Path) -> None:
    unknown = {
        name
        for name in setting_names(page.read_text(encoding="utf-8"))
        if name != PLACEHOLDER and not known_setting(name)
    }
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_yaml_of_a_page_has_known_settings_only(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    blocks = [block for language, block in FENCE.findall(text) if language == "yaml"]
    blocks += re.findall(r"<<'YAML'\n(.*?)^YAML$", text, re.MULTILINE | re.DOTALL)
    for block in blocks:
        for name in paths_of(yaml.safe_load(block)):
            assert known_setting(name), name


def paths_of(value: Any, path: str = "") -> Iterator[str]:
    """Yield the dotted path of every setting; what lies inside an experiment's own keys is its
    room's affair.
    """
    if path.count(".") >= 3 and path.startswith("experiments.list."):
        yield path
    elif isinstance(value, Mapping):
        for key, child in value.items():
            is_list = path == "" and key == "experiments" and isinstance(child, list)
            inner = "experiments.list" if is_list else f"{path}.{key}".lstrip(".")
            yield from paths_of(child, inner)
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for number, child in enumerate(value):
            yield from paths_of(child, f"{path}.{number}")
    else:
        yield path


def test_the_checks_see_a_mistake(parse: Any) -> None:
    text = (
        "```sh\nmotet train run.yaml \\\n  layout.procesess=2  # two\nmotet tarin x "
        "&\n```\n`batch.sequenses`"
    )
    first, second = commands(text)
    assert first == ["train", "run.yaml", "layout.procesess=2"]
    with pytest.raises(ValueError, match="'tarin'"):
        parse(second)
    assert setting_names(text) == {"layout.procesess", "batch.sequenses"}
    assert not any(map(known_setting, setting_names(text)))
    assert known_setting("data.corpora.0.weight")
    assert known_setting("experiments.list.0.doses")
    assert not known_setting("experiments.list.0.dosis")


def test_the_page_of_the_public_api_is_what_make_docs_writes() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_api.py"))["page"]()
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == made, "run `make docs`"
