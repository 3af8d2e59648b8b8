"""What the hash of the judging code covers."""

from __future__ import annotations

import re

from motet.experiments.design import frozen

IMPORTED = re.compile(r"from motet\.experiments\.(design(?:\.\w+)+) import")

BEFORE = (
    "decontaminate",
    "frozen",
    "imported",
    "in_corpus",
    "lock",
    "removal",
    "requests",
    "study",
    "windows",
)


def test_every_module_of_design_that_the_analysis_rests_on_is_hashed_with_it() -> None:
    hashed = {path for part in frozen.JUDGING for path in frozen.ROOM.glob(part)}
    used: set[str] = set()
    left = list(hashed)
    while left:
        for name in IMPORTED.findall(left.pop().read_text()):
            path = frozen.ROOM / f"{name.replace('.', '/')}.py"
            if name not in used:
                used.add(name)
                left.append(path)
    # Reads files and YAML, and decides nothing once a study is frozen.
    before_freezing = {f"design.{name}" for name in ("clusters", "parser", "room", "units")}
    # What `analysis/kept.py` asks for this very hash, to name what it keeps.
    before_freezing |= {f"design.{name}" for name in BEFORE}
    known = {f"design.{path.stem}" for path in hashed if path.parent.name == "design"}
    assert len(known) > 3
    assert used - before_freezing <= known
