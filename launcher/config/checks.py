"""Settings that contradict each other: pure functions from values to problems.

Nothing here reads a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from motet.core.errors import Problem, UserError, suggest
from motet.launcher.config.batch import slurm_problems
from motet.launcher.config.repeat import repeat_problems
from motet.launcher.config.sections import LayoutSettings, RunSettings
from motet.launcher.config.telling import telling_problems
from motet.launcher.config.validation import validation_problems
from motet.slurm.config import shown

if TYPE_CHECKING:
    from motet.models.config import ModelConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
MOST_TOKENS = 1 << 62


def name_problems(settings: RunSettings) -> list[Problem]:
    if not settings.name:
        return [Problem("name", "is missing; give the run a name, such as `name: first-run`")]
    if not _NAME.fullmatch(settings.name):
        return [
            Problem(
                "name",
                f"{shown(settings.name)} cannot name a folder; use letters, digits, '.', '_' and "
                "'-', at most 100, the first a "
                "letter or digit",
            )
        ]
    return []


def length_problems(settings: RunSettings) -> list[Problem]:
    """Exactly one of `training.steps` and `training.tokens`, and no more than can be counted."""
    training = settings.training
    if (training.steps is None) == (training.tokens is None):
        state = "neither is" if training.steps is None else "both are"
        return [
            Problem(
                "training.steps", f"{state} given; give either training.steps or training.tokens"
            )
        ]
    total = settings.slots_before(settings.steps) * settings.data.sequence_length
    if total >= MOST_TOKENS:
        return [Problem("training.steps", f"the run would read {total:.1e} tokens; most is 4.6e18")]
    return []


def ramp_problems(settings: RunSettings) -> list[Problem]:
    """Every step has one batch size."""
    out = []
    seen: set[int] = set()
    for i, stage in enumerate(settings.batch.ramp):
        if stage.step in seen:
            why = f"{stage.step} is given twice; a step has one batch size"
            out.append(Problem(f"batch.ramp.{i}.step", why))
        seen.add(stage.step)
    return out


def set_problems(settings: RunSettings) -> list[Problem]:
    """What is read again and again fits the run and its batches."""
    sizes = [settings.batch.sequences, *(stage.sequences for stage in settings.batch.ramp)]
    return repeat_problems(settings.data.repeat, settings.slots_before(settings.steps), sizes)


def layout_problems(
    settings: RunSettings, world_size: int, model: ModelConfig | None = None
) -> list[Problem]:
    """The layout fits the ranks that are started, the batch, the sequences, and the model as far as
    it is known.

    Args:
        world_size: processes of all nodes.
        model: its sizes; None: those of the preset, with the vocabulary left open unless it is set.
    """
    from motet.parallel.layout import rules as layout_rules

    layout = settings.layout_for(world_size)
    sizes = [settings.batch.sequences, *(stage.sequences for stage in settings.batch.ramp)]
    model = model or _preset_model(settings)
    found = layout_rules.problems(layout, model, settings.data.sequence_length, sizes, world_size)
    out = [Problem(setting, why) for setting, why in found]
    if settings.training.compile and "zero_bubble" in layout.schedule and layout.pp > 1:
        why = (
            f"{layout.schedule} takes the backward pass apart, which training.compile=true "
            "forbids; set interleaved_1f1b"
        )
        out.append(Problem("layout.schedule", why))
    return out


def _preset_model(settings: RunSettings) -> ModelConfig | None:
    """Sizes of the model as far as the settings alone tell them; 0 = the vocabulary is the
    corpus's.
    """
    if settings.model.from_hf is not None or model_problems(settings):
        return None
    from motet.models import config as models

    overrides = {"vocabulary_size": 0, **settings.model.overrides()}
    return models.preset(settings.model.preset, **overrides)


def engine_problems(settings: RunSettings) -> list[Problem]:
    """Settings of one engine are given to no other."""
    layout, default = settings.layout, LayoutSettings()
    owners = {
        "zero_stage": "deepspeed",
        "offload": "deepspeed",
        "deepspeed": "deepspeed",
        "accelerate_config": "accelerate",
    }
    return [
        Problem(
            f"layout.{name}",
            f"is read by layout.engine={engine} only, and the engine is {layout.engine}; leave it "
            "out",
        )
        for name, engine in owners.items()
        if getattr(layout, name) != getattr(default, name) and layout.engine != engine
    ]


def deepspeed_problems(settings: RunSettings) -> list[Problem]:
    """What the user adds to DeepSpeed's configuration contradicts no setting, and DeepSpeed reads
    it.
    """
    from motet.parallel.engines import deepspeed_config

    layout = settings.layout
    if layout.engine != "deepspeed":
        return []
    found = deepspeed_config.problems(
        layout.zero_stage, layout.offload, layout.deepspeed, settings.training.compile
    )
    if layout.dp_replicate > 1:
        why = f"{layout.dp_replicate}, but ZeRO divides its state over all ranks; leave it out"
        found.append(("layout.dp_replicate", why))
    return [Problem(setting, why) for setting, why in found]


def deepspeed_settings(settings: RunSettings) -> dict[str, Any]:
    """DeepSpeed's configuration as the engine will make it for the processes of one node."""
    from motet.parallel.engines.deepspeed_config import deepspeed_config

    layout = settings.layout
    return deepspeed_config(
        zero_stage=layout.zero_stage,
        offload=layout.offload,
        clip_norm=settings.training.clip_norm,
        micro_sequences=layout.micro_sequences,
        world_size=layout.processes,
        extra=layout.deepspeed,
    )


def deepspeed_library_problems(settings: RunSettings) -> list[Problem]:
    """What DeepSpeed itself finds wrong with its configuration; imports it, which takes seconds, if
    the engine is DeepSpeed.
    """
    from motet.parallel.engines.deepspeed_config import library_problems

    if settings.layout.engine != "deepspeed":
        return []
    return [
        Problem(setting, why) for setting, why in library_problems(deepspeed_settings(settings))
    ]


def device_problems(device: str, processes: int, gpus: int) -> list[Problem]:
    """The processes of this node find the devices that they ask for, of which it has `gpus`."""
    if device == "cpu" or (device == "auto" and gpus == 0):
        return []
    if gpus == 0:
        why = f"{device}, but torch sees no CUDA device here; use auto or cpu"
        return [Problem("layout.device", why)]
    if processes > gpus:
        why = (
            f"{processes} processes need a GPU each, and there are {gpus} here; at most {gpus}, or "
            "layout.device=cpu"
        )
        return [Problem("layout.processes", why)]
    return []


def schedule_problems(settings: RunSettings) -> list[Problem]:
    """Warm-up (and decay) fit into the run; two betas."""
    training = settings.training
    out = []
    if len(training.optimizer.betas) != 2:
        out.append(
            Problem(
                "training.optimizer.betas",
                f"has {len(training.optimizer.betas)} values; AdamW takes two, such as [0.9, 0.95]",
            )
        )
    if (training.steps is None) == (training.tokens is None):
        return out
    steps, warmup = settings.steps, training.schedule.warmup_steps
    if warmup >= steps:
        out.append(
            Problem(
                "training.schedule.warmup_steps",
                f"{warmup:,} leaves none of the run's {steps:,} steps; at most {steps - 1:,}, "
                f"usual is {max(steps // 20, 0):,}",
            )
        )
    elif training.schedule.kind == "wsd":
        decay = round(training.schedule.decay_fraction * steps)
        if warmup + decay > steps:
            most = (steps - warmup) / steps
            out.append(
                Problem(
                    "training.schedule.decay_fraction",
                    f"{training.schedule.decay_fraction:g} of {steps:,} steps and a warm-up of "
                    f"{warmup:,} exceed the run; "
                    f"at most {int(most * 1000) / 1000:g}",
                )
            )
    return out


def data_problems(settings: RunSettings) -> list[Problem]:
    """There is a corpus, none is listed twice, and a probe can hold one sequence."""
    out = []
    if not settings.data.corpora:
        out.append(
            Problem(
                "data.corpora",
                "is empty; list at least one `{path: FOLDER}` that `motet data prepare` made",
            )
        )
    seen: set[str] = set()
    for i, corpus in enumerate(settings.data.corpora):
        if not corpus.path:
            out.append(Problem(f"data.corpora.{i}.path", "is missing; give the folder of a corpus"))
        elif corpus.path in seen:
            out.append(
                Problem(
                    f"data.corpora.{i}.path", f"{corpus.path} is listed twice; raise its weight"
                )
            )
        seen.add(corpus.path)
    length, room = settings.data.sequence_length, settings.probes.batch_tokens
    if room < length:
        out.append(
            Problem(
                "probes.batch_tokens",
                f"{room:,} holds no whole sequence; at least data.sequence_length = {length:,}",
            )
        )
    return out


def held_out_problems(settings: RunSettings) -> list[Problem]:
    """See `validation_problems`."""
    return validation_problems(settings.validation, settings.data.paths)


def model_problems(settings: RunSettings) -> list[Problem]:
    """The preset exists and its sizes fit each other."""
    from motet.models import config as models

    model = settings.model
    if model.from_hf is not None:
        if settings.family.kind == "progressive":
            return []  # they are sizes of the model that it grows into, once the folder is read
        given = ", ".join(
            f"model.{name}" for name in model.overrides() if name not in models.TRAINING_FIELDS
        )
        why = f"fixes every size; remove {given}"
        return [Problem("model.from_hf", why)] if given else []
    if model.preset not in models.PRESETS:
        hint = suggest(model.preset, models.PRESETS)
        known = ", ".join(models.PRESETS)
        return [Problem("model.preset", f"{model.preset!r} is no preset{hint}; there are {known}")]
    overrides = model.overrides()
    vocabulary_size = overrides.pop("vocabulary_size", 1 << 16)
    try:
        config = models.preset(model.preset, vocabulary_size, **overrides)
        return [Problem(f"model.{name}", why) for name, why in models.problems(config)]
    except (UserError, ZeroDivisionError) as error:
        return [Problem("model", str(error))]


def job_problems(settings: RunSettings) -> list[Problem]:
    """See `slurm_problems`."""
    return slurm_problems(settings.slurm, settings.layout)


def tracked_problems(settings: RunSettings) -> list[Problem]:
    """See `telling_problems`."""
    return telling_problems(settings.tracking, settings.alerts)


# Each check with the settings that it reads.
CHECKS: tuple[tuple[Callable[[RunSettings], list[Problem]], tuple[str, ...]], ...] = (
    (name_problems, ("name",)),
    (length_problems, ("training.steps", "training.tokens", "batch", "data.sequence_length")),
    (ramp_problems, ("batch.ramp",)),
    (set_problems, ("data.repeat", "batch", "training.steps", "training.tokens")),
    (schedule_problems, ("training", "batch", "data.sequence_length")),
    (data_problems, ("data", "probes")),
    (held_out_problems, ("data.corpora", "validation")),
    (model_problems, ("model",)),
    (engine_problems, ("layout",)),
    (deepspeed_problems, ("layout", "training.compile")),
    (tracked_problems, ("tracking", "alerts")),
    (job_problems, ("slurm", "layout.processes", "layout.device")),
)
LAYOUT_READS = ("layout", "batch", "data.sequence_length", "model", "training.compile")
"""What `layout_problems` reads: it needs the number of ranks besides."""
