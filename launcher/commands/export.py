"""`motet export`: the trained model as a Hugging Face folder, or what was found as a table."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motet.core.errors import UserError
from motet.core.files import read_json
from motet.launcher.commands import common, export_table, options
from motet.launcher.config import run_yaml
from motet.launcher.runs.rundir import RunDir
from motet.models.family.base import Member, members_of

if TYPE_CHECKING:
    import torch

    from motet.models.config import ModelConfig


def arguments(parser: argparse.ArgumentParser) -> None:
    """A run, its checkpoint and the folder to write; or which table."""
    options.dry_run(parser)
    options.run_folder(parser)
    options.model_of_run(parser)
    output = "folder of the model (default: RUN/members/step-N), or file of the table"
    parser.add_argument("--output", metavar="PATH", help=output)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    export_table.table_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the model of one checkpoint as a Hugging Face folder, or one table."""
    rundir = common.open_run(arguments.run)
    if arguments.table or arguments.what:
        return export_table.run_table(rundir, arguments)
    step = chosen_step(rundir, arguments.step)
    folder = (
        Path(arguments.output)
        if arguments.output
        else member_folder(rundir, step, arguments.member)
    )
    member = chosen_member(rundir, arguments.member)
    if arguments.dry_run:
        print(f"# reads  {rundir.checkpoint(step)}\n# writes {folder} ({arguments.dtype})")
        return 0
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--output: {folder} holds files already; give another folder")
    export(rundir, step, folder, arguments.dtype, member)
    print(f"wrote {folder}")
    return 0


def member_folder(rundir: RunDir, step: int, member: str | None = None) -> Path:
    """Where the model of one step is exported to, or a member of its family."""
    return rundir.members / (f"step-{step:08d}" + (f"@{member}" if member else ""))


def chosen_member(rundir: RunDir, name: str | None) -> Member | None:
    """The asked member, None for the whole model; `UserError` lists those that exist."""
    if name is None:
        return None
    members = {member.name: member for member in members_of(read_json(rundir.manifest))}
    if name not in members:
        known = ", ".join(members) or "none: it trained one model"
        raise UserError(f"--member {name}: is no member of this run's family; there are {known}")
    return members[name]


def chosen_step(rundir: RunDir, step: int | None) -> int:
    """The asked checkpoint, or the last; `UserError` lists those that exist."""
    steps = rundir.checkpoint_steps()
    if not steps:
        raise UserError(f"{rundir.root} has no checkpoint yet")
    if step is not None and step not in steps:
        known = ", ".join(str(s) for s in steps)
        raise UserError(f"--step {step} has no checkpoint; there are {known}")
    return steps[-1] if step is None else step


def export(
    rundir: RunDir, step: int, folder: Path, dtype: str, member: Member | None = None
) -> None:
    """Read, verify and convert one checkpoint."""
    import torch

    from motet.experiments.corpora.corpus import Corpus
    from motet.models.hf import to_hf
    from motet.models.slices import member_weights

    settings = run_yaml.load(rundir.resolved_yaml)
    model_config, state = read_model(rundir, step)
    tokenizer = Corpus.open(Path(settings.data.corpora[0].path)).tokenizer_path
    if member is not None:
        state = member_weights(member, model_config, state)
        model_config = member.config
    to_hf(state, model_config, tokenizer, folder, getattr(torch, dtype))


def read_model(rundir: RunDir, step: int) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """The model's configuration and unsharded weights, after the checkpoint's files were
    verified.
    """
    import torch
    import torch.distributed.checkpoint as dcp

    from motet.launcher.rank.checkpoint import damage
    from motet.launcher.rank.safe_reader import SafeReader
    from motet.models.config import ModelConfig
    from motet.models.decoder import Decoder

    if read_json(rundir.manifest).get("guest"):
        raise UserError(
            f"{rundir.root} was trained by your own loop; its checkpoints are where that loop "
            "saved them"
        )
    folder = rundir.checkpoint(step)
    manifest = read_json(folder / "manifest.json")
    complaint = damage(folder, manifest["files"])
    if complaint:
        raise UserError(f"checkpoint {folder} is damaged: {complaint}")
    model_config = ModelConfig(**_model_facts(rundir, manifest))
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Decoder(model_config).named_parameters()}
    tensors = {f"model.{name}": torch.empty(shape) for name, shape in shapes.items()}
    with warnings.catch_warnings():  # that no process group is there is what we want
        warnings.simplefilter("ignore")
        dcp.load(dict(tensors), storage_reader=SafeReader(folder), no_dist=True)
    return model_config, {name.removeprefix("model."): t for name, t in tensors.items()}


def _model_facts(rundir: RunDir, manifest: dict[str, Any]) -> dict[str, Any]:
    facts = manifest.get("model") or read_json(rundir.manifest).get("model")
    if not isinstance(facts, dict):
        raise UserError(f"{rundir.manifest} does not say which model was trained")
    return facts
