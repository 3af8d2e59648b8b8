"""Which room may import which, what must stay light, and how large a file may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.imports import (
    ARROWS,
    ROOT,
    circles,
    folder_graph,
    graph,
    imports,
    modules,
    room_of,
    sources,
    tree,
)

# The folders of each room, the lowest first: a folder may use those before it. "." is the room's
# own modules. An arrow that would point up is a sign that something lies in the wrong folder.
FOLDERS: dict[str, tuple[str, ...]] = {
    "core": (".",),
    "experiments": (".", "corpora", "stream", "design", "library", "scoring", "analysis"),
    "models": (".", "growth", "family", "poa"),
    "parallel": (".", "layout", "runtime", "engines", "cluster", "cost", "planner"),
    "slurm": (".", "testbed"),
    "launcher": (
        "output",
        "config",
        "runs",
        "study",
        "planning",
        "rank",
        "launch",
        "jobs",
        "measure",
        "follow",
        "report",
        "guest",
        "commands",
        ".",
    ),
}
MOST_LINES, MOST_COLUMNS = 400, 100
MOST_FUNCTION_LINES, MOST_LONG_FUNCTIONS = 40, 0.01
LEAST_COMMENTS = 0.04
DENSE = ("parallel/planner/*.py", "parallel/cost/*.py", "parallel/runtime/context_parallel*.py")
"""Where the arithmetic is densest, and a comment's reason is missed most."""
STARTED = {f"motet.launcher{name}" for name in ("", ".batch", ".node", ".worker")}
"""What the launcher starts as processes of their own; run folders of every age know these names."""
LIGHT = {
    # module: what importing it must not load
    "motet": ("torch", "numpy", "omegaconf", "rich", "yaml", "argparse"),
    "motet.core.errors": ("torch", "numpy", "omegaconf", "rich", "yaml"),
    "motet.experiments.design.spec": ("torch", "numpy", "scipy"),
    "motet.experiments.library.kinds": ("torch", "scipy"),
    "motet.models.config": ("torch", "numpy"),
    "motet.models.architecture": ("torch", "numpy"),
    "motet.models.counts": ("torch", "numpy"),
    "motet.models.family.poa_list": ("torch",),
    "motet.parallel.layout.layout": ("torch",),
    "motet.parallel.layout.rules": ("torch",),
    "motet.parallel.cost.timeline": ("torch",),
    "motet.parallel.cost.stages": ("torch",),
    "motet.parallel.layout.collectives": ("torch",),
    "motet.parallel.layout.weights": ("torch",),
    "motet.launcher.planning.layout_facts": ("torch",),
    "motet.launcher.commands.layout.show": ("torch",),
    "motet.launcher.commands.cluster.show": ("torch", "numpy", "omegaconf", "rich"),
    "motet.launcher.planning.prediction": ("torch", "scipy"),
    "motet.parallel.cluster.probe.fit": ("torch", "numpy"),
    "motet.parallel.cluster.probe.result": ("torch", "numpy"),
    "motet.launcher.cli": ("torch", "numpy", "omegaconf", "rich", "yaml"),
    "motet.launcher.config.run_yaml": ("torch", "numpy", "omegaconf", "rich"),
    "motet.launcher.runs.rundir": ("torch", "numpy", "omegaconf", "rich"),
    "motet.launcher.launch.command": ("torch", "numpy", "omegaconf", "rich"),
    "motet.launcher.rank.worker": ("torch", "numpy", "omegaconf", "rich", "yaml"),
    "motet.launcher.launch.agent": ("torch", "numpy", "omegaconf", "rich", "yaml"),
    "motet.launcher.commands.train": ("torch", "numpy", "omegaconf", "rich"),
    "motet.launcher.commands.status": ("torch", "numpy", "omegaconf", "rich"),
    "motet.launcher.commands.logs": ("torch", "numpy", "omegaconf", "rich"),
    "motet.launcher.commands.cancel": ("torch", "numpy", "omegaconf", "rich"),
    "motet.launcher.commands.experiments.list": ("torch", "numpy", "omegaconf", "rich"),
    "motet.launcher.commands.submit": ("torch", "numpy", "omegaconf", "rich"),
    "motet.launcher.jobs.batch": ("torch", "numpy", "omegaconf", "rich"),
    "motet.launcher.jobs.node": ("torch", "numpy", "omegaconf", "rich"),
    "motet.slurm.script": ("torch", "numpy", "omegaconf", "rich", "yaml", "subprocess"),
    "motet.slurm.client": ("torch", "numpy", "omegaconf", "rich", "yaml"),
}


def up(module: str, other: str) -> bool:
    """Whether an import points up, from a room to another or inside a room."""
    room, its = room_of(module), room_of(other)
    if room != its:
        return its not in ARROWS[room]
    order = FOLDERS[room]
    return order.index(folder(other)) > order.index(folder(module))


def folder(module: str) -> str:
    parts = modules()[module].relative_to(ROOT).parts
    return parts[1] if len(parts) > 2 else "."


def test_every_folder_has_its_place() -> None:
    there = defaultdict(set)
    for module in modules():
        there[room_of(module)].add(folder(module))
    for room, folders in there.items():
        assert folders <= set(FOLDERS[room])


def test_no_arrow_points_up() -> None:
    wrong = {
        f"{module} imports {other}"
        for module, used in graph().items()
        for other in used
        if up(module, other)
    }
    assert not wrong


def named(text: str) -> Iterator[str]:
    """The modules that a text names: the longest part of a dotted name that is one."""
    for match in re.finditer(r"\bmotet(\.\w+)+", text):
        name = match[0]
        while name != "motet" and name not in modules():
            name = name.rpartition(".")[0]
        if name != "motet":
            yield name


def test_no_name_in_a_text_points_up() -> None:
    """A module that is named in a text, to be started or imported later, is an arrow too."""
    wrong = {
        f"{module} names {name}"
        for module, path in modules().items()
        for name in named(path.read_text(encoding="utf-8"))
        if up(module, name) and not (room_of(module) == "launcher" and name in STARTED)
    }
    assert not wrong


def test_modules_import_each_other_in_no_circle() -> None:
    found = circles(graph())
    assert not found


def test_folders_import_each_other_in_no_circle() -> None:
    edges = {folder: set(used) for folder, used in folder_graph().items()}
    found = circles(edges)
    assert not found


def test_a_circle_and_an_arrow_up_are_seen(tmp_path: Path) -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert up("motet.core.errors", "motet.launcher.cli")
    assert up("motet.launcher.config.run_yaml", "motet.launcher.commands.plan.ask")
    assert not up("motet.launcher.commands.plan.ask", "motet.launcher.config.run_yaml")
    assert list(named('x = "motet.launcher.cli.main"; motet.nothing')) == ["motet.launcher.cli"]
    file = tmp_path / "hidden.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nimport motet\n\n"
        "if TYPE_CHECKING:\n    from motet.launcher import cli\n\n"
        "def later():\n    import motet.core.errors\n    from motet import Guest\n"
        "    return motet.Stream, Guest, cli\n"
    )
    assert {
        "motet.launcher.cli",
        "motet.core.errors",
        "motet.launcher.guest.guest.Guest",
        "motet.experiments.stream.stream.Stream",
    } <= set(imports(file))


def test_the_launcher_reaches_layouts_of_models_through_parallel() -> None:
    """The launcher may read sizes, formats and counts of models; it shards nothing itself."""
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / "launcher").rglob("*.py"))
        for name in imports(path)
        if name.startswith(("torch.distributed.fsdp", "torch.distributed.tensor"))
    ]
    assert not wrong


def test_nothing_imports_a_bare_room() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in [
            *sources(),
            *sorted((ROOT / "tests").rglob("*.py")),
            *sorted((ROOT / "bench").rglob("*.py")),
        ]
        for name in imports(path)
        if name.split(".")[0] in ARROWS
    ]
    assert not wrong


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_stay_light(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & set(LIGHT[module])


def test_a_file_can_be_read_in_one_sitting() -> None:
    long = {
        str(path.relative_to(ROOT))
        for path in sources()
        if len(path.read_text(encoding="utf-8").splitlines()) > MOST_LINES
    }
    assert not long


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_functions_are_short() -> None:
    lines = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": (node.end_lineno or 0)
        - node.lineno
        + 1
        for path in sources()
        for node in functions(path)
    }
    long = [name for name, number in lines.items() if number > MOST_FUNCTION_LINES]
    assert len(long) <= MOST_LONG_FUNCTIONS * len(lines), long


def test_no_name_of_a_public_class_stands_twice() -> None:
    """Nor is another type called as a class is."""
    homes, types = defaultdict(list), set()
    for path in sources():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(str(path.relative_to(ROOT)))
        for line in tree(path).body:
            if isinstance(line, ast.Assign):
                types |= {target.id for target in line.targets if isinstance(target, ast.Name)}
    twice = {name for name, files in homes.items() if len(files) > 1}
    assert not twice
    both = types & homes.keys()
    assert not both


def test_every_folder_says_what_it_is_for() -> None:
    folders = {path.parent for path in sources()}
    silent = {
        str(folder.relative_to(ROOT))
        for folder in folders
        if not (folder / "__init__.py").exists()
        or not ast.get_docstring(tree(folder / "__init__.py"))
    }
    assert not silent


def comments(paths: Sequence[Path]) -> float:
    """The share of lines that are comments."""
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    return sum(line.lstrip().startswith("#") for line in lines) / len(lines)


def test_the_densest_arithmetic_gives_its_reasons() -> None:
    silent = {names for names in DENSE if comments(sorted(ROOT.glob(names))) < LEAST_COMMENTS}
    assert not silent


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in sources()
        if path.stat().st_size
        and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent


def test_every_room_is_linked_into_the_package() -> None:
    package = ROOT / ".src" / "motet"
    links = {path.name for path in package.iterdir() if path.is_symlink()}
    assert links == set(ARROWS)
    for room in ARROWS:
        assert (package / room).resolve() == ROOT / room
        assert not (package / room).readlink().is_absolute()


def test_a_wheel_holds_every_module_and_template(tmp_path: Path) -> None:
    import shutil
    import zipfile

    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    for name in (".src", *ARROWS):
        shutil.copytree(
            ROOT / name,
            tree / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"),
        )
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        str(tree),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    files = [
        p
        for room in ARROWS
        for p in (ROOT / room).rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    ]
    missing = [str(p) for p in files if f"motet/{p.relative_to(ROOT)}" not in held]
    assert not missing
    assert "motet/py.typed" in held
    assert "motet/__init__.py" in held
    assert not [name for name in held if name.startswith(("tests/", "launcher/"))]
