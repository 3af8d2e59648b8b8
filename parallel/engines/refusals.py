"""Which layouts cannot train members of a family; torch-free, to be asked before a rank starts."""

from __future__ import annotations

from motet.models.config import ModelConfig
from motet.parallel.layout.layout import Layout


def refusals(layout: Layout, config: ModelConfig) -> list[str]:
    """Return why a layout cannot train members of a family beside the whole model, in words."""
    reasons = []
    if layout.engine != "native":
        reasons.append(f"layout.engine={layout.engine} trains whole models only; use native")
    if layout.pp > 1:
        reasons.append(
            f"layout.pp={layout.pp}: a member leaves out layers, and stages of a pipeline would "
            "wait for each other; use pp=1"
        )
    if len(set(layout.shares)) > 1:
        reasons.append("layout.shares: replicas must take equally many micro-batches")
    if config.n_experts:
        reasons.append("model.n_experts: the balance of experts counts whole models only")
    return reasons
