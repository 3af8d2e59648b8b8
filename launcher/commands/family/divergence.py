"""`motet family divergence`: how far neighbouring members of a run lie apart."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from motet.core.errors import UserError
from motet.core.files import read_json, write_json
from motet.launcher.commands import common, options
from motet.launcher.commands.export import all_models, chosen_step, config_of, read_model
from motet.launcher.config import run_yaml
from motet.launcher.output import terminal
from motet.launcher.runs.kept_models import chains, inside_of, sequences_read, step_of
from motet.launcher.runs.rundir import RunDir


def arguments(parser: argparse.ArgumentParser) -> None:
    """A run, and on how much text."""
    options.as_json(parser)
    options.run_folder(parser)
    options.step_of_run(parser)
    number = "of held-out text (default: metrics.evaluate_sequences of the run)"
    parser.add_argument("--sequences", type=int, metavar="N", help=number)


def run(arguments: argparse.Namespace) -> int:
    """Measure neighbours, write what was found beside the run, and tell it."""
    rundir = common.open_run(arguments.run)
    step = chosen_step(rundir, arguments.step)
    if arguments.sequences is not None and arguments.sequences < 1:
        raise UserError(f"--sequences: {arguments.sequences} is not at least 1")
    facts = measured(rundir, step, arguments.sequences)
    write_json(rundir.divergence, {"version": 1, **facts})
    if arguments.json:
        terminal.print_json(facts)
        return 0
    _tell(facts)
    return 0


def measured(rundir: RunDir, step: int, sequences: int | None) -> dict[str, Any]:
    """Return the divergence of each two neighbours: those that follow each other as they grew, and
    by size those that are slices, with the whole model.

    Raises:
        UserError: there is one model, or a checkpoint is damaged.
    """
    import torch

    from motet.experiments.stream.held_out import HeldOutSequences
    from motet.launcher.rank.neighbours import MeasuredModel, pair_rows
    from motet.launcher.runs.manifest import open_stream
    from motet.models.counts import parameters_non_embedding
    from motet.models.decoder import Decoder

    manifest, settings = read_json(rundir.manifest), run_yaml.load(rundir.resolved_yaml)
    models = all_models(rundir, step)
    if len(models) < 2:
        known = ", ".join(model.name for model in models) or "none"
        raise UserError(f"{rundir.root}: no two models to compare up to step {step:,}: {known}")

    def decoder_of(at: int) -> Decoder:
        config, state = read_model(rundir, at)
        decoder = Decoder(config)
        decoder.load_state_dict(state, assign=True)
        return decoder

    chosen = {
        model.name: MeasuredModel(
            model.name,
            step_of(rundir, step, model.name),
            parameters_non_embedding(config_of(rundir, model.member)),
            inside_of(rundir, model.member),
        )
        for model in models
    }
    slots = sequences_read(settings, manifest.get("stages") or ())
    count = sequences or settings.metrics.evaluate_sequences
    text = HeldOutSequences(open_stream(settings), count, slots)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [
        row
        for names in chains(manifest, list(chosen))
        for row in pair_rows([chosen[name] for name in names], decoder_of, text, device)
    ]
    return {"unseen": text.unseen, "pairs": rows}


def _tell(facts: Mapping[str, Any]) -> None:
    terminal.print_table(
        [
            {
                "neighbours": f"{row['before']}, {row['after']}",
                "at steps": ", ".join(f"{step:,}" for step in row["steps"]),
                "KL": f"{row['larger']} || {row['smaller']}",
                "nats per token": f"{row['kl']:.4g}",
                "95 % interval": _interval(row["interval"]),
                "sequences": row["sequences"],
                "tokens": f"{row['tokens']:,}",
            }
            for row in facts["pairs"]
        ]
    )
    read = "" if facts["unseen"] else ", which training has read too: the run is over an epoch"
    print(f"\nOn the last sequences of the corpora, without exposures{read}.")


def _interval(found: list[float] | None) -> str:
    return "not known" if found is None else f"{found[0]:.4g} to {found[1]:.4g}"
