"""The family of a run: made from its settings, its members frozen in the manifest. Torch-free."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from motet.core.errors import DamagedFile, Problem, UserError, raise_problems, suggest
from motet.core.plugins import (
    MISTAKES,
    PluginError,
    is_reference,
    load_class,
    parse_reference,
    place,
)
from motet.launcher.config.sections import RunSettings
from motet.launcher.runs.kept_models import settled_starts
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.seals import read_checkpoint
from motet.models.config import ModelConfig
from motet.models.family.base import (
    WHOLE,
    Family,
    Member,
    member_facts,
    member_problems,
    members_of,
)
from motet.models.family.progressive import ProgressiveFamily
from motet.models.family.registry import FAMILIES
from motet.models.family.stage_lengths import RunShape
from motet.parallel.engines.refusals import refusals, stage_refusals
from motet.parallel.layout.layout import Layout


def frozen_class(
    run: RunDir, manifest: Mapping[str, Any], setting: str, text: str, base: type
) -> type:
    """Return a class from the run's snapshot.

    Raises:
        PluginError: the run was not frozen with it; its source is missing or altered.
    """
    reference, known = parse_reference(text, setting), manifest.get("plugins", {})
    if text not in known:
        raise PluginError(setting, f"is {text!r}, and the run was frozen without it; leave it out")
    return load_class(reference, run.plugins, base, setting, known[text])


def new_members(settings: RunSettings, whole: ModelConfig) -> dict[str, Any]:
    """Return what a new run's manifest says of the members beside the whole model; {} without.

    Raises:
        UserError: no such kind of family, a mistake in it, or members that cannot be.
    """
    if settings.family.kind == WHOLE:
        return {}
    family = new_family(settings, whole)
    members = sound_members(family, settings)
    if not members:
        return {}
    facts: dict[str, Any] = {"members": member_facts(members, settings.data.sequence_length)}
    if isinstance(family, ProgressiveFamily):
        facts["stages"] = family.stage_facts()
        facts["sequence_length"] = settings.data.sequence_length
        facts["model"] = vars(family.whole)  # with the multipliers of its width
    return facts | ({"family_needs": list(needs)} if (needs := family.needs()) else {})


def sound_members(family: Family, settings: RunSettings) -> Sequence[Member]:
    """Return the members of a family that can train for as long as the run is.

    Raises:
        UserError: they cannot be, or the family cannot train so.
    """
    members = made_members(family)
    # Those that grow are no slices of the whole; each is a model that was looked at by itself.
    grows = isinstance(family, ProgressiveFamily)
    problems = [] if grows else member_problems(family.whole, members)
    if isinstance(family, ProgressiveFamily) and settings.model.from_hf:
        problems = first_stage_problems(family, settings.model.from_hf)
    problems = problems or family.problems(settings.steps)
    raise_problems([Problem("family.kind", why) for why in problems])
    return members


def first_stage_problems(family: ProgressiveFamily, folder: str) -> list[str]:
    """Return why a family that grows cannot begin with the weights of a Hugging Face folder."""
    from motet.models.growth.operator import FREE, foreign, sized  # brings torch
    from motet.models.hf_files import config_of_folder

    begins, first = config_of_folder(Path(folder)), family.stages[0]
    if strange := foreign(begins):
        return [
            f"model.from_hf={folder} cannot grow: {', '.join(strange)} is of a kind whose weights "
            "no operator of growth maps"
        ]
    differing = [
        f"{key}={sized(first.config, key)} instead of {sized(begins, key)}"
        for key in vars(begins)
        if key not in FREE and sized(first.config, key) != sized(begins, key)
    ]
    if not differing:
        return []
    return [
        f"model.from_hf={folder} is what the first stage begins with, and {first.label} has "
        f"{', '.join(differing)}; give stages[0] the folder's sizes, and the section model those "
        "of the last stage, as in model: {from_hf: FOLDER, n_layers: 24}"
    ]


def new_family(settings: RunSettings, whole: ModelConfig) -> Family:
    """Return the family that settings describe, before a run is frozen.

    Raises:
        UserError: no such kind of family, or a mistake in its class or options.
    """
    kind = settings.family.kind
    if is_reference(kind):
        reference = parse_reference(kind, "family.kind")
        made = load_class(reference, Path(settings.base), Family, "family.kind")
    elif kind in FAMILIES:
        made = FAMILIES[kind]
    else:
        known = ", ".join(FAMILIES)
        hint = suggest(kind, FAMILIES)
        raise UserError(
            f"family.kind: is {kind!r}; it must be one of {known}, or a class of your own as "
            f"my_family.py:Class{hint}"
        )
    return _made(made, settings, whole)


def refuse_layout(
    manifest: Mapping[str, Any], layout: Layout, whole: ModelConfig, stages: Sequence[Layout] = ()
) -> None:
    """Raise `UserError` where a layout cannot train the family of a run's manifest.

    Args:
        stages: layouts of the stages of a family that grows, in order; () = all have `layout`.
    """
    if manifest.get("members"):
        members, needs = members_of(manifest), manifest.get("family_needs", ())
        if manifest.get("stages"):
            found = growing_refusals(
                stages or [layout] * len(manifest["stages"]),
                whole,
                members,
                manifest["stages"],
                manifest["sequence_length"],
                needs,
            )
        else:
            found = refusals(layout, whole, members, needs)
        raise_problems([Problem("family.kind", why) for why in found])


def growing_refusals(
    layouts: Sequence[Layout],
    whole: ModelConfig,
    members: Sequence[Member],
    stages: Sequence[Mapping[str, Any]],
    sequence_length: int,
    needs: Sequence[str] = (),
) -> list[str]:
    """Return why layouts cannot train a family that grows, in words.

    Args:
        layouts: of every stage, in order.
        stages: `ProgressiveFamily.stage_facts`.
        needs: of the family, where no stage says its own.
    """
    named, by_name = {stage["name"] for stage in stages}, {one.name: one for one in members}
    alone = [member for member in members if member.name in named]
    found = list(stage_refusals(layouts, alone, sequence_length))
    for layout, stage in zip(layouts, stages, strict=True):
        if slices := [by_name[name] for name in stage.get("members", ())]:
            config = by_name[stage["name"]].config if stage["name"] in by_name else whole
            found += refusals(layout, config, slices, stage.get("needs", needs))
    for number, (layout, stage) in enumerate(zip(layouts, stages, strict=True)):
        if layout.pp > 1 and "teacher_flops_per_token" in stage:
            why = "stages of a pipeline have no second model beside them to follow"
            found.append(f"layout.pp={layout.pp}: {why}; set layout.pp=1")
        if layout.pp > 1 and "virtual_flops_per_token" in stage:
            why = "layers that run several times are not equally many in all stages of a pipeline"
            found.append(f"layout.pp={layout.pp}: {why}; set layout.pp=1")
        pp = layouts[max(0, number - 1)].pp
        if pp > 1 and stage["operator"].startswith("prune"):
            why = "channels that are pruned are measured in one piece; set layout.pp=1"
            found.append(f"layout.pp={pp}: {why}")
    return list(dict.fromkeys(found))


def draws_of(
    family: Family, settings: RunSettings, layout: Layout, begun: int | None = None
) -> int:
    """Return in how many equal shares of a step's sequences a family says who trains.

    Args:
        begun: the number that the run began with, so that another layout keeps who trains on what.

    Raises:
        UserError: a step cannot be shared so on this layout.
    """
    sizes = {size for _, size in settings.batch_steps.changes}
    ranks = layout.dp_size * layout.micro_sequences
    number = begun or family.draws or math.gcd(*(size // ranks for size in sizes))
    # Replicas that work on different shares need whole micro-batches in each, not one for all.
    unit = layout.micro_sequences if family.by_replica else ranks
    for size in sorted(sizes):
        if size % (number * unit):
            whole = [n for n in range(1, size // unit + 1) if size % (n * unit) == 0]
            fits = ", ".join(str(n) for n in whole if n <= number) or "none"
            raise UserError(
                f"family.kind: {number} shares of a step of {size} sequences are no whole "
                f"micro-batches of {layout.micro_sequences} on {layout.dp_size} data-parallel "
                f"ranks; shares that would fit: {fits}, or another batch, layout or "
                "layout.micro_sequences"
            )
    return number


def units_of(settings: RunSettings, family: Family | None) -> tuple[int, int]:
    """Return the sequences that the micro-batches of all data-parallel ranks together divide, and
    those that a micro-batch divides, in every step of a run: what `draws_of` asks of a layout.

    Args:
        family: None or one that says in no fixed number of shares who trains: whole steps.

    Raises:
        UserError: a step cannot be cut in the family's shares.
    """
    sizes = {size for _, size in settings.batch_steps.changes}
    number = 1 if family is None or family.draws is None else family.draws
    if uneven := sorted(size for size in sizes if size % number):
        fits = ", ".join(str(n) for n in range(1, number) if math.gcd(*sizes) % n == 0)
        raise UserError(
            f"family.kind: {number} shares of a step of {uneven[0]} sequences are not equal; "
            f"shares that would fit: {fits}, or another batch"
        )
    step = math.gcd(*sizes)
    replicas_apart = family is not None and family.by_replica
    return step if replicas_apart else step // number, step // number


def draws_begun(run: RunDir) -> int | None:
    """Return in how many shares of a step a begun run draws; None before its first checkpoint."""
    for step in reversed(run.checkpoint_steps()):
        with contextlib.suppress(DamagedFile):  # dealt with when it is loaded
            found = read_checkpoint(run, step).get("draws")
            return None if found is None else int(found)
    return None


def open_family(
    run: RunDir, settings: RunSettings, manifest: Mapping[str, Any]
) -> tuple[Family, dict[str, Member]]:
    """Return the family of a frozen run and its members by name, as they were frozen.

    Raises:
        UserError: the source of its class is missing or altered, or it makes other members now.
    """
    whole, kind = ModelConfig(**manifest["model"]), settings.family.kind
    if is_reference(kind):
        made = frozen_class(run, manifest, "family.kind", kind, Family)
    else:
        made = FAMILIES[kind]
    family = _made(made, settings, whole, manifest.get("stages") or (), run)
    frozen = members_of(manifest)
    if list(made_members(family)) != frozen:
        raise UserError(
            f"family.kind: {kind} makes other members than those that {run.manifest} was frozen "
            "with; members must depend on the model, the options and the seed alone"
        )
    if isinstance(family, ProgressiveFamily):
        for stage in manifest.get("stages", ()):
            refuse_other_multipliers(family, stage, str(run.manifest))
    return family, {member.name: member for member in frozen}


def refuse_other_multipliers(
    family: ProgressiveFamily, stage: Mapping[str, Any], source: str
) -> None:
    """Raise `UserError` where a stage was written down with other width multipliers than the family
    has for it: its model would train, or compute, another thing than it did.

    Args:
        stage: of a run's or a checkpoint's manifest.
        source: the file.
    """
    now, then = family.multipliers(stage["name"]), stage.get("width_multipliers")
    if now != then:
        raise UserError(
            f"family.options.width_multipliers: {source} says {then} of stage {stage['name']}, and "
            f"this family gives {now}; restore that file, or the version that wrote it"
        )


def _made(
    made: type[Family],
    settings: RunSettings,
    whole: ModelConfig,
    stages: Sequence[Mapping[str, Any]] = (),
    run: RunDir | None = None,
) -> Family:
    """Return a family, its stages laid over the run, or as they were frozen with it and as the
    run's newest checkpoint knows them.
    """
    try:
        family = made(whole, settings.family.options, settings.seed)
        if isinstance(family, ProgressiveFamily):
            family.fit(shape_of(settings), stages)
            if run is not None and (starts := settled_starts(run)):
                family.settle(starts)
        return family
    except UserError:
        raise
    except MISTAKES as error:
        raise PluginError("family.kind", f"cannot be made: {place(error, made)}") from None


def shape_of(settings: RunSettings) -> RunShape:
    """Return the length and the learning rate of a run, as stages of a family need them."""
    training = settings.training
    return RunShape(
        steps=settings.steps,
        sequence_length=settings.data.sequence_length,
        sequences_before=settings.slots_before,
        peak_lr=training.optimizer.learning_rate,
        warmup_steps=training.schedule.warmup_steps,
    )


def made_members(family: Family) -> Sequence[Member]:
    """Return the members of a family, with its mistakes as users' errors."""
    try:
        return list(family.members())
    except MISTAKES as error:
        message = f"its members cannot be made: {place(error, type(family))}"
        raise PluginError("family.kind", message) from None
