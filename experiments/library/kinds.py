"""The experiments that `use:` may name: the built-in ones and those of installed packages by their
word, a user's own by reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, is_dataclass
from dataclasses import fields as dataclass_fields
from importlib.metadata import entry_points
from pathlib import Path

from motet.core.errors import suggest
from motet.core.plugins import (
    PluginError,
    Reference,
    fault,
    is_reference,
    keep_source,
    load_class,
    parse_reference,
    source_sha256,
)
from motet.experiments.design.experiment import Experiment
from motet.experiments.design.treatments import GLOBAL_ROLE, TREATMENTS
from motet.experiments.library.canaries import AuditingCanaries
from motet.experiments.library.conditioning import Metadata, Tagged
from motet.experiments.library.contamination import Contamination
from motet.experiments.library.controls import Placebo, PositiveControl
from motet.experiments.library.fewshot import FewShot
from motet.experiments.library.forgetting import Forgetting
from motet.experiments.library.knowledge import Knowledge
from motet.experiments.library.membership import Membership
from motet.experiments.library.memorization import Memorization
from motet.experiments.library.poisoning import Poisoning
from motet.experiments.library.radioactivity import Radioactivity
from motet.experiments.library.reasoning import Reasoning
from motet.experiments.library.removal import Removal
from motet.experiments.library.replacement import Palimpsest, Replacement
from motet.experiments.library.unlearning import Unlearning
from motet.experiments.library.watermark import EmbeddingWatermark

LIBRARY: dict[str, type[Experiment]] = {
    "memorization": Memorization,
    "contamination": Contamination,
    "knowledge": Knowledge,
    "forgetting": Forgetting,
    "reasoning": Reasoning,
    "embedding_watermark": EmbeddingWatermark,
    "canaries": AuditingCanaries,
    "membership": Membership,
    "poisoning": Poisoning,
    "radioactivity": Radioactivity,
    "fewshot": FewShot,
    "unlearning": Unlearning,
    "removal": Removal,
    "replacement": Replacement,
    "palimpsest": Palimpsest,
    "metadata": Metadata,
    "conditional_tags": Tagged,
    "placebo": Placebo,
    "positive_control": PositiveControl,
}
GROUP = "motet.experiments"
"""Entry points of installed packages: NAME = "package.module:Class"."""
ROLES = ("question", "placebo", "positive_control", GLOBAL_ROLE)


@dataclass(frozen=True)
class Library:
    """The built-in classes, and those of files in `folder`: where run.yaml lies, or a frozen run's
    `code/plugins`.
    """

    folder: Path

    def kind(self, use: str, setting: str, sha256: str | None = None) -> type[Experiment]:
        """Return the class that `use` names; `setting` is for messages.

        Args:
            sha256: of a user's source as it was frozen; None accepts any.

        Raises:
            PluginError: there is no such class, its source was changed, or a mistake is in it.
        """
        if use in LIBRARY:
            return LIBRARY[use]
        reference = _reference(use, setting)
        kind: type[Experiment] = load_class(reference, self.folder, Experiment, setting, sha256)
        if wrong := _declared_wrong(kind):
            raise fault(kind, setting, wrong)
        return kind

    def source_sha256(self, use: str, setting: str) -> str | None:
        """Return the SHA-256 of the source of a user's class; None for a built-in one."""
        if use in LIBRARY:
            return None
        return source_sha256(_reference(use, setting), self.folder, setting)

    def keep(self, use: str, plugins: Path) -> None:
        """Copy the source of a user's class into a run's snapshot; built-in ones are in it."""
        if use not in LIBRARY:
            keep_source(_reference(use, use), self.folder, plugins)


def installed() -> dict[str, str]:
    """Return {name: "package.module:Class"} of the experiments that installed packages offer under
    `GROUP`, less those whose name is built in. A name that two packages claim has both, divided by
    a comma.
    """
    found: dict[str, str] = {}
    for point in entry_points(group=GROUP):
        values = {*found.get(point.name, point.value).split(", "), point.value}
        found[point.name] = ", ".join(sorted(values))
    return {name: found[name] for name in sorted(found) if name not in LIBRARY}


def _reference(use: str, setting: str) -> Reference:
    """Read what `use` names beside the built-in classes.

    Raises:
        PluginError: no class is named so, or two are.
    """
    if is_reference(use):
        return parse_reference(use, setting)
    offered = installed()
    if use not in offered:
        hint = suggest(use, [*LIBRARY, *offered])
        known = ", ".join([*LIBRARY, *offered])
        message = f"is {use!r}; it must be one of {known}, or my_file.py:Class{hint}"
        raise PluginError(setting, message)
    if ", " in offered[use]:
        message = f"is {use!r}, which two installed packages offer; write one of {offered[use]}"
        raise PluginError(setting, message)
    return parse_reference(offered[use], setting)


def declared_lines(use: str, kind: type[Experiment]) -> list[str]:
    """Say what a class declares: fields of a row, options and defaults."""
    fields = ["id"]
    for suffix, declared in (("", kind.fields), (" (optional)", kind.optional_fields)):
        for name, types in declared.items():
            words = " or ".join("text" if t is str else t.__name__ for t in types)
            fields.append(f"{name}: {words}{suffix}")
    options = [f"{option.name}: {option.default!r}" for option in dataclass_fields(kind.Options)]
    return [
        f"{use}: {kind.description}",
        f"  treatment         {kind.treatment}",
        f"  a line of items   {', '.join(fields)}",
        f"  options           {', '.join(options) or 'none'}",
        *(f"  default           {name}: {value}" for name, value in kind.defaults.items()),
    ]


def _declared_wrong(kind: type[Experiment]) -> str | None:
    """Say what a user's class declares wrongly or not at all, None when nothing."""
    for name in ("description", "protocol"):
        if not isinstance(getattr(kind, name, None), str):
            return f"needs {name} = a sentence"
    if not isinstance(getattr(kind, "defaults", None), Mapping):
        return "needs defaults = {...}, settings as in YAML, for example {'doses': [0, 8]}"
    for name in ("fields", "optional_fields"):
        declared = getattr(kind, name)
        good = isinstance(declared, Mapping) and all(
            isinstance(types, tuple) and types and all(isinstance(t, type) for t in types)
            for types in declared.values()
        )
        if not good:
            return f"has {name}={declared!r}; it must be like {{'start': (str,)}}"
    if kind.role not in ROLES:
        return f"has role={kind.role!r}; it must be one of {', '.join(ROLES)}"
    if kind.treatment not in TREATMENTS:
        return f"has treatment={kind.treatment!r}; it must be one of {', '.join(TREATMENTS)}"
    if kind.role == GLOBAL_ROLE and kind.treatment != "global":
        return f"has role={kind.role!r}; write treatment = 'global' instead"
    if not isinstance(kind.Options, type) or not is_dataclass(kind.Options):
        return "has Options that is no dataclass"
    for option in dataclass_fields(kind.Options):
        if option.default is MISSING:
            return f"has Options.{option.name} without a default"
    return None
