"""`motet eval`: benchmarks of lm-evaluation-harness on the trained models."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from motet.core import format
from motet.core.errors import UserError
from motet.core.files import write_json
from motet.core.listed import refuse_altered
from motet.launcher.commands import common, options
from motet.launcher.commands.export import (
    ChosenModel,
    all_models,
    begin_token,
    begins_with_special,
    chosen_model,
    chosen_step,
    config_of,
    export,
    is_cut_short,
    member_folder,
    model_by_size,
    model_by_spec,
    read_model,
)
from motet.launcher.config import run_yaml
from motet.launcher.output import terminal
from motet.launcher.runs.kept_models import inside_of, step_of
from motet.launcher.runs.listed import EXPORT_AGAIN, seal
from motet.launcher.runs.rundir import RunDir

ALL = "all"


def arguments(parser: argparse.ArgumentParser) -> None:
    """A run, which of its models, and the benchmarks."""
    options.dry_run(parser)
    options.as_json(parser)
    options.run_folder(parser)
    parser.add_argument("--tasks", required=True, help="names, with commas between them")
    options.step_of_run(parser)
    which = options.one_model(parser)
    several = "several, with commas between them, or all: the members and the whole model"
    which.add_argument("--members", metavar="NAMES", help=several)
    rows = "texts at once: a number, auto, or auto:N (default: the harness's own, 1)"
    parser.add_argument("--batch-size", metavar="N", help=rows)
    parser.add_argument("--device", help="cpu, cuda, cuda:N or mps (default: a GPU if there is)")
    more = "more for the harness's model, as dtype=bfloat16,parallelize=True"
    parser.add_argument("--model-args", metavar="K=V,...", help=more)
    parser.add_argument("--limit", type=int, help="documents per task")
    parser.add_argument("--include", metavar="FOLDER", help="with tasks of your own")
    inside = "score with Motet's own decoder, without exporting; no tasks that write text"
    parser.add_argument("--inside", action="store_true", help=inside)


def harness_command(
    model: Path, output: Path, asked: argparse.Namespace, scored: Mapping[str, str]
) -> list[str]:
    """Arguments of lm-evaluation-harness for an exported model.

    Args:
        asked: what was typed.
        scored: arguments of its model that make it score texts as they were trained on.
    """
    from motet.parallel.runtime.mesh import choose_device

    # It would ask for a GPU where it is told nothing, also of a torch that knows none.
    device = asked.device or choose_device("auto", 0).type
    how = {"pretrained": str(model), "dtype": "float32", **scored, **_model_arguments(asked)}
    told = ",".join(f"{key}={value}" for key, value in how.items())
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", device]
    command += ["--model_args", told, "--tasks", asked.tasks]
    command += ["--output_path", str(output)]
    command += ["--include_path", asked.include] if asked.include is not None else []
    command += ["--batch_size", asked.batch_size] if asked.batch_size is not None else []
    return command + (["--limit", str(asked.limit)] if asked.limit is not None else [])


def _model_arguments(asked: argparse.Namespace) -> dict[str, str]:
    parts = (asked.model_args or "").split(",")
    return {key.strip(): value for part in parts if part for key, _, value in [part.partition("=")]}


def _scored_as_trained(rundir: RunDir) -> dict[str, str]:
    """Arguments of the harness's model where the tokenizer names a token that texts begin with, and
    the corpus has none: nothing stands before a text, and an end of document where something must.
    """
    from motet.experiments.corpora.corpus import Corpus

    settings = run_yaml.load(rundir.resolved_yaml)
    try:
        corpus = Corpus.open(Path(settings.data.corpora[0].path))
    except UserError as error:
        told = "texts are scored as the exported tokenizer says, which may not be as in training"
        print(f"motet: warning: {error}; {told}", file=sys.stderr)
        return {}
    if begin_token(corpus) is None or begins_with_special(corpus):
        return {}
    return {"add_bos_token": "False", "prefix_token_id": str(corpus.eod)}


def _refuse(asked: argparse.Namespace) -> None:
    """Say what is wrong with arguments before anything is read or written."""
    whys = []
    if asked.limit is not None and asked.limit < 1:
        whys.append(f"--limit {asked.limit}: is not a number of documents of at least 1")
    rows, device, told = asked.batch_size, asked.device, asked.model_args
    if rows is not None and not re.fullmatch(r"[1-9]\d*|auto(:[1-9]\d*)?", rows):
        whys.append(f"--batch-size {rows}: is not a number of at least 1, auto, or auto:N")
    if device is not None and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        whys.append(f"--device {device}: is not cpu, cuda, cuda:N or mps")
    for part in (told or "").split(",") if told is not None else ():
        key, sign, _ = part.partition("=")
        if not key.strip() or not sign:
            whys.append(f"--model-args {told}: {part!r} is not like key=value")
        elif key.strip() in ("pretrained", "tokenizer"):
            whys.append(f"--model-args {told}: {key.strip()} is the run's own; leave it out")
    if asked.inside:
        given = {"--batch-size": rows, "--device": device, "--model-args": told}
        whys += [
            f"{name} {value}: is for the harness's own model; leave it, or --inside, out"
            for name, value in given.items()
            if value is not None
        ]
    if asked.include is not None and not asked.dry_run and not Path(asked.include).is_dir():
        whys.append(f"--include: {asked.include} is no folder; give one with task files")
    if whys:
        raise UserError("; ".join(whys))


def run(arguments: argparse.Namespace) -> int:
    """Run lm-evaluation-harness on each model, and show what it found."""
    rundir = common.open_run(arguments.run)
    _refuse(arguments)
    step = chosen_step(rundir, arguments.step)
    models = _models(rundir, step, arguments)
    if arguments.dry_run:
        for model in models:
            if arguments.inside:
                print(f"# {arguments.tasks} inside Motet: {model.found}")
            else:
                print(shlex.join(_command(rundir, step, model, arguments)))
        return 0
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("motet eval needs lm-evaluation-harness: pip install 'motet[eval]'")
    _refuse_altered_results(rundir, step, models, arguments.inside)
    if arguments.inside:
        _inside(rundir, step, models, arguments)
    elif code := _exported(rundir, step, models, arguments):
        return code
    _tell(rundir, step, models, arguments)
    return 0


def _refuse_altered_results(
    rundir: RunDir, step: int, models: Sequence[ChosenModel], inside: bool
) -> None:
    """Refuse where results of before are not what they were: one list vouches for all."""
    for model in models:
        folder = _output(rundir, step, model, inside)
        refuse_altered(folder, "results", "take that folder away, and evaluate again")


def _models(rundir: RunDir, step: int, arguments: argparse.Namespace) -> list[ChosenModel]:
    """The asked models; a wrong name is refused before anything is read."""
    if arguments.params is not None:
        return [model_by_size(rundir, arguments.params)]
    if arguments.spec is not None:
        return [model_by_spec(rundir, arguments.spec)]
    if arguments.members == ALL:
        return all_models(rundir, step)
    if arguments.members is None:
        found = [chosen_model(rundir, arguments.member)]
    else:
        names = list(dict.fromkeys(name.strip() for name in arguments.members.split(",")))
        found = [chosen_model(rundir, name, "--members") for name in names]
    for model in found:
        step_of(rundir, step, model.name)
    return found


def _output(rundir: RunDir, step: int, model: ChosenModel, inside: bool) -> Path:
    """Where the results of a model are kept: those found inside Motet in a folder of their own."""
    name = member_folder(rundir, step, model).name
    return rundir.evaluations / (f"{name}.inside" if inside else name)


def _command(
    rundir: RunDir, step: int, model: ChosenModel, arguments: argparse.Namespace
) -> list[str]:
    folder = member_folder(rundir, step, model)
    output = _output(rundir, step, model, False)
    return harness_command(folder, output, arguments, _scored_as_trained(rundir))


def _exported(
    rundir: RunDir, step: int, models: Sequence[ChosenModel], arguments: argparse.Namespace
) -> int:
    """Export what is not there yet, and run the harness on each folder; return its exit code."""
    targets = {member_folder(rundir, step, model): model for model in models}
    missing = {
        folder: model
        for folder, model in targets.items()
        if not (folder / "config.json").exists() or is_cut_short(rundir, folder)
    }
    if missing:
        export(rundir, step, missing, "float32")
    for folder in targets:
        refuse_altered(folder, "exported model", EXPORT_AGAIN)
    for model in models:
        command = _command(rundir, step, model, arguments)
        # The table of all models is what goes to standard output as JSON.
        code = subprocess.call(command, stdout=sys.stderr if arguments.json else None)
        if code:
            return code
        seal(_output(rundir, step, model, False), rundir, step)
    return 0


def _inside(
    rundir: RunDir, step: int, models: Sequence[ChosenModel], arguments: argparse.Namespace
) -> None:
    """Score with the decoder that trained, and keep the results beside those of the harness."""
    from motet.experiments.corpora.corpus import Corpus
    from motet.experiments.corpora.inspection import load_tokenizer
    from motet.launcher.measure.harness import evaluate_inside
    from motet.models.decoder import Decoder

    settings = run_yaml.load(rundir.resolved_yaml)
    tokenizer = load_tokenizer(Corpus.open(Path(settings.data.corpora[0].path)))
    if tokenizer is None:
        raise UserError("motet eval: the run's corpus has no tokenizer, so that no text is scored")
    include, read = None if arguments.include is None else Path(arguments.include), -1
    for model in models:
        if (at := step_of(rundir, step, model.name)) != read:
            config, state = read_model(rundir, at)
            decoder, read = Decoder(config), at
            decoder.load_state_dict(state, assign=True)
        found = evaluate_inside(
            decoder,
            inside_of(rundir, model.member),
            tokenizer,
            arguments.tasks.split(","),
            settings.data.sequence_length,
            arguments.limit,
            include,
        )
        output = _output(rundir, step, model, True)
        write_json(output / "results_inside.json", {"results": found["results"]})
        seal(output, rundir, step)


def _tell(
    rundir: RunDir, step: int, models: Sequence[ChosenModel], arguments: argparse.Namespace
) -> None:
    """Show every metric of every model."""
    from motet.launcher.report.benchmarks import benchmarks
    from motet.models.counts import parameters_non_embedding

    rows: list[dict[str, Any]] = []
    for model in models:
        scores = benchmarks(_output(rundir, step, model, arguments.inside))
        size = parameters_non_embedding(config_of(rundir, model.member))
        rows.append({"member": model.name, "parameters_non_embedding": size, "tasks": scores})
    if arguments.json:
        terminal.print_json({"run": rundir.name, "step": step, "models": rows})
    else:
        print(f"\nall that is kept of step {step:,}:")  # earlier calls measured other tasks
        terminal.print_table([_shown(row) for row in rows])


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    found = {
        f"{task} {metric.removesuffix(',none')}": round(value, 4)
        for task, values in row["tasks"].items()
        for metric, value in values.items()
        if "stderr" not in metric and metric != "sample_len"
    }
    size = format.parameters(row["parameters_non_embedding"])
    return {"member": row["member"], "without embeddings": size, **found}
