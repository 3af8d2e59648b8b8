"""The kinds of families, by the name that `family.kind` gives."""

from __future__ import annotations

from motet.models.family.base import WHOLE, Family, WholeModel
from motet.models.family.nested import NestedFamily

FAMILIES: dict[str, type[Family]] = {WHOLE: WholeModel, "nested": NestedFamily}
