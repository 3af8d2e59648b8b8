"""`motet family draft`: how often the largest model of a run accepts what smaller members draft."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from motet.core import format
from motet.core.errors import UserError
from motet.launcher.commands import common, options
from motet.launcher.commands.export import (
    all_models,
    chosen_model,
    chosen_step,
    read_model,
)
from motet.launcher.config import run_yaml
from motet.launcher.output import terminal
from motet.launcher.runs.kept_models import is_growing
from motet.launcher.runs.rundir import RunDir
from motet.models.family.base import WHOLE, Member

SEQUENCES = 32


def arguments(parser: argparse.ArgumentParser) -> None:
    """A run, who drafts for whom, and on what text."""
    options.as_json(parser)
    options.run_folder(parser)
    options.step_of_run(parser)
    parser.add_argument(
        "--member", metavar="NAME", help="that drafts (default: all below the target)"
    )
    parser.add_argument("--target", metavar="NAME", default=WHOLE, help="default: the whole model")
    text = "of text that the run did not read (default: what its corpora have left)"
    parser.add_argument("--text", metavar="FILE", help=text)
    number = f"of the corpora, at most (default {SEQUENCES})"
    parser.add_argument("--sequences", type=int, default=SEQUENCES, metavar="N", help=number)
    ahead = "tokens drafted before each check (default: as many as pay most)"
    parser.add_argument("--ahead", type=int, metavar="N", help=ahead)


def run(arguments: argparse.Namespace) -> int:
    """Measure acceptance on held-out text, and tell it."""
    rundir = common.open_run(arguments.run)
    step = chosen_step(rundir, arguments.step)
    for name in ("sequences", "ahead"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}: {value} is not at least 1")
    target, members = _who(rundir, arguments.target, arguments.member)
    facts = {"run": rundir.name, "step": step, **_measure(rundir, step, target, members, arguments)}
    if arguments.json:
        terminal.print_json(facts)
        return 0
    _tell(facts)
    return 0


def _who(rundir: RunDir, target: str, draft: str | None) -> tuple[Member | None, list[Member]]:
    """The target, and the members that draft for it."""
    if is_growing(rundir):
        raise UserError(
            f"{rundir.root}: its members grew one into the other, and drafts are measured between "
            "slices of one checkpoint; export them and draft in transformers"
        )
    models = all_models(rundir, chosen_step(rundir, None))
    wanted = chosen_model(rundir, target, "--target")
    smaller = models[: [model.name for model in models].index(wanted.name)]
    found = [model.member for model in smaller if model.member is not None]
    if not found:
        known = ", ".join(model.name for model in models)
        raise UserError(
            f"--target {target}: no member is smaller, so that none can draft for it; the models "
            f"of this run are {known}"
        )
    if draft is None:
        return wanted.member, found
    asked = chosen_model(rundir, draft)
    if asked.member not in found:
        known = ", ".join(member.name for member in found)
        raise UserError(f"--member {draft}: is not smaller than {target}; there are {known}")
    return wanted.member, [member for member in found if member == asked.member]


def _measure(
    rundir: RunDir,
    step: int,
    target: Member | None,
    members: list[Member],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    from motet.launcher.measure.draft_rate import draft_rates, text_of_file, unread_text
    from motet.models.decoder import Decoder

    settings = run_yaml.load(rundir.resolved_yaml)
    trained = rundir.checkpoint_steps()[-1]
    if arguments.text is not None:
        text = list(text_of_file(settings, Path(arguments.text)))
    else:
        text = list(unread_text(settings, trained, arguments.sequences))
    config, state = read_model(rundir, step)
    decoder = Decoder(config)
    decoder.load_state_dict(state, assign=True)
    source = arguments.text or f"{len(text)} sequences of the corpora that the run did not read"
    return {"text": source, **draft_rates(decoder, target, members, iter(text), arguments.ahead)}


def _tell(facts: Mapping[str, Any]) -> None:
    terminal.print_table(
        [
            {
                "draft": row["member"],
                "parameters": format.parameters(row["parameters"]),
                "FLOPs of the target's": format.percent(row["cost"]),
                "same likeliest token": _with_error(row, "greedy_agreement"),
                "accepted when sampling": _with_error(row, "acceptance"),
                "drafted": row["ahead"],
                "tokens per pass": row["tokens_per_pass"],
                "speed-up by FLOPs": row["predicted_speed_up"],
            }
            for row in facts["drafts"]
        ]
    )
    print(
        f"\nDrafts for {facts['target']} at step {facts['step']:,}, on {facts['tokens']:,} tokens "
        f"({facts['text']}); ± is the standard error over sequences.\n"
        "Tokens per pass and speed-up are those of Leviathan et al. (arXiv:2211.17192, theorem "
        "3.8), with costs by FLOPs: a small model on a GPU is slower than they say."
    )


def _with_error(row: Mapping[str, Any], key: str) -> str:
    error = row[f"{key}_error"]
    spread = "" if error is None else f" ± {100 * error:.1f}"
    return f"{100 * row[key]:.1f}{spread} %"
