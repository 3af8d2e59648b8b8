"""The public API: small, lazy, documented, and its page runs."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import motet
from tests.kept_runs import unpack

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"


@pytest.fixture(scope="module")
def maker() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_dir_shows_the_public_names_and_each_can_be_had() -> None:
    assert dir(motet) == sorted(motet.__all__)
    assert {"load", "load_runs", "Guest", "RunDir", "UserError"} <= set(dir(motet))
    for name in dir(motet):
        assert getattr(motet, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        motet.lode  # noqa: B018


def test_a_star_import_gives_the_public_names() -> None:
    found: dict[str, Any] = {}
    exec("from motet import *", found)
    assert set(motet.__all__) <= set(found)


def test_importing_motet_loads_nothing_but_itself() -> None:
    code = "import sys; before = set(sys.modules); import motet; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new = set(done.stdout.split())
    assert {name for name in new if name.startswith("motet")} == {"motet"}
    assert not new & {"pandas", "numpy", "torch", "yaml"}


def test_opening_a_run_loads_no_pandas() -> None:
    code = "import sys, motet; motet.load; print(*{'pandas', 'numpy', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


PLUGIN_NAMES = {
    "Experiment", "Family", "Hook", "HookContext", "ItemScores", "ItemTable", "Member",
    "OutcomeSpec", "ProbeItem", "Scheduler", "Unit", "generated_texts", "per_token",
}  # fmt: skip


def test_a_file_of_classes_of_ones_own_loads_no_torch_by_what_it_imports() -> None:
    code = (
        f"import sys; from motet import {', '.join(sorted(PLUGIN_NAMES))}; "
        "print(*{'torch', 'scipy', 'pandas', 'omegaconf', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_type_checkers_see_every_public_name() -> None:
    tree = ast.parse((ROOT / ".src" / "motet" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == motet._PUBLIC
    assert motet.Plan is motet.ExposurePlan


def test_everything_that_the_page_shows_says_what_it_is(maker: types.ModuleType) -> None:
    silent = [
        f"{name}.{member}"
        for name, value in maker.public().items()
        if isinstance(value, type)
        for member, _, doc in maker.members(value)
        if not doc
    ]
    silent += [name for name, value in maker.public().items() if not value.__doc__]
    assert not silent


def test_the_examples_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = unpack(tmp_path) / "runs"
    (runs / "finished").rename(runs / "demo")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    shown = capsys.readouterr().out
    for told in ("positive-control", "(4, ", "runs/nowhere does not exist"):
        assert told in shown
