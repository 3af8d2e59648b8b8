"""Settings: units that the base text holds."""

from __future__ import annotations

from dataclasses import dataclass

from motet.launcher.config.field import setting


@dataclass(frozen=True)
class DecontaminateSettings:
    """What is done about units that the base text holds, before any is assigned to an arm."""

    policy: str = setting(
        "report",
        "report: warn; exclude: they leave the study with their clusters; replace: the base text "
        "at those places is overlaid by other base text",
        choices=("report", "exclude", "replace"),
    )
    tokens: int = setting(
        13,
        "a run of so many tokens that a unit's text and the base text share is a place",
        unit="tokens",
        least=10,
        most=50,
    )
    share: float = setting(
        0.5,
        "of a text's own 5-token pieces in one run: such a unit counts as held; 0 = any run does",
        least=0,
        most=1,
    )
    similar: float = setting(
        0.8,
        "of a text's own 5-token pieces in a stretch that is changed here and there: such a unit "
        "counts as held",
        least=0.2,
        most=1,
    )
