"""Settings that contradict each other: pure functions from values to problems. Nothing here reads a file."""

from __future__ import annotations

import re
from collections.abc import Callable

from motet.experiments.errors import Problem, suggest
from motet.launcher.settings import RunSettings

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
MOST_TOKENS = 1 << 62


def batch_problem(
    setting: str, sequences: int, micro_sequences: int, processes: int
) -> list[Problem]:
    """A step is a whole number of micro-batches on every process."""
    unit = micro_sequences * processes
    if sequences % unit == 0:
        return []
    below = sequences // unit * unit
    near = f"{below:,} and {below + unit:,}" if below else f"{unit:,}"
    return [
        Problem(
            setting,
            f"{sequences:,} is not a multiple of {unit:,} (layout.micro_sequences {micro_sequences:,} x "
            f"{processes:,} processes); nearest: {near}",
        )
    ]


def name_problems(settings: RunSettings) -> list[Problem]:
    if not settings.name:
        return [Problem("name", "is missing; give the run a name, such as `name: first-run`")]
    if not _NAME.fullmatch(settings.name):
        return [
            Problem(
                "name",
                f"{settings.name!r} cannot name a folder; use letters, digits, '.', '_' and '-', at most 100, the first a "
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


def batch_problems(settings: RunSettings, nodes: int = 1) -> list[Problem]:
    """Batch and every stage of its ramp divide among the processes; stages are in order."""
    batch, processes = settings.batch, settings.layout.processes * nodes
    out = batch_problem(
        "batch.sequences", batch.sequences, settings.layout.micro_sequences, processes
    )
    seen: set[int] = set()
    for i, stage in enumerate(batch.ramp):
        where = f"batch.ramp.{i}"
        out += batch_problem(
            f"{where}.sequences", stage.sequences, settings.layout.micro_sequences, processes
        )
        if stage.step in seen:
            out.append(
                Problem(f"{where}.step", f"{stage.step} is given twice; a step has one batch size")
            )
        seen.add(stage.step)
    return out


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
                    f"{training.schedule.decay_fraction:g} of {steps:,} steps and a warm-up of {warmup:,} exceed the run; "
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


def model_problems(settings: RunSettings) -> list[Problem]:
    """The preset exists and its sizes fit each other."""
    from motet.models import config as models

    model = settings.model
    if model.from_hf is not None:
        given = ", ".join(f"model.{name}" for name in model.overrides())
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
    except (ValueError, ZeroDivisionError) as error:
        return [Problem("model", str(error))]


# Each check with the settings that it reads.
CHECKS: tuple[tuple[Callable[[RunSettings], list[Problem]], tuple[str, ...]], ...] = (
    (name_problems, ("name",)),
    (length_problems, ("training.steps", "training.tokens", "batch", "data.sequence_length")),
    (batch_problems, ("batch", "layout.processes", "layout.micro_sequences")),
    (schedule_problems, ("training", "batch", "data.sequence_length")),
    (data_problems, ("data", "probes")),
    (model_problems, ("model",)),
)
