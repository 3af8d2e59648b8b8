"""The layouts of a run: one for all of it, or, where its family grows, one for every stage.

The run's section `layout` is that of the last stage, whose model is the run's; a stage before it
says under `layout` what it has otherwise. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from motet.core.errors import Problem, raise_problems
from motet.core.files import read_json
from motet.launcher.config.checks import layout_problems
from motet.launcher.config.layout import LayoutSettings, names_layouts
from motet.launcher.config.sections import RunSettings
from motet.launcher.config.typed import Builder, fields_of
from motet.launcher.config.yaml_tree import from_python
from motet.launcher.runs.families import draws_of, new_family, open_family, refuse_layout
from motet.launcher.runs.rundir import RunDir
from motet.models.config import ModelConfig
from motet.models.family.base import Family
from motet.models.family.progressive import ProgressiveFamily
from motet.models.family.staged import WHERE
from motet.parallel.layout import rules
from motet.parallel.layout.layout import Layout

OF_THE_RUN = (
    *("engine", "cluster", "device", "timeout_s"),
    *("zero_stage", "offload", "deepspeed", "accelerate_config"),
)
"""Settings of the section `layout` that all stages share."""


@dataclass(frozen=True)
class RunLayouts:
    """The layouts of a run, as the ranks of one launch know them.

    Attributes:
        layouts: of the stages in order; of the run alone where nothing grows.
        begun: number of the stage that these ranks were started for; none can train one that needs
            another number of ranks, or other places of them.
    """

    layouts: tuple[Layout, ...]
    begun: int = 0

    def of(self, number: int) -> Layout:
        """Return the layout of a stage."""
        return self.layouts[number if len(self.layouts) > 1 else 0]

    def runs_here(self, number: int) -> bool:
        """Return whether the ranks of this launch can train a stage."""
        return _ranks(self.of(number)) == _ranks(self.of(self.begun))

    def holding(self, number: int, following: int) -> Layout:
        """Return how ranks that train the `following` stage hold the model of the stage before it,
        while it grows: as that stage did, or, where it had other ranks, divided over all of them.
        """
        before, after = self.of(number), self.of(following)
        if _ranks(before) == _ranks(after):
            return before
        return Layout(dp_shard=after.world_size, micro_sequences=after.micro_sequences)


def _ranks(layout: Layout) -> tuple[int, tuple[int, ...]]:
    return layout.world_size, layout.placement


def family_of(
    settings: RunSettings, model: ModelConfig, run: RunDir | None, manifest: Mapping[str, Any]
) -> Family | None:
    """Return the family where its stages have layouts of their own, None where all have the run's.

    Args:
        run, manifest: of a run that was made; None = it is not yet.
    """
    if not names_layouts(settings.family.options):
        return None
    return new_family(settings, model) if run is None else open_family(run, settings, manifest)[0]


def settings_of(settings: RunSettings, family: Family | None, number: int) -> RunSettings:
    """Return the settings of a stage: the run's, with the layout that the stage has otherwise.

    Raises:
        UserError: there is no such setting, or it is the whole run's.
    """
    if not isinstance(family, ProgressiveFamily) or not (asked := family.stages[number].layout):
        return settings
    where = f"{WHERE}.stages[{number}].layout"
    problems = [
        Problem(f"{where}.{key}", f"is the same for all stages; set layout.{key}")
        for key in asked
        if key in OF_THE_RUN
    ]
    own = {key: value for key, value in asked.items() if key not in OF_THE_RUN}
    builder = Builder(Path(settings.base), {}, problems)
    read = builder.section(LayoutSettings, from_python(own), where)
    raise_problems(problems)
    names = [field.name for key, (field, _) in fields_of(LayoutSettings).items() if key in own]
    layout = replace(settings.layout, **{name: getattr(read, name) for name in names})
    return replace(settings, layout=layout)


def stage_settings(
    settings: RunSettings, model: Callable[[], ModelConfig], run: RunDir | None
) -> dict[str, RunSettings]:
    """Return the settings of every stage by its name; {} where no stage has its own.

    Args:
        model: finds the whole model, where that is asked for.
        run: one that was made; None: it is not yet.
    """
    if not names_layouts(settings.family.options):
        return {}
    manifest = {} if run is None else read_json(run.manifest)
    family = family_of(settings, model(), run, manifest)
    if not isinstance(family, ProgressiveFamily):
        return {}
    return {
        stage.label: settings_of(settings, family, number)
        for number, stage in enumerate(family.stages)
    }


def stage_to_begin(run: RunDir, family: Family | None) -> int:
    """Return the number of the stage that trains on from the run's newest checkpoint."""
    if not isinstance(family, ProgressiveFamily):
        return 0
    return family.number_at((run.checkpoint_steps() or [0])[-1])


def beginning(settings: RunSettings, run: RunDir) -> tuple[RunSettings, int | None]:
    """Return the settings of the stage that trains on from a run's newest checkpoint, and its
    number; None where no stage has settings of its own.
    """
    if not names_layouts(settings.family.options):
        return settings, None
    family = open_family(run, settings, read_json(run.manifest))[0]
    number = stage_to_begin(run, family)
    return settings_of(settings, family, number), number


def checked_layouts(
    settings: RunSettings,
    manifest: Mapping[str, Any],
    model: ModelConfig,
    ranks: int,
    *,
    family: Family | None,
    begun: int | None = None,
    alone: bool = True,
    draws: int | None = None,
) -> RunLayouts:
    """Return the layouts of a run, all of which can train what they must.

    Args:
        manifest: what a run's says of its family (`new_members`).
        model: the whole one.
        ranks: that the stage `begun` has.
        family: whose stages have layouts of their own; None where all have the run's.
        begun: None = the last, whose layout is the run's.
        alone: this machine is the only one, and ranks can be started anew between stages.
        draws: in how many shares of a step a run has begun to draw (`draws_begun`).

    Raises:
        UserError: a layout cannot be; names the stage.
    """
    if not isinstance(family, ProgressiveFamily):
        raise_problems(layout_problems(settings, ranks, model))
        layout = settings.layout_for(ranks)
        refuse_layout(manifest, layout, model)
        return RunLayouts((layout,))
    begun = len(family.stages) - 1 if begun is None else begun
    made = RunLayouts(_of_stages(settings, family, ranks, begun, alone), begun)
    refuse_layout(manifest, made.layouts[-1], model, made.layouts)
    raise_problems(_unmeasured(made, family, settings))
    shares = draws_of(family, settings, made.layouts[-1], draws)
    for layout in made.layouts[:-1]:
        draws_of(family, settings, layout, shares)
    return made


def _of_stages(
    settings: RunSettings, family: ProgressiveFamily, ranks: int, begun: int, alone: bool
) -> tuple[Layout, ...]:
    """Return the layout of every stage; raises `UserError` where one fits not its own model."""
    own = [settings_of(settings, family, number) for number in range(len(family.stages))]
    layouts, problems = [], []
    for number, one in enumerate(own):
        processes = one.layout.processes
        same = processes == own[begun].layout.processes
        count = ranks if same or not alone else processes
        if not alone:
            problems += _other_ranks(settings, one, number)
        layouts.append(one.layout_for(count))
        found = layout_problems(one, count, family.stages[number].config)
        problems += _told(family, number, found)
    raise_problems(problems)
    return tuple(layouts)


def _told(family: ProgressiveFamily, number: int, found: Sequence[Problem]) -> list[Problem]:
    """Return problems of a stage's layout under its name."""
    stage = family.stages[number]
    told = "" if number == len(family.stages) - 1 else f"stage {stage.label}: "
    where = f"{WHERE}.stages[{number}]." if stage.layout else ""
    return [
        Problem(f"{where * p.setting.startswith('layout.')}{p.setting}", f"{told}{p.message}")
        for p in found
    ]


def _other_ranks(settings: RunSettings, own: RunSettings, number: int) -> list[Problem]:
    """Say where several machines, or a job, would have to start ranks anew between stages."""
    return [
        Problem(
            f"{WHERE}.stages[{number}].layout.{name}",
            f"is {getattr(own.layout, name)!r}, and the run's {getattr(settings.layout, name)!r}: "
            "in a job, and on several machines, all stages have the same ranks in the same places "
            "(how they divide the model may differ); leave it out, or `motet train` on one machine",
        )
        for name in ("processes", "placement")
        if getattr(own.layout, name) != getattr(settings.layout, name)
    ]


def _unmeasured(
    layouts: RunLayouts, family: ProgressiveFamily, settings: RunSettings
) -> list[Problem]:
    """Say where a model that is pruned cannot be measured by the ranks that it grows on."""
    sizes = [settings.batch.sequences, *(stage.sequences for stage in settings.batch.ramp)]
    found = []
    for number, stage in enumerate(family.stages):
        if number == 0 or not stage.operator.startswith("prune"):
            continue
        layout, length = layouts.holding(number - 1, number), settings.data.sequence_length
        config = family.stages[number - 1].config
        for _, why in rules.problems(layout, config, length, sizes, layout.world_size):
            told = f"prune measures the model before it on {layout.world_size} ranks: {why}"
            found.append(Problem(f"{WHERE}.stages[{number}].operator", told))
    return found
