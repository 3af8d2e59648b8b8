"""Reasons to stop or to leave an update out: signals, and losses that cannot be right."""

from __future__ import annotations

import math
import signal
from collections import deque
from collections.abc import Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from motet.launcher.config.sections import BadStepSettings

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """Remembers that this process was asked to stop; a second Ctrl-C is not held back."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def listen(self) -> StopRequest:
        """Handle the stop signals from now on (main thread only); SIGHUP stays ignored under
        `nohup`.
        """
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self.reason = signal.Signals(number).name

    def ask(self, why: str) -> None:
        """Ask for a stop as a signal does."""
        self.reason = self.reason or why

    def requested(self) -> bool:
        """Return whether a signal came, or something else asked."""
        return self.reason is not None


class SpikeGuard:
    """Decides whether an update is applied, from global numbers only: every rank decides alike.

    A step is bad when its loss or gradient norm is not finite, or when its loss lies `spike_sigma`
    standard deviations above the mean of the last `window` good losses (once half a window is
    there). Each member of a family has a window of its own: a small one that trains seldom, at a
    higher loss, is no spike of the others.
    """

    def __init__(self, settings: BadStepSettings) -> None:
        self.settings = settings
        self.losses: deque[float] = deque(maxlen=settings.window)
        self.member_losses: dict[str, deque[float]] = {}
        self.bad_steps: deque[int] = deque(maxlen=settings.most)
        self.why = ""

    def __call__(
        self, loss: float, grad_norm: float, members: Mapping[str | None, float] | None = None
    ) -> bool:
        """Return whether to apply the update of this loss and gradient norm.

        Args:
            members: loss of each member that trained, None for the whole model; without it the
                whole model trained alone.
        """
        losses = members or {None: loss}
        self.why = self._fault(losses, loss, grad_norm)
        if not self.why:
            for member, value in losses.items():
                self._window(member).append(value)
        return not self.why

    def _window(self, member: str | None) -> deque[float]:
        if member is None:
            return self.losses
        return self.member_losses.setdefault(member, deque(maxlen=self.settings.window))

    def _fault(self, losses: Mapping[str | None, float], loss: float, grad_norm: float) -> str:
        if not all(map(math.isfinite, (loss, grad_norm, *losses.values()))):
            return f"loss {loss:g} or gradient norm {grad_norm:g} is not finite"
        for member, value in losses.items():
            if why := self._spike(self._window(member), value):
                return why if member is None else f"member {member}: {why}"
        return ""

    def _spike(self, window: deque[float], loss: float) -> str:
        sigma, known = self.settings.spike_sigma, len(window)
        if sigma > 0 and known >= self.settings.window // 2:
            mean = math.fsum(window) / known
            spread = math.sqrt(math.fsum((x - mean) ** 2 for x in window) / known)
            if loss > mean + sigma * spread and spread > 0:
                return (
                    f"loss {loss:.4g} is over {sigma:g} standard deviations above the last {known} "
                    f"({mean:.4g})"
                )
        return ""

    def too_many(self, step: int) -> bool:
        """Note a bad step; return whether `most` of them lie within one window."""
        self.bad_steps.append(step)
        return (
            len(self.bad_steps) == self.settings.most
            and step - self.bad_steps[0] < self.settings.window
        )

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must keep for the same decisions after a restart."""
        members = {name: list(window) for name, window in self.member_losses.items()}
        state = {"losses": list(self.losses), "bad_steps": list(self.bad_steps)}
        return state | ({"members": members} if members else {})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the state of a checkpoint."""
        self.losses = deque(state["losses"], maxlen=self.settings.window)
        self.bad_steps = deque(state["bad_steps"], maxlen=self.settings.most)
        self.member_losses = {
            name: deque(losses, maxlen=self.settings.window)
            for name, losses in state.get("members", {}).items()
        }
