"""Moments of the step loop, and who is called at them: our own hooks first, then the user's.

All ranks call the same hooks at the same moments. A mistake in a user's hook ends the attempt on
every rank with one message; the last checkpoint stays.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from motet.core.errors import UserError
from motet.core.plugins import MISTAKES, place

if TYPE_CHECKING:
    import torch

    from motet.launcher.config.sections import RunSettings
    from motet.parallel.runtime.mesh import World


@dataclass
class HookContext:
    """What a hook sees at a moment.

    Attributes:
        step: optimizer updates made so far.
        settings: of the run.
        rank, world_size: of this process.
        facts: what the loop says of the moment; see `Hook`.
    """

    step: int
    settings: RunSettings
    rank: int
    world_size: int
    facts: dict[str, Any] = field(default_factory=dict)
    _log: Callable[[Mapping[str, Any]], None] = lambda numbers: None
    _weights: Callable[[], dict[str, torch.Tensor]] = dict
    _stop: Callable[[str], None] = lambda why: None

    def log(self, **numbers: Any) -> None:
        """Write numbers to metrics.jsonl, as a row of kind "hook", and to W&B as hook/NAME/number;
        ranks other than 0 write nothing.
        """
        self._log(numbers)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return a copy of the unsharded weights on the CPU of rank 0, {} elsewhere.

        A collective: every rank must call it at the same moment.
        """
        return self._weights()

    def ask_to_stop(self, why: str) -> None:
        """Let the run save and stop, as after Ctrl-C, once the step under way is done; one rank's
        wish is enough.
        """
        self._stop(why)


class Hook:
    """Something to do at moments of training: extend it and override the moments that you need.

    Hooks read; they must not change weights, data or random state. Each is made once on every rank,
    without arguments, and called on all of them in the same order.
    """

    def before_step(self, context: HookContext) -> None:
        """`context.step` updates are done and the next one begins; facts: lr."""

    def after_step(self, context: HookContext) -> None:
        """An update was made or left out; facts: loss, z_loss, balance_loss, grad_norm, lr,
        applied.
        """

    def at_probe(self, context: HookContext) -> None:
        """Experiments were measured; facts: experiments (means by experiment and arm)."""

    def at_checkpoint(self, context: HookContext) -> None:
        """A checkpoint is being written in the background; facts: folder, once it is whole."""

    def at_end(self, context: HookContext) -> None:
        """Training ends as it should; facts: reason, "finished", "stopped", or
        "handed_over" where other ranks go on with the next stage of a family.
        """


def mistake_of(hook: type[Hook]) -> str:
    """Return why a class would not be called as it means to, "" when it will be: a moment that is
    misspelt, no method, asynchronous, or takes other arguments.
    """
    moments = [name for name in vars(Hook) if not name.startswith("_")]
    for name in dir(hook):
        value = getattr(hook, name)
        if name in moments:
            if inspect.iscoroutinefunction(value) or inspect.isgeneratorfunction(value):
                return f"{name} is asynchronous or a generator, which would never run; use def"
            try:
                inspect.signature(value).bind(None, None)
            except TypeError:
                return f"{name} is {value!r:.60}; it must be a method that takes (self, context)"
        elif name[0] != "_" and (near := difflib.get_close_matches(name, moments, n=1, cutoff=0.8)):
            known = ", ".join(moments)
            return f"{name} is no moment (did you mean {near[0]!r}?); there are {known}"
    return ""


class Hooks:
    """Calls everybody at every moment.

    Args:
        own: what Motet itself does at the moments.
        users: (reference as in run.yaml, hook) of `training.hooks`, in their order.
    """

    def __init__(
        self, world: World, own: Sequence[Hook] = (), users: Sequence[tuple[str, Hook]] = ()
    ) -> None:
        self.world, self.own, self.users = world, list(own), list(users)
        self.current = ""
        """The user's hook that is being called, by the name of its class."""
        self.apart = ""
        """What ranks said when some of them asked for weights and others did not."""

    def call(self, moment: str, context: HookContext) -> None:
        """Call all hooks at a moment (a collective where a user's hook has that moment).

        Raises:
            UserError: on every rank, when a user's hook failed on one.
        """
        for hook in self.own:
            getattr(hook, moment)(context)
        for name, hook in self.users:
            if getattr(type(hook), moment) is not getattr(Hook, moment):
                self._call_users(name, hook, moment, context)

    def _call_users(self, name: str, hook: Hook, moment: str, context: HookContext) -> None:
        from motet.parallel.runtime.mesh import (
            first_complaint,  # a user's file imports Hook: no torch
        )

        complaint = None
        self.current = type(hook).__name__
        context = replace(context, _weights=partial(self._all_ask, moment, context))
        try:
            getattr(hook, moment)(context)
        except MISTAKES as error:
            complaint = f"{moment} at step {context.step:,} failed: {place(error, type(hook))}"
        self.current = ""
        if told := self.apart or first_complaint(complaint, self.world):
            raise UserError(
                f"training.hooks: {name}: {told}\n"
                "the last checkpoint stays; `motet resume RUN training.hooks=[]` goes on without "
                "hooks"
            )

    def _all_ask(self, moment: str, context: HookContext) -> dict[str, Any]:
        """Return the weights once every rank asks for them: a rank that has left the moment answers
        with its complaint or with none, and nobody waits for ever.
        """
        from motet.parallel.runtime.mesh import first_complaint

        asks = f"{moment} at step {context.step:,} calls weights(), and not every rank does"
        told = first_complaint(asks, self.world)
        if told != "\n".join(f"rank {rank}: {asks}" for rank in range(self.world.size)):
            self.apart = str(told)
            raise UserError(self.apart)
        return context.weights()
