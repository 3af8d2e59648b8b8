"""A growth that changes more than its operator states ends the run; the model before it is kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from motet.core.errors import UserError
from motet.launcher.rank.growing import Change, refuse_change
from tests.models.test_progressive import SMALL, family


def refusal(change: Change, operator: Any, precision: str = "fp32", **stage: Any) -> str:
    """What is said of a growth of the second stage; "" where it passes."""
    growing = family({**SMALL, **stage.pop("small", {})}, {"operator": operator, **stage})
    job: Any = SimpleNamespace(growing=growing, facts={"precision": precision})
    try:
        refuse_change(job, 1, change)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (Change(3.0, 3.0, 9e-6), ""),
        (Change(3.0, 3.0, 2e-5), "a log-probability changed by 2e-05; 1e-05 is what fp32"),
        (Change(3.0, 3.0, float("inf")), "a log-probability changed by inf"),
        (Change(3.0, float("nan"), float("inf")), "a log-probability changed by inf"),
    ],
)
def test_an_exact_operator_may_change_nothing(change: Change, why: str) -> None:
    told = refusal(change, "identity")
    assert told.startswith("family.options.stages[1].operator=identity") if why else not told
    assert why in told
    assert refusal(Change(3.0, 3.0, 2e-5), "identity", "bf16") == ""
    assert refusal(Change(3.0, 3.1, 2e-5), "identity", loss_jump_nats=0.2) == ""
    assert "rose by 0.3" in refusal(Change(3.0, 3.3, 2e-5), "identity", loss_jump_nats=0.2)


@pytest.mark.parametrize(
    ("after", "bound", "why"),
    [
        (4.9, None, ""),
        (5.1, None, "raises the loss by at most 2 nats, and it rose by 2.1, from 3 to 5.1"),
        (float("nan"), None, "it rose by nan"),
        (5.1, 2.5, ""),
        (2.0, None, ""),
    ],
)
def test_another_operator_may_raise_the_loss_by_what_it_states(
    after: float, bound: float | None, why: str
) -> None:
    stage = {} if bound is None else {"loss_jump_nats": bound}
    told = refusal(Change(3.0, after, 0.9), "stack", **stage)
    assert why in told
    assert bool(why) == bool(told)
