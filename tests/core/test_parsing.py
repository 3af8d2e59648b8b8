"""JSON and YAML of any depth are an error in words; nothing else in the tree parses them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from motet.core.errors import UserError
from motet.core.files import read_json
from motet.core.parsing import parse_json, parse_yaml
from motet.experiments.corpora.json_files import records_of, why_no_documents
from motet.launcher.config.yaml_tree import parse
from motet.parallel.cluster import file as cluster_file

ROOT = Path(__file__).parents[2]
ROOMS = ("core", "experiments", "launcher", "models", "parallel", "slurm")
DEEP = {
    "brackets": "a: " + "[" * 10_000 + "]" * 10_000,
    "braces": "a: " + "{a: " * 10_000 + "}" * 10_000,
    "never closed": "[" * 10_000,
    "blocks": "\n".join(f"{' ' * n}n:" for n in range(3_000)),
    "dashes": "- " * 10_000 + "x",
    "questions": "? " * 10_000 + "x",
    "quite deep": "[" * 60 + "]" * 60,
}
BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
)
ITSELF = "a: &a [*a]"


@pytest.mark.parametrize("name", DEEP)
def test_deep_yaml_is_one_error_in_words(tmp_path: Path, name: str) -> None:
    for read in (parse_yaml, lambda text: parse(text, "run.yaml")):
        with pytest.raises(ValueError, match=r"nested|more than .* levels|expected"):
            read(DEEP[name])
    path = tmp_path / "cluster.yaml"
    path.write_text(DEEP[name])
    with pytest.raises(UserError, match=r"cluster\.yaml"):
        cluster_file.read(path)


def test_aliases_that_unfold_to_a_billion_values_are_refused(tmp_path: Path) -> None:
    for text in (BOMB, ITSELF):
        with pytest.raises(ValueError, match=r"aliases|levels|recursive"):
            parse_yaml(text)
    assert parse_yaml("a: &a [1, 2]\nb: *a\n") == {"a": [1, 2], "b": [1, 2]}
    assert parse_yaml("") is None


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 9_999 + "]" * 9_999])
def test_deep_json_is_one_error_in_words(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(text)
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(UserError, match=r"f\.json"):
        read_json(tmp_path / "f.json")


def test_a_first_record_that_is_deep_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text("[" * 10_000)
    assert "not JSON" in why_no_documents(path, "text")
    with pytest.raises(UserError, match=r"data\.json"):
        list(records_of(path))


def bare_calls(path: Path) -> list[str]:
    """Parsers that are called where no `RecursionError` is caught, and not on text of our own."""
    tree = ast.parse(path.read_text())
    caught: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and any(
            "RecursionError" in ast.unparse(one.type or ast.Constant("")) for one in node.handlers
        ):
            caught |= {inner for one in node.body for inner in ast.walk(one)}
    return [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("json.load", "json.loads", "yaml.safe_load", "yaml.load")
        and node not in caught
        and not ast.unparse(node.args[0]).startswith(("json.dumps", "canonical_json"))
    ]


def test_nothing_else_parses_what_others_wrote() -> None:
    """What a launch's own processes leave in their private folder may: it imports nothing of ours."""
    paths = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    found = [one for path in paths for one in bare_calls(path)]
    assert [one for one in found if "launch/meeting.py" not in one] == []
