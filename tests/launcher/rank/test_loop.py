"""What the loop does before its first step."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from motet.launcher.rank import loop


class Metrics(list[Any]):
    def log(self, kind: str, step: int, **facts: Any) -> None:
        self.append((kind, step, facts))


def job(**changed: Any) -> Any:
    """A run of ten steps whose end is told at once."""
    stop = SimpleNamespace(requested=lambda: False)
    facts: dict[str, Any] = {
        "settings": SimpleNamespace(steps=10, training=SimpleNamespace(compile=True)),
        "members": {"half": "HALF", "thin": "THIN"},
        "growing": None,
        "feed": SimpleNamespace(read=lambda step: SimpleNamespace(batches=[f"batch of {step}"])),
        "engine": SimpleNamespace(),
        "metrics": Metrics(),
        "progress": SimpleNamespace(phase=lambda _: nullcontext(), print=lambda _: None),
        "stop": stop,
        "world": None,
    }
    return SimpleNamespace(**facts | changed)


@pytest.mark.parametrize(("step", "called"), [(0, True), (4, True), (10, False)])
@pytest.mark.parametrize("members", [{}, {"half": "HALF", "thin": "THIN"}])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("trains_slices", [True, False])
def test_members_are_compiled_on_the_sequences_that_come_next(
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    called: bool,
    members: dict[str, str],
    compiled: bool,
    trains_slices: bool,
) -> None:
    """Of a family that grows the engine's model has slices in a nested stage alone."""
    asked: list[Any] = []
    engine = SimpleNamespace(compile_ahead=lambda batch, each: asked.append((batch, each)))
    slices = list(members.values()) if trains_slices else []
    made = job(engine=engine, members=members, slices=slices)
    made.settings.training.compile = compiled
    for name in ("agree_any", "probe", "save", "order_due", "checkpoint_due", "growth_due"):
        monkeypatch.setattr(loop, name, lambda *_: False)  # a stop is asked for by the first probe
    made.segment = SimpleNamespace(start_step=step)
    made.at = lambda *_, **__: None
    assert loop.train(made, step)[0] == step
    if called and members and compiled and trains_slices:
        assert asked == [(f"batch of {step}", ["HALF", "THIN"])]
        ((kind, at, facts),) = made.metrics
        assert (kind, at, facts["event"], facts["members"]) == ("event", step, "compiled", 2)
    else:
        assert asked == [] == made.metrics
