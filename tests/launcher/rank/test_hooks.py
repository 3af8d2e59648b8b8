"""Hooks of several ranks, here threads that meet where ranks would talk."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from motet.core.errors import UserError
from motet.launcher.config.sections import RunSettings
from motet.launcher.rank.hooks import Hook, HookContext, Hooks, mistake_of
from motet.parallel.runtime import mesh
from motet.parallel.runtime.mesh import World

RANKS = 3


class Asks(Hook):
    """Reads the weights on some ranks; does what it is told on the others."""

    def __init__(self, ranks: set[int], otherwise: Callable[[], object] = int) -> None:
        self.ranks, self.otherwise = ranks, otherwise

    def after_step(self, context: HookContext) -> None:
        if context.rank in self.ranks:
            assert context.weights() == {"weight": 1}
        else:
            self.otherwise()


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> Callable[[Hook], list[str]]:
    """Call a hook on all ranks at once and return what each of them says."""
    boxes: list[str | None] = [None] * RANKS
    meeting = threading.Barrier(RANKS, timeout=20)

    def first_complaint(complaint: str | None, world: World) -> str | None:
        boxes[world.rank] = complaint
        meeting.wait()
        told = [f"rank {rank}: {text}" for rank, text in enumerate(boxes) if text]
        meeting.wait()
        return "\n".join(told) or None

    monkeypatch.setattr(mesh, "first_complaint", first_complaint)

    def run(hook: Hook) -> list[str]:
        said = [""] * RANKS

        def one(rank: int) -> None:
            world: Any = SimpleNamespace(rank=rank, size=RANKS)
            context = HookContext(3, RunSettings(), rank, RANKS, _weights=lambda: {"weight": 1})
            try:
                Hooks(world, users=[("h.py:Asks", hook)]).call("after_step", context)
            except UserError as error:
                said[rank] = str(error)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return said

    return run


def fails() -> None:
    raise ValueError("no disk")


def test_weights_are_given_where_every_rank_asks(
    outcomes: Callable[[Hook], list[str]],
) -> None:
    assert outcomes(Asks({0, 1, 2})) == ["", "", ""]


@pytest.mark.parametrize("ranks", [{0}, {1}, {0, 2}])
def test_ranks_that_ask_for_weights_alone_are_told_and_nobody_waits(
    outcomes: Callable[[Hook], list[str]], ranks: set[int]
) -> None:
    said = outcomes(Asks(ranks))
    assert len(set(said)) == 1
    for rank in range(RANKS):
        asks = f"rank {rank}: after_step at step 3 calls weights(), and not every rank does"
        assert (asks in said[0]) == (rank in ranks)


def test_a_mistake_on_one_rank_is_told_where_the_others_ask_for_weights(
    outcomes: Callable[[Hook], list[str]],
) -> None:
    said = outcomes(Asks({1, 2}, fails))
    assert len(set(said)) == 1
    assert "rank 0: after_step at step 3 failed" in said[0]
    assert "ValueError: no disk" in said[0]


async def coroutine(self: Hook, context: HookContext) -> None: ...


def generator(self: Hook, context: HookContext) -> object:
    yield


def of_one(self: Hook) -> None: ...


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("after_steps", print, "did you mean 'after_step'"),
        ("on_checkpoint", print, "did you mean 'at_checkpoint'"),
        ("after_step", coroutine, "asynchronous"),
        ("at_end", generator, "a generator"),
        ("at_probe", of_one, "takes (self, context)"),
        ("before_step", None, "takes (self, context)"),
    ],
)
def test_a_hook_that_would_never_be_called_is_refused(name: str, value: object, said: str) -> None:
    assert said in mistake_of(type("Mine", (Hook,), {name: value}))


def test_a_hook_may_have_methods_of_its_own() -> None:
    own = {"at_end": Asks.after_step, "write": print, "steps": 3, "_after_steps": print}
    assert mistake_of(type("Mine", (Hook,), own)) == ""
    assert mistake_of(Asks) == ""
