"""The sections `tracking` and `alerts` of a run.yaml: who shows the run besides W&B, and who is
told when something happens.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass

from motet.core.errors import Problem
from motet.launcher.config.field import setting

ALERTS = ("end", "crash", "stall", "failed_control")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class TrackingSettings:
    """Services that show a run beside Weights & Biases (`metrics.wandb`). All are off."""

    tensorboard: bool = setting(False, "event files in RUN/tensorboard, for TensorBoard")
    trackio: bool = setting(
        False, "Trackio: a local dashboard, or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL point"
    )
    project: str = setting("motet", "project of Trackio")
    answers: bool = setting(
        True, "send effects, intervals, p and verdicts to all trackers when the run has finished"
    )


@dataclass(frozen=True)
class AlertSettings:
    """Messages to a webhook. Off unless it is said where its URL stands: it is a secret, and no
    setting.
    """

    url_from: str = setting("", "environment variable that holds the URL")
    url_file: str = setting(
        "", "file of yours alone (mode 600) that holds the URL on one line", kind="path"
    )
    events: tuple[str, ...] = setting(ALERTS, "what is told", choices=ALERTS)
    stall_s: float = setting(
        900.0, "a run without a step for so long has stalled", unit="seconds", least=30
    )
    timeout_s: float = setting(
        10.0, "how long one message may take", unit="seconds", above=0, most=120
    )

    @property
    def used(self) -> bool:
        """Whether anything is told."""
        return bool((self.url_from or self.url_file) and self.events)


def missing(package: str) -> bool:
    """Whether a package is not installed."""
    return importlib.util.find_spec(package) is None


def telling_problems(tracking: TrackingSettings, alerts: AlertSettings) -> list[Problem]:
    """Return trackers whose package is missing, and alerts that could not be sent."""
    found = []
    for name, on in (("tensorboard", tracking.tensorboard), ("trackio", tracking.trackio)):
        if on and missing(name):
            why = f"is on, and the package {name} is not installed: pip install 'motet[trackers]'"
            found.append(Problem(f"tracking.{name}", why))
    if alerts.url_from and alerts.url_file:
        why = f"{alerts.url_from} and alerts.url_file are two places of one URL; keep one"
        found.append(Problem("alerts.url_from", why))
    if alerts.url_from and not _VARIABLE.fullmatch(alerts.url_from):
        # not shown: somebody may have written the URL itself, which is a secret
        why = "is no name of a variable, such as MOTET_ALERT_URL; the URL itself is no setting"
        found.append(Problem("alerts.url_from", why))
    return found
