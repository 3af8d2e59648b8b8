"""`motet experiments check`: every problem of a run.yaml and its questions."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from motet.core.errors import Problem, UserError, raise_problems
from motet.launcher.commands import common, options
from motet.launcher.config.sections import RunSettings
from motet.launcher.output import terminal

if TYPE_CHECKING:
    from motet.launcher.study.probe_price import ProbePrices


def arguments(parser: argparse.ArgumentParser) -> None:
    """A run.yaml."""
    options.as_json(parser)
    options.run_yaml(parser)


def run(arguments: argparse.Namespace) -> int:
    """Every problem of the settings, the experiments and their items, at once; then the cost of
    probes, and warnings.
    """
    settings, problems, warnings = common.inspected(arguments)
    prices: ProbePrices | None = None
    if settings is not None and all(one.setting.startswith("experiments") for one in problems):
        # Of other settings that are wrong the study would be one of their defaults.
        found, more, prices = _study_problems(settings)
        warnings = [*warnings, *more]
        problems = list(dict.fromkeys([*problems, *found]))
    if arguments.json:
        listed = [[problem._asdict() for problem in each] for each in (problems, warnings)]
        told: dict[str, Any] = {"ok": not problems, "problems": listed[0], "warnings": listed[1]}
        told["probes"] = None if prices is None else prices.to_json()
        terminal.print_json(told)
        return 2 if problems else 0
    raise_problems(problems)
    assert settings is not None
    count = len(settings.experiments.list)
    controls = " and the controls" if settings.experiments.controls else ""
    print(f"no problems in {count} experiment{'s' if count != 1 else ''}{controls}")
    if prices is not None:
        print(prices)
    for warning in warnings:
        print(f"warning: {warning}")
    return 0


def _study_problems(
    settings: RunSettings,
) -> tuple[list[Problem], list[Problem], ProbePrices | None]:
    """(problems, warnings, cost of the probes) of the study."""
    from motet.launcher.study import before_training
    from motet.launcher.study.cautions import study_warnings
    from motet.launcher.study.probe_price import probe_prices

    try:
        problems, study = before_training.checked(settings)
        if study is None:
            return problems, [], None
        return problems, study_warnings(study, settings), probe_prices(study, settings)
    except UserError as error:
        return [Problem("experiments", str(error))], [], None
