"""Which room may import which, what must stay light, and how large a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARROWS = {
    "core": set(),
    "experiments": {"core"},
    "models": {"core"},
    "parallel": {"core", "models"},
    "slurm": {"core"},
    "launcher": {"core", "experiments", "models", "parallel", "slurm"},
}
MOST_LINES = 475
LIGHT = {
    # module: what importing it must not load
    "motet": ("torch", "numpy", "omegaconf", "rich", "yaml", "argparse"),
    "motet.core.errors": ("torch", "numpy", "omegaconf", "rich", "yaml"),
    "motet.experiments.design.spec": ("torch", "numpy", "scipy"),
    "motet.experiments.library": ("torch", "scipy"),
    "motet.models.config": ("torch", "numpy"),
    "motet.models.counts": ("torch", "numpy"),
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
    "motet.launcher.config.load": ("torch", "numpy", "omegaconf", "rich"),
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


def sources() -> list[Path]:
    return sorted(path for room in ARROWS for path in (ROOT / room).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = ("motet", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imports(path: Path, module_level: bool = False) -> Iterator[str]:
    """Every module that a file imports, with what it takes from it; type-checking imports left out."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if type_checking(node) or (module_level and isinstance(node, ast.FunctionDef)):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        pending.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("room", ARROWS)
def test_no_arrow_points_up(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / room).rglob("*.py"))
        for name in imports(path)
        if name.startswith("motet.") and name.split(".")[1] in ARROWS
        if name.split(".")[1] not in ARROWS[room] | {room}
    ]
    assert not wrong


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


def test_modules_import_each_other_in_no_circle() -> None:
    names = {module_name(path): path for path in sources()}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        found = set(imports(path, module_level=True))
        modules = {f if f in names else f.rpartition(".")[0] for f in found}
        graph[name] = (modules & names.keys()) - {name}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_stay_light(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & set(LIGHT[module])


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


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
