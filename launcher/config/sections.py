"""The sections of a run.yaml, as typed dataclasses.

Every field says its meaning, its unit and its bounds in its metadata: `config.py` checks values
against them and `reference.py` prints them. Imports neither torch nor OmegaConf.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from motet.core.access import CHOICES, UMASK
from motet.launcher.config.batch import SlurmSettings as SlurmSettings
from motet.launcher.config.decontaminate import DecontaminateSettings as DecontaminateSettings
from motet.launcher.config.field import setting
from motet.launcher.config.layout import LayoutSettings as LayoutSettings
from motet.launcher.config.model import FamilySettings as FamilySettings
from motet.launcher.config.model import ModelSettings as ModelSettings
from motet.launcher.config.probes import ProbeSettings as ProbeSettings
from motet.launcher.config.repeat import RepeatSettings as RepeatSettings
from motet.launcher.config.telling import AlertSettings as AlertSettings
from motet.launcher.config.telling import TrackingSettings as TrackingSettings
from motet.launcher.config.validation import ValidationSettings as ValidationSettings

if TYPE_CHECKING:
    from motet.experiments.stream.batch_sizes import Steps
    from motet.parallel.layout.layout import Layout


@dataclass(frozen=True)
class CorpusSettings:
    """One corpus of the mixture."""

    path: str = setting("", "folder that `motet data prepare` or `index` made", kind="path")
    weight: float = setting(
        1.0, "share of the sequences, relative to the other corpora's weights", above=0
    )


@dataclass(frozen=True)
class DataSettings:
    """Which tokens the run reads."""

    sequence_length: int = setting(
        512, "length of one training example", unit="tokens", least=8, most=1 << 20
    )
    document_masks: bool = setting(
        False, "attention stays inside a document when a sequence holds several"
    )
    seed: int | None = setting(
        None, "seed of the order of the sequences; null = the run's seed", least=0
    )
    corpora: tuple[CorpusSettings, ...] = setting((), "the corpora that are mixed; at least one")
    repeat: RepeatSettings = setting(
        RepeatSettings, "sequences that are read again and again", omit_default=True
    )
    verify: bool = setting(True, "check the SHA-256 of every shard before training starts")

    @property
    def paths(self) -> list[str]:
        """The folders of the corpora."""
        return [corpus.path for corpus in self.corpora]


@dataclass(frozen=True)
class RampSettings:
    """One stage of a batch ramp."""

    step: int = setting(0, "the step from which this stage holds", unit="steps", least=0)
    sequences: int = setting(
        0, "sequences per step from then on", unit="sequences", least=1, most=1 << 24
    )


@dataclass(frozen=True)
class BatchSettings:
    """How many sequences make one step."""

    sequences: int = setting(
        32, "sequences per step over all ranks", unit="sequences", least=1, most=1 << 24
    )
    ramp: tuple[RampSettings, ...] = setting(
        (),
        "stages `{step, sequences}` of other batch sizes; `batch.sequences` holds before the first",
    )


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW."""

    lr: float | None = setting(
        None, "peak learning rate; null = by the number of parameters", above=0, below=1
    )
    betas: tuple[float, ...] = setting(
        (0.9, 0.95), "decay rates of the two moments", least=0, below=1
    )
    eps: float = setting(1e-8, "epsilon of AdamW", above=0)
    weight_decay: float = setting(
        0.1, "decoupled weight decay (matrices only, no norms or embeddings)", least=0
    )
    fused: bool = setting(True, "fused kernel")

    def learning_rate(self, n_parameters_non_embedding: int) -> float:
        """`lr` if set, else 0.003239 - 0.0001395 ln(N), at least 3e-4 (Kaplan et al. 2020, appendix
        D.6).
        """
        if self.lr is not None:
            return self.lr
        return max(3e-4, 0.003239 - 0.0001395 * math.log(max(n_parameters_non_embedding, 2)))


@dataclass(frozen=True)
class ScheduleSettings:
    """Learning rate over the run."""

    kind: str = setting(
        "cosine",
        "shape after the warm-up",
        choices=("cosine", "wsd", "linear", "constant"),
    )
    warmup_steps: int = setting(100, "linear rise from 0", unit="steps", least=0)
    final_lr_fraction: float = setting(
        0.1, "learning rate of the last step over the peak", least=0, most=1
    )
    decay_fraction: float = setting(
        0.2, "wsd only: share of the run that decays", unit="fraction of the run", above=0, most=1
    )


@dataclass(frozen=True)
class BadStepSettings:
    """What to do when a loss or gradient is not finite, or spikes."""

    policy: str = setting(
        "skip",
        "leave the update out, go back to the last checkpoint, or stop",
        choices=("skip", "rollback", "stop"),
    )
    spike_sigma: float = setting(
        6.0,
        "a loss this far above the mean of the window is bad; 0 = only non-finite values",
        unit="standard deviations",
        least=0,
    )
    window: int = setting(128, "steps that the spike test looks back", unit="steps", least=8)
    most: int = setting(
        10, "the run stops after this many bad steps in one window", unit="steps", least=1
    )


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how it is trained. Exactly one of `steps` and `tokens` is given."""

    steps: int | None = setting(None, "length of the run", unit="steps", least=1)
    tokens: int | None = setting(
        None, "length of the run; rounded up to a whole step", unit="tokens", least=1
    )
    optimizer: OptimizerSettings = setting(OptimizerSettings, "AdamW")
    schedule: ScheduleSettings = setting(ScheduleSettings, "learning rate over the run")
    clip_norm: float = setting(1.0, "largest norm of the gradient; 0 = no clipping", least=0)
    z_loss: float = setting(
        0.0, "weight of the squared log-partition in the loss (PaLM uses 1e-4)", least=0
    )
    precision: str = setting(
        "auto",
        "fp32, or bf16 autocast with fp32 weights; auto = bf16 where the device is fast at it",
        choices=("auto", "fp32", "bf16"),
    )
    compile: bool = setting(False, "torch.compile every block")
    bad_steps: BadStepSettings = setting(BadStepSettings, "NaN and spikes")
    deterministic: bool = setting(True, "deterministic kernels: a resumed run is bit-equal")
    max_restarts: int = setting(
        3, "how often torchrun starts all ranks anew when one dies", unit="restarts", least=0
    )
    hooks: tuple[str, ...] = setting(
        (),
        "classes of your own that are called at moments of training: my_hooks.py:MyHook (a file "
        "next to run.yaml) or package.module:MyHook",
        omit_default=True,
    )


@dataclass(frozen=True)
class AssumeSettings:
    """What `motet experiments power` has to assume, because nothing is measured yet."""

    icc: float = setting(
        1.0,
        "correlation between outcomes of units of one cluster; 1 = they agree completely",
        least=0,
        most=1,
    )
    baseline_correlation: float = setting(
        0.0,
        "correlation of the primary outcome with its value before any exposure, held-out units",
        least=-0.99,
        most=0.99,
    )


@dataclass(frozen=True)
class ExperimentSettings:
    """The questions. A bare YAML list under `experiments:` is read as `experiments.list`."""

    list: tuple[Mapping[str, Any], ...] = setting(
        (), "the experiments; see 'One experiment'", kind="free"
    )
    files: tuple[str, ...] = setting(
        (), "YAML files, or folders of them, that hold more experiments", kind="path"
    )
    controls: bool = setting(
        True, "add an A/A placebo and a positive control unless the list has them"
    )
    lock: str | None = setting(
        None, "plan of an earlier run whose placements must not move", kind="path"
    )
    insertions: str | None = setting(
        None,
        "file of `motet experiments import`: inserted at its exact places, nothing is asked of it",
        kind="path",
        omit_default=True,
    )
    preregistered: str | None = setting(
        None,
        "file of `motet experiments freeze` that the run is held to: its report lists every "
        "deviation",
        kind="path",
        omit_default=True,
    )
    draws: int = setting(
        10_000,
        "re-randomizations of the analysis",
        unit="assignments",
        least=100,
        most=1_000_000,
    )
    alpha: float = setting(
        0.05,
        "significance level of the run, shared by all its experiments and controls: the chance of "
        "any false 'found', Holm's correction included",
        above=0,
        most=0.1,
        omit_default=True,
    )
    assume: AssumeSettings = setting(
        AssumeSettings, "what power is computed with", omit_default=True
    )
    seed: int | None = setting(None, "seed of randomization; null = the run's seed", least=0)
    member: str | None = setting(
        None,
        "the member of a family at which questions and controls are answered, unless an experiment "
        "says otherwise; null = the whole model, which is the largest",
        omit_default=True,
    )
    decontaminate: DecontaminateSettings = setting(
        DecontaminateSettings, "units that the base text holds anyway", omit_default=True
    )
    scan_tokens: int = setting(
        1_000_000_000,
        "the corpora are searched for texts and probes of units if they have at most so many "
        "tokens in all; 0 = never",
        unit="tokens",
        least=0,
        omit_default=True,
    )


@dataclass(frozen=True)
class CheckpointSettings:
    """How often the run is saved and what is kept."""

    every_steps: int = setting(
        200, "time between checkpoints; 0 = only the last step", unit="steps", least=0
    )
    keep: int = setting(3, "newest checkpoints that are kept", unit="checkpoints", least=1)
    keep_every_steps: int = setting(
        0, "checkpoints at multiples of this stay for good; 0 = none", unit="steps", least=0
    )
    async_: bool = setting(True, "write while training goes on", key="async")
    no_room: str = setting(
        "stop",
        "when the disk lacks room for a checkpoint: stop = end the run with the reason; skip = "
        "train on without it and try again when the next one is due. The last one of a run, and "
        "one that a model grows from, are never skipped",
        choices=("stop", "skip"),
        omit_default=True,
    )


@dataclass(frozen=True)
class MetricSettings:
    """Where the numbers go. `metrics.jsonl` in the run folder is always written."""

    wandb: str = setting("off", "Weights & Biases", choices=("off", "online", "offline"))
    project: str = setting("motet", "W&B project")
    group: str | None = setting(None, "W&B group; null = the run's name")
    tags: tuple[str, ...] = setting((), "W&B tags")
    entity: str | None = setting(None, "W&B entity (team or user)")
    log_every: int = setting(1, "time between logged steps", unit="steps", least=1)
    evaluate_every: float = setting(
        0.05,
        "of a family: time between evaluations of one member on held-out text, the members taking "
        "turns; all are evaluated at the end. 0 = none",
        unit="fraction of the run",
        least=0,
        most=1,
        omit_default=True,
    )
    evaluate_sequences: int = setting(
        32,
        "held-out sequences of an evaluation: the last of the corpora's first epoch",
        unit="sequences",
        least=1,
        omit_default=True,
    )


@dataclass(frozen=True)
class RunSettings:
    """A whole run.yaml.

    Attributes:
        base: no setting; the folder that relative paths start from (once loaded, all are absolute).
        as_written: no setting; those that hold an `${oc.env:...}`, with their unresolved text, so
            that a secret is never stored.
    """

    name: str = setting("", "name of the run and of its folder; required")
    seed: int = setting(0, "seed of weights, order and randomization", least=0, most=(1 << 63) - 1)
    runs: str = setting("runs", "folder of the run folders", kind="path")
    access: str = setting(
        UMASK, "whose its files are; group: that of `runs`", choices=CHOICES, omit_default=True
    )
    model: ModelSettings = setting(ModelSettings, "what is trained")
    family: FamilySettings = setting(
        FamilySettings, "the models that it delivers", omit_default=True
    )
    data: DataSettings = setting(DataSettings, "which tokens it reads")
    validation: ValidationSettings = setting(
        ValidationSettings, "the loss on text that it does not read", omit_default=True
    )
    batch: BatchSettings = setting(BatchSettings, "sequences per step")
    training: TrainingSettings = setting(TrainingSettings, "how long, optimizer, precision")
    experiments: ExperimentSettings = setting(ExperimentSettings, "the questions")
    probes: ProbeSettings = setting(ProbeSettings, "when they are measured")
    checkpoint: CheckpointSettings = setting(CheckpointSettings, "saving")
    layout: LayoutSettings = setting(LayoutSettings, "processes, devices, parallelism")
    metrics: MetricSettings = setting(MetricSettings, "logging")
    tracking: TrackingSettings = setting(TrackingSettings, "services beside W&B", omit_default=True)
    alerts: AlertSettings = setting(AlertSettings, "messages to a webhook", omit_default=True)
    slurm: SlurmSettings = setting(SlurmSettings, "the batch job of `motet submit`")
    scheduler: str = setting(
        "slurm",
        "what `motet submit` hands the run to: slurm, or a class of your own as "
        "my_scheduler.py:MyQueue (a file next to run.yaml) or package.module:MyQueue",
        omit_default=True,
    )
    scheduler_options: Mapping[str, Any] = setting(
        dict, "what a scheduler of your own is asked for", kind="free", omit_default=True
    )
    base: str = setting("", "", kind="hidden")
    as_written: Mapping[str, str] = setting(dict, "", kind="hidden")

    @property
    def data_seed(self) -> int:
        """Seed of the order of the sequences."""
        return self.seed if self.data.seed is None else self.data.seed

    @property
    def plan_seed(self) -> int:
        """Seed of assignment and placement."""
        return self.seed if self.experiments.seed is None else self.experiments.seed

    def layout_for(self, world_size: int) -> Layout:
        """How the run is split over `world_size` ranks (see `LayoutSettings.layout_for`)."""
        return self.layout.layout_for(world_size)

    @property
    def batch_steps(self) -> Steps:
        """The batch size of every step (the ramp counted)."""
        from motet.experiments.stream.batch_sizes import Steps

        sizes = {0: self.batch.sequences, **{s.step: s.sequences for s in self.batch.ramp}}
        return Steps.of(self.batch.sequences, sorted(sizes.items()))

    def slots_before(self, step: int) -> int:
        """Sequences consumed before `step`: the first slot of that step."""
        return self.batch_steps.slots_before(step)

    @property
    def steps(self) -> int:
        """Steps of the whole run, from `training.steps` or `training.tokens`."""
        if self.training.steps is not None:
            return self.training.steps
        slots = -(-(self.training.tokens or 0) // self.data.sequence_length)
        return self.batch_steps.steps_for(slots)
