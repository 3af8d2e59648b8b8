"""The kinds of families, by the name that `family.kind` gives."""

from __future__ import annotations

from motet.models.family.base import WHOLE, Family, WholeModel
from motet.models.family.nested import NestedFamily
from motet.models.family.progressive import ProgressiveFamily

FAMILIES: dict[str, type[Family]] = {
    WHOLE: WholeModel,
    "nested": NestedFamily,
    "progressive": ProgressiveFamily,
}
