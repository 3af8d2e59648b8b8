"""The section `layout` of a run.yaml: on what, by what and how split a run is trained. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from motet.launcher.config.field import setting
from motet.parallel.layout.layout import ENGINES, RECOMPUTE, SCHEDULES, Layout


@dataclass(frozen=True)
class LayoutSettings:
    """Where it is trained, and how it is split over ranks (processes x nodes).

    `motet layout show` draws it.
    """

    engine: str = setting(
        "native",
        "what trains the model: PyTorch's own parallelism, DeepSpeed ZeRO, or Hugging Face "
        "Accelerate",
        choices=ENGINES,
    )
    processes: int = setting(1, "processes per node", unit="processes", least=1, most=64)
    cluster: str | None = setting(
        None,
        "file of the machines (`motet cluster probe` writes one); null = this machine, by data "
        "sheets",
        kind="path",
    )
    device: str = setting("auto", "auto = cuda where there is one", choices=("auto", "cpu", "cuda"))
    timeout_s: float = setting(
        600.0, "how long a rank waits for a silent one before it fails", unit="seconds", above=0
    )
    dp_replicate: int = setting(
        1,
        "data-parallel replicas that each hold the whole model and add their gradients",
        unit="ranks",
        least=1,
    )
    dp_shard: int | None = setting(
        None,
        "ranks that divide weights, gradients and optimizer state (FSDP2) and read different data; "
        "null = all that the other "
        "degrees leave",
        unit="ranks",
        least=1,
    )
    tp: int = setting(
        1, "tensor parallel: ranks that divide heads and hidden channels", unit="ranks", least=1
    )
    pp: int = setting(1, "pipeline parallel: ranks that divide the layers", unit="ranks", least=1)
    cp: int = setting(1, "context parallel: ranks that divide each sequence", unit="ranks", least=1)
    ep: int = setting(
        1,
        "expert parallel: ranks that divide the experts; they are among the ranks of dp_shard x "
        "cp x tp",
        unit="ranks",
        least=1,
    )
    etp: int = setting(
        1, "expert tensor parallel: ranks that divide one expert's channels", unit="ranks", least=1
    )
    stage_layers: tuple[int, ...] = setting(
        (),
        "layers of every pipeline stage in order, pp x virtual_stages numbers; [] = balanced, "
        "embedding and head counted",
        unit="layers",
        least=0,
    )
    virtual_stages: int = setting(1, "pipeline stages per rank", unit="stages", least=1)
    schedule: str = setting(
        "1f1b", "order of forward and backward passes in the pipeline", choices=SCHEDULES
    )
    micro_sequences: int = setting(
        8, "sequences of one forward pass of one data-parallel rank", unit="sequences", least=1
    )
    recompute: str = setting(
        "none",
        "activations that the backward pass makes again: selective = all but matrix products; full "
        "= whole blocks, "
        "about a third more time",
        choices=RECOMPUTE,
    )
    sequence_parallel: bool = setting(
        True, "with tp > 1: divide the residual stream along the sequence between its regions"
    )
    vocabulary_parallel: bool = setting(
        True, "with tp > 1: divide embedding, head and loss over the vocabulary"
    )
    shares: tuple[int, ...] = setting(
        (),
        "micro-batches of a step that each of the dp_replicate replicas takes, in proportion; [] "
        "= equal",
        least=1,
    )
    placement: tuple[int, ...] = setting(
        (),
        "the process, as torchrun numbers them, at every position of the grid; [] = in order",
        least=0,
    )
    zero_stage: int = setting(
        2,
        "deepspeed only: divide optimizer state (1), gradients too (2), weights too (3)",
        least=1,
        most=3,
    )
    offload: str = setting(
        "none",
        "deepspeed only: keep optimizer state, or weights as well, in host memory",
        choices=("none", "optimizer", "parameters"),
    )
    deepspeed: Mapping[str, Any] = setting(
        dict, "deepspeed only: further settings of DeepSpeed's own configuration", kind="free"
    )
    accelerate_config: str | None = setting(
        None, "accelerate only: file of `accelerate config`", kind="path"
    )

    def layout_for(self, world_size: int) -> Layout:
        """Return the layout on `world_size` ranks; `dp_shard: null` becomes what the other degrees
        leave of them.

        The result may break rules: `parallel.layout_rules.problems` names them.
        """
        others = self.dp_replicate * self.tp * self.pp * self.cp
        shard = max(1, world_size // others) if self.dp_shard is None else self.dp_shard
        return Layout(
            engine=self.engine,
            dp_replicate=self.dp_replicate,
            dp_shard=shard,
            tp=self.tp,
            pp=self.pp,
            cp=self.cp,
            ep=self.ep,
            etp=self.etp,
            stage_layers=self.stage_layers,
            virtual_stages=self.virtual_stages,
            schedule=self.schedule,
            micro_sequences=self.micro_sequences,
            recompute=self.recompute,
            sequence_parallel=self.sequence_parallel,
            vocabulary_parallel=self.vocabulary_parallel,
            shares=self.shares,
            placement=self.placement,
        )


def names_layouts(options: Mapping[str, Any]) -> bool:
    """Return whether stages among the options of a run's family have layouts of their own."""
    asked = options.get("stages")
    stages = asked if isinstance(asked, Sequence) else ()
    return any(isinstance(stage, Mapping) and "layout" in stage for stage in stages)


# Settings that have another name now -> what to write.
MOVED = {
    "batch.micro_sequences": "layout.micro_sequences",
    "training.recompute": "layout.recompute",
    "layout.shard": "layout.dp_replicate: PROCESSES with layout.dp_shard: 1 where it was false, "
    "and nothing where it was true",
}
