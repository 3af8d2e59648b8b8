"""The section `probes` of run.yaml."""

from __future__ import annotations

from dataclasses import dataclass

from motet.launcher.config.field import setting


@dataclass(frozen=True)
class ProbeSettings:
    """When experiments are measured, unless they say otherwise themselves."""

    every: float = setting(0.1, "time between probes", unit="fraction of the run", above=0, most=1)
    batch_tokens: int = setting(
        16_384, "most tokens in one forward pass of a probe, per rank", unit="tokens", least=64
    )
    budget: float | None = setting(
        None,
        "most time of probes, as a share of the time spent training: points of curves are left "
        "out, never what an answer needs; null = no bound",
        unit="share",
        above=0,
        most=1,
        omit_default=True,
    )
