"""Classes that a user's own file or an installed package brings: `my_file.py:Class` or
`package.module:Class`.

A file is executed under a private module name: its folder is not put on `sys.path`, and no
installed module can be shadowed by it. So one file holds all that its classes need, beside what is
installed. Every mistake in it is one `PluginError` with file and line; no traceback.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from motet.core.errors import Problem, UserError, suggest
from motet.core.files import atomic_write
from motet.core.hashing import sha256_hex
from motet.core.package_modules import imported_names, needed_modules, origin_of
from motet.core.sealed import sealed

FORMS = "my_file.py:Class (a file next to run.yaml) or package.module:Class (an installed module)"
INSTALLED = "installed"
"""Subfolder of a snapshot's plugins with the sources of installed modules, kept for the record."""
MISTAKES = (Exception, SystemExit)
"""What may come out of a stranger's code: `exit()` must not end the command, let alone as a
success.
"""
NOT_THE_SOURCE = "is not the source that the run was frozen with"
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*\.py")


class PluginError(UserError):
    """A plugin that cannot be used; `problem` keeps the setting apart from what is wrong."""

    def __init__(self, setting: str, message: str) -> None:
        self.problem = Problem(setting, message)
        self.problems = (self.problem,)
        super().__init__(str(self.problem))


@dataclass(frozen=True)
class Reference:
    """Where a class comes from: a `file` next to run.yaml, or an installed `module`; the other is
    None.
    """

    text: str
    file: str | None
    module: str | None
    attribute: str


class _Loaded(NamedTuple):
    """Where a class was loaded from."""

    reference: Reference
    path: Path
    line: int


_LOADED: dict[type, _Loaded] = {}


def is_reference(text: str) -> bool:
    """Return whether a setting's text means a class of the user's own, well written or not."""
    return ":" in text or text.endswith(".py")


def parse_reference(text: str, setting: str) -> Reference:
    """Read `my_file.py:Class` or `package.module:Class`.

    Raises:
        PluginError: neither form; a path instead of a plain file name.
    """
    source, colon, attribute = text.partition(":")
    if not colon or not attribute.isidentifier():
        raise PluginError(setting, f"is {text!r}; it must be {FORMS}")
    if source.endswith(".py"):
        if not _FILE.fullmatch(source):
            message = (
                f"is {text!r}; {source!r} is not a plain file name (letters, digits, _ and -, then "
                ".py); the file must lie next to run.yaml"
            )
            raise PluginError(setting, message)
        return Reference(text, source, None, attribute)
    if not all(part.isidentifier() for part in source.split(".")):
        raise PluginError(setting, f"is {text!r}; it must be {FORMS}")
    return Reference(text, None, source, attribute)


def load_class(
    reference: Reference, folder: Path, base: type, setting: str, sha256: str | None = None
) -> type:
    """Return the class, from `folder`/FILE or from the installed module.

    Args:
        reference: what to load.
        folder: of run.yaml; of a frozen run `RUN/code/plugins`.
        base: the class that it must extend, or a Protocol whose members it must have.
        setting: names the setting in errors.
        sha256: of the source as it was frozen; None accepts any.

    Raises:
        PluginError: no such file, module or class; changed source; a mistake in it; another base.
    """
    path = _source(reference, folder, setting)
    content = _read(reference, path, setting)
    if sha256 is not None and _frozen(reference, content) != sha256:
        raise PluginError(setting, _changed(reference, path, folder))
    if reference.file is not None:
        module = _executed(reference, path, content, setting)
    else:
        module = _imported(reference, path, setting)
    return _checked(reference, module, path, content, base, setting)


def source_sha256(reference: Reference, folder: Path, setting: str = "") -> str:
    """Return the SHA-256 of the file, or of the installed module's source with those of its own
    package that it needs.

    Raises:
        PluginError: it cannot be found or read.
    """
    setting = setting or reference.text
    return _frozen(reference, _read(reference, _source(reference, folder, setting), setting))


def is_plugin(kind: type) -> bool:
    """Return whether `load_class` gave this class."""
    return kind in _LOADED


def fault(kind: type, setting: str, message: str) -> PluginError:
    """Return the error of a plugin that does not keep to what its base asks: file and line."""
    loaded = _LOADED[kind]
    place = f"{loaded.path}:{loaded.line}: {kind.__name__}"
    return PluginError(setting, f"is {loaded.reference.text!r}; {place} {message}")


@contextmanager
def mistakes_of(kind: type, setting: str) -> Iterator[None]:
    """Turn an exception out of a plugin's own code into one `PluginError` with file and line.

    Users' errors pass as they are, and so does every exception of a class that is no plugin: it is
    a fault of ours, and its traceback is wanted.
    """
    try:
        yield
    except UserError:
        raise
    except MISTAKES as error:
        if kind not in _LOADED:
            raise
        loaded = _LOADED[kind]
        raise PluginError(setting, _at(loaded.reference, loaded.path, error)) from None


def keep_source(reference: Reference, folder: Path, plugins: Path) -> None:
    """Copy the source into a run's snapshot: a file is loaded from there ever after; an installed
    module's source, and those of its package that it needs, are kept for the record under
    `installed/`.

    Raises:
        PluginError: the source cannot be found or read.
    """
    content = _read(reference, _source(reference, folder, reference.text), reference.text)
    kept = {plugins / reference.file: content} if reference.file else {}
    if reference.module is not None:
        sources = {reference.module: content, **needed_modules(reference.module)}
        kept = {_record(name, plugins): source for name, source in sources.items()}
    for target, source in kept.items():
        if not target.is_file() or target.read_bytes() != source:
            atomic_write(target, source)


def _record(module: str, plugins: Path) -> Path:
    return plugins / INSTALLED / f"{module}.py"


def _frozen(reference: Reference, content: bytes) -> str:
    """The hash of a source; of an installed module, also of those of its package that it needs."""
    needed = {} if reference.module is None else needed_modules(reference.module)
    if not needed:
        return _digest(content)
    parts = [f"{name}\n{_digest(source)}\n" for name, source in needed.items()]
    return sha256_hex("".join([_digest(content), "\n", *parts]))


def _digest(content: bytes) -> str:
    return sha256_hex(content)


def _changed(reference: Reference, path: Path, folder: Path) -> str:
    message = f"is {reference.text!r}; {path} {NOT_THE_SOURCE}"
    if reference.file is not None:
        return f"{message}; restore it, or start a new run"
    assert reference.module is not None
    own = {reference.module: path.read_bytes() if path.is_file() else b""}
    changed = [
        kept
        for name, source in {**own, **needed_modules(reference.module)}.items()
        if not (kept := _record(name, folder)).is_file() or kept.read_bytes() != source
    ]
    there = [kept for kept in changed if kept.is_file()] or [_record(reference.module, folder)]
    where = f" (the frozen source is {there[0]})" if there[0].is_file() else ""
    if changed and changed[0] != _record(reference.module, folder):
        message = f"{message}: what it needs of its package is another ({changed[0].stem})"
    return f"{message}{where}; install the version of then, or start a new run"


def _source(reference: Reference, folder: Path, setting: str) -> Path:
    """Return the path of the source file."""
    if reference.file is None:
        return _installed(reference, setting)
    path = folder / reference.file
    if not path.is_file():
        others = [other.name for other in folder.glob("*.py")] if folder.is_dir() else []
        hint = suggest(reference.file, others)
        raise PluginError(setting, f"is {reference.text!r}; there is no file {path}{hint}")
    target = path.resolve()
    if target.parent != folder.resolve():
        message = f"is {reference.text!r}; {path} is a link to {target}; put the file itself there"
        raise PluginError(setting, message)
    return path


def _installed(reference: Reference, setting: str) -> Path:
    assert reference.module is not None
    wrong = f"is {reference.text!r}; module {reference.module!r}"
    try:
        # Finding a module imports its parent packages: any exception can come out of them.
        spec = importlib.util.find_spec(reference.module)
    except MISTAKES as error:
        raise PluginError(setting, f"{wrong} cannot be found: {_said(error)}") from None
    if spec is None:
        message = f"{wrong} is not installed; install its package, or name a file: {FORMS}"
        raise PluginError(setting, message)
    if not spec.has_location or not str(spec.origin).endswith(".py"):
        raise PluginError(setting, f"{wrong} has no Python source file, so it cannot be frozen")
    return Path(str(spec.origin))


def _read(reference: Reference, path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        message = f"is {reference.text!r}; {path} cannot be read: {error.strerror}"
        raise PluginError(setting, message) from None


def _executed(reference: Reference, path: Path, content: bytes, setting: str) -> ModuleType:
    """Return the file's module. One path with one content is executed once in a process, so that
    its classes stay the same objects.
    """
    where = path.resolve()
    key = _digest(str(where).encode() + b"\0" + content)[:16]
    name = f"motet_plugin_{key}_{path.stem.replace('-', '_')}"
    if name in sys.modules:
        return sys.modules[name]
    try:
        # dont_inherit: this module's `from __future__` must not reach the user's.
        code = compile(content, str(path), "exec", dont_inherit=True)
        tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise PluginError(setting, _at(reference, path, error)) from None
    _refuse_siblings(reference, path, tree, setting)
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # before execution: dataclasses look their module up by its name
    try:
        with sealed():
            exec(code, module.__dict__)
    except MISTAKES as error:
        del sys.modules[name]
        raise PluginError(setting, _at(reference, path, error)) from None
    return module


def _refuse_siblings(reference: Reference, path: Path, tree: ast.AST, setting: str) -> None:
    """Refuse imports of what lies next to the file: they would be found by chance (the working
    directory) here, and never in the run's snapshot.
    """
    folder = path.parent
    for name, line in imported_names(tree):
        if (folder / f"{name}.py").is_file() or (folder / name).is_dir():
            origin = origin_of(name)
            if origin is None or origin.parent.resolve() == folder.resolve():
                message = (
                    f"is {reference.text!r}; {path}:{line}: imports {name!r}, which lies next to "
                    "it; a file must hold all that it needs: put the two into one file, or install "
                    "them as a package and write package.module:Class"
                )
                raise PluginError(setting, message)


def _imported(reference: Reference, path: Path, setting: str) -> ModuleType:
    assert reference.module is not None
    try:
        return importlib.import_module(reference.module)
    except MISTAKES as error:
        raise PluginError(setting, _at(reference, path, error)) from None


def _at(reference: Reference, path: Path, error: BaseException) -> str:
    """Return `is 'text'; file:line: what happened` for an error of or in the source."""
    line: int | None = None
    if isinstance(error, SyntaxError) and error.filename in (str(path), "<unknown>"):
        line, said = error.lineno, f"{type(error).__name__}: {error.msg}"
    else:
        said = _said(error)
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == str(path):
                line = frame.lineno
    place = f"{path}:{line}" if line else str(path)
    return f"is {reference.text!r}; {place}: {said}"


def place(error: BaseException, made_by: type) -> str:
    """Return `FILE:LINE: what happened`: the innermost line that lies in the class's own file."""
    own = getattr(sys.modules.get(made_by.__module__), "__file__", None)
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == own]
    said = _said(error)
    return f"{lines[-1].filename}:{lines[-1].lineno}: {said}" if lines else said


def _said(error: BaseException) -> str:
    name = type(error).__name__
    try:
        text = str(error).encode("utf-8", "backslashreplace").decode()
    except Exception:  # its own __str__ fails
        text = ""
    return f"{name}: {text}" if text else name


def _checked(
    reference: Reference,
    module: ModuleType,
    path: Path,
    content: bytes,
    base: type,
    setting: str,
) -> type:
    """Return the class when it exists, is one of `base`, and nothing of it is missing."""
    found = getattr(module, reference.attribute, None)
    if found is None:
        classes = [
            name
            for name, value in vars(module).items()
            if inspect.isclass(value) and value.__module__ == module.__name__
        ]
        hint = suggest(reference.attribute, classes)
        has = f"it has {', '.join(classes)}" if classes else "it has no class"
        message = f"{path} has no class {reference.attribute!r}{hint or f'; {has}'}"
        raise PluginError(setting, f"is {reference.text!r}; {message}")
    line = _line_of(content, reference.attribute)
    wrong = f"is {reference.text!r}; {path}:{line}: {reference.attribute}"
    if not inspect.isclass(found):
        raise PluginError(setting, f"{wrong} is {found!r:.60}; it must be a class")
    protocol = getattr(base, "_is_protocol", False)
    if not protocol and not issubclass(found, base):
        path_of = f"{base.__module__}.{base.__qualname__}"
        raise PluginError(setting, f"{wrong} must extend {path_of}")
    missing = sorted(
        getattr(found, "__abstractmethods__", ())
        or (name for name in (_members(base) if protocol else ()) if not hasattr(found, name))
    )
    if missing:
        raise PluginError(setting, f"{wrong} lacks {', '.join(missing)}")
    _LOADED[found] = _Loaded(reference, path, line)
    return found


def _members(protocol: Any) -> list[str]:
    """Return the public methods that a Protocol asks for. Attributes that are only annotated may be
    set by the instance.
    """
    return [name for name in dir(protocol) if not name.startswith("_")]


def _line_of(content: bytes, name: str) -> int:
    """Return the line of the top-level statement that makes `name`; 1 when none is seen."""
    for node in ast.parse(content).body:
        names = [getattr(node, "name", "")]
        if isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        if name in names:
            return node.lineno
    return 1
