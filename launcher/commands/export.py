"""`motet export`: trained models as Hugging Face folders, or what was found as a table."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from motet.core.errors import UserError
from motet.core.files import read_json, whole_folders
from motet.core.listed import listed_files
from motet.core.parsing import parse_yaml
from motet.launcher.commands import common, export_table, options
from motet.launcher.config import run_yaml
from motet.launcher.runs.kept_models import (
    held_by,
    inside_of,
    refuse_slices,
    stage_with,
    step_of,
)
from motet.launcher.runs.listed import EXPORT_AGAIN, seal
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.seals import read_checkpoint
from motet.launcher.runs.verify import EXPORTED_FROM, refuse_damage
from motet.models.family.base import WHOLE, Member, members_of

if TYPE_CHECKING:
    import torch

    from motet.experiments.corpora.corpus import Corpus
    from motet.models.config import ModelConfig

LOOKED_AT = 100  # documents whose first tokens are read
EXPORT_FILES = (*("*.json", "*.safetensors", "README.md", "chat_template.jinja", "*.tmp"),)
"""Names of the files that an export has."""


class ChosenModel(NamedTuple):
    """One model of a run.

    Attributes:
        name: of its folder and in tables.
        member: None is the whole model.
        found: how it was chosen, as a sentence.
    """

    name: str
    member: Member | None
    found: str


def arguments(parser: argparse.ArgumentParser) -> None:
    """A run, its checkpoint, which of its models, and the folder to write; or which table."""
    options.dry_run(parser)
    options.run_folder(parser)
    options.step_of_run(parser)
    which = options.one_model(parser)
    every = "every member and the whole model, each in a folder of its own"
    which.add_argument("--all", action="store_true", help=every)
    output = "folder of the model (with --all: of their folders; default: RUN/members/step-N), or "
    parser.add_argument("--output", metavar="PATH", help=output + "file of the table")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    export_table.table_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write models of one checkpoint as Hugging Face folders, or one table."""
    rundir = common.open_run(arguments.run)
    if arguments.table or arguments.what:
        return export_table.run_table(rundir, arguments)
    refuse_damage(rundir, ("manifest.json", "resolved.yaml"))
    step = chosen_step(rundir, arguments.step)
    targets = _targets(rundir, step, arguments)
    _refuse(rundir, targets)
    if arguments.dry_run:
        read = {rundir.checkpoint(step_of(rundir, step, model.name)) for model in targets.values()}
        for folder in sorted(read):
            print(f"# reads  {folder}")
        for folder, model in targets.items():
            print(f"# writes {folder} ({arguments.dtype}): {model.found}")
        return 0
    export(rundir, step, targets, arguments.dtype)
    for folder, model in targets.items():
        print(f"wrote {folder}: {model.found}")
    return 0


def _targets(rundir: RunDir, step: int, arguments: argparse.Namespace) -> dict[Path, ChosenModel]:
    output = None if arguments.output is None else Path(arguments.output)
    if arguments.all:
        models = all_models(rundir, step)
        if output is not None:
            return {output / model.name: model for model in models}
        return {member_folder(rundir, step, model): model for model in models}
    if arguments.params is not None:
        model = model_by_size(rundir, arguments.params)
    elif arguments.spec is not None:
        model = model_by_spec(rundir, arguments.spec)
    else:
        model = chosen_model(rundir, arguments.member)
    return {output or member_folder(rundir, step, model): model}


def _refuse(rundir: RunDir, targets: Mapping[Path, ChosenModel]) -> None:
    """Say what cannot be written before a checkpoint is read."""
    import torch

    from motet.models.hf_config import hf_config

    for folder in targets:
        filled = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        if filled and not is_cut_short(rundir, folder):
            raise UserError(f"--output: {folder} holds files already; give another folder")
    for model in targets.values():
        hf_config(config_of(rundir, model.member), torch.float32, 1)


def config_of(rundir: RunDir, member: Member | None) -> ModelConfig:
    """The sizes of a model of a run; None is the whole one."""
    from motet.models.config import ModelConfig

    if member is not None:
        return member.config
    _refuse_guest(rundir)
    return ModelConfig(**_model_facts(rundir, {}))


def _refuse_guest(rundir: RunDir) -> None:
    if read_json(rundir.manifest).get("guest"):
        raise UserError(
            f"{rundir.root} was trained by your own loop; its checkpoints are where that loop "
            "saved them"
        )


def member_folder(rundir: RunDir, step: int, model: ChosenModel) -> Path:
    """Where a model of one step is exported to."""
    suffix = "" if model.member is None else f"@{model.name}"
    return rundir.members / f"step-{step_of(rundir, step, model.name):08d}{suffix}"


def all_models(rundir: RunDir, step: int) -> list[ChosenModel]:
    """The members of a run's family, the smallest first, and the whole model; of a run that grows,
    those that a checkpoint up to the step has.
    """
    members = members_of(read_json(rundir.manifest))
    names = [None, *(member.name for member in members)]
    if stages := read_json(rundir.manifest).get("stages"):
        held = {held_by(rundir, one) for one in rundir.checkpoint_steps() if one <= step}
        names = [name for name in names if stage_with(stages, name or WHOLE) in held]
    models = [chosen_model(rundir, name) for name in names]
    return sorted(models, key=lambda model: _parameters(rundir, model.member))


def chosen_model(rundir: RunDir, name: str | None, option: str = "--member") -> ChosenModel:
    """The asked member, or the whole model; `UserError` lists those that exist."""
    if name is None or name == WHOLE:
        return ChosenModel(WHOLE, None, _told(rundir, None, "The whole model"))
    members = {member.name: member for member in members_of(read_json(rundir.manifest))}
    if name not in members:
        known = ", ".join(members) or "none: it trained one model"
        raise UserError(f"{option} {name}: is no member of this run's family; there are {known}")
    return ChosenModel(name, members[name], _told(rundir, members[name], f"Member {name}"))


def model_by_size(rundir: RunDir, size: str) -> ChosenModel:
    """The model, trained or not, that is nearest to a number of parameters."""
    from motet.models.family.pick import nearest_slice

    refuse_slices(rundir, "--params")
    whole, members = config_of(rundir, None), _slices(rundir)
    try:
        found = nearest_slice(whole, members, size, f"params-{size.strip().lower()}")
    except ValueError as error:
        raise UserError(f"--params: {error}{_what_else(members)}") from None
    near = f"{found.parameters:,} parameters outside embedding and head, {found.gap:+.1%} of {size}"
    if found.member is None:
        return ChosenModel(WHOLE, None, f"The whole model: {near}.")
    if found.member in members:
        return ChosenModel(found.member.name, found.member, f"Member {found.member.name}: {near}.")
    return ChosenModel(
        found.member.name, found.member, f"A slice that no step trained as such: {near}."
    )


def _slices(rundir: RunDir) -> list[Member]:
    """The members of a run that are slices of the whole model."""
    manifest = read_json(rundir.manifest)
    stages, members = manifest.get("stages"), members_of(manifest)
    if not stages:
        return members
    return [
        member
        for member in members
        if inside_of(rundir, member) is not None and stage_with(stages, member.name) == WHOLE
    ]


def _what_else(members: Sequence[Member]) -> str:
    return "" if members else " (this run trained one model; --spec cuts any slice of it)"


def model_by_spec(rundir: RunDir, text: str) -> ChosenModel:
    """The slice that axes and sizes describe; a member's own name where it is one."""
    from motet.models.family.pick import slice_by_spec

    refuse_slices(rundir, "--spec")
    members = _slices(rundir)
    try:
        asked = parse_yaml(text)
    except ValueError:
        raise UserError(f"--spec: {text!r} is not like '{{n_layers: 4, d_ffn: 0.5}}'") from None
    groups = {member.groups for member in members}
    member = slice_by_spec(
        config_of(rundir, None), "spec", asked, groups.pop() if len(groups) == 1 else 1
    )
    for known in members:
        if (known.config, known.layers) == (member.config, member.layers):
            return chosen_model(rundir, known.name)
    facts = json.dumps([vars(member.config), member.layers, member.groups])
    name = f"spec-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"
    told = _told(rundir, member, "A slice that no step trained as such")
    return ChosenModel(name, Member(name, member.config, member.layers, member.groups), told)


def _told(rundir: RunDir, member: Member | None, what: str) -> str:
    return f"{what}: {_parameters(rundir, member):,} parameters outside embedding and head."


def _parameters(rundir: RunDir, member: Member | None) -> int:
    from motet.models.counts import parameters_non_embedding

    return parameters_non_embedding(config_of(rundir, member))


def chosen_step(rundir: RunDir, step: int | None) -> int:
    """The asked checkpoint, or the last; `UserError` lists those that exist."""
    steps = rundir.checkpoint_steps()
    if not steps:
        raise UserError(f"{rundir.root} has no checkpoint yet")
    if step is not None and step not in steps:
        known = ", ".join(str(s) for s in steps)
        raise UserError(f"--step {step} has no checkpoint; there are {known}")
    return steps[-1] if step is None else step


def export(rundir: RunDir, step: int, targets: Mapping[Path, ChosenModel], dtype: str) -> None:
    """Read and verify checkpoints, and write models of them: all of them, or none."""
    import torch

    from motet.experiments.corpora.corpus import Corpus
    from motet.launcher.report.benchmarks import benchmarks
    from motet.launcher.report.model_card import RunFacts, card
    from motet.models.hf import to_hf
    from motet.models.slices import member_weights

    settings, read = run_yaml.load(rundir.resolved_yaml), -1
    for folder in targets:
        if is_cut_short(rundir, folder):
            print(f"motet: {folder} was cut short, and is written again", file=sys.stderr)
            shutil.rmtree(folder)
    corpus = Corpus.open(Path(settings.data.corpora[0].path))
    corpus.check_tokenizer()  # it goes into each folder
    with whole_folders(list(targets)) as folders:
        for folder, (target, model) in zip(folders, targets.items(), strict=True):
            if (at := step_of(rundir, step, model.name)) != read:
                config, state = read_model(rundir, at)
                facts, read = RunFacts(rundir, at, settings), at
            inside = inside_of(rundir, model.member)
            to_hf(
                member_weights(inside, config, state),
                config if inside is None else inside.config,
                corpus.tokenizer_path,
                folder,
                getattr(torch, dtype),
                sequence_length=settings.data.sequence_length,
                end_id=corpus.eod,
                begins=begins_with_special(corpus),
            )
            scores = benchmarks(rundir.evaluations / target.name)
            text = card(facts, model.member, model.found, scores)
            (folder / "README.md").write_text(text, encoding="utf-8")
            seal(folder, rundir, at)


def is_cut_short(rundir: RunDir, folder: Path) -> bool:
    """Tell whether a folder of exports of a run holds a part of one and nothing else."""
    from motet.models.hf_files import stored_tensors

    if folder.parent != rundir.members or not folder.is_dir():
        return False
    names = [path.name for path in folder.rglob("*")]
    if not names or not all(any(Path(n).match(p) for p in EXPORT_FILES) for n in names):
        return False
    try:
        read_json(folder / "config.json")
        stored_tensors(folder)
        listed = listed_files(folder, EXPORT_AGAIN) or ()
    except (UserError, OSError, ValueError, KeyError):
        return True
    return any(not (folder / name).exists() for name in listed)


def begins_with_special(corpus: Corpus) -> bool:
    """Tell whether documents of a corpus begin with the token that its tokenizer puts before texts,
    or says that texts begin with.
    """
    begin = begin_token(corpus)
    if begin is None or not corpus.n_documents:
        return False
    step = max(1, corpus.n_documents // LOOKED_AT)
    starts = (corpus.document_span(i)[0] for i in range(0, corpus.n_documents, step))
    return all(int(corpus.read(start, 1)[0]) == begin for start in starts)


def begin_token(corpus: Corpus) -> int | None:
    """Return the id of the token that a corpus's tokenizer would put before a text, or that the
    settings beside it say begins one; None where there is none.
    """
    from motet.experiments.corpora.tokenizer import vocabulary_of
    from motet.models.hf import special_before

    if corpus.tokenizer_path is None:
        return None
    corpus.check_tokenizer()
    file = Path(corpus.tokenizer_path)
    file = file / "tokenizer.json" if file.is_dir() else file
    settings = file.parent / "tokenizer_config.json"
    named = read_json(settings).get("bos_token") if settings.is_file() else None
    text = named["content"] if isinstance(named, dict) else named
    known = {token: number for number, token in vocabulary_of(file).items()}
    begin = special_before(read_json(file).get("post_processor")) or text
    return known.get(begin) if isinstance(begin, str) else None


def read_model(
    rundir: RunDir, step: int, source: str = ""
) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """The model's configuration and unsharded weights, after the checkpoint's files were
    verified.

    Args:
        source: "model", or "teacher" of a run that keeps one; "" = what the run deploys.
    """
    from motet.launcher.rank.stored_weights import stored_weights
    from motet.models.config import ModelConfig

    _refuse_guest(rundir)
    folder = rundir.checkpoint(step)
    refuse_damage(rundir, EXPORTED_FROM, step)
    manifest = read_checkpoint(rundir, step)
    stage = manifest.get("stage") or {}
    model_config = ModelConfig(**(stage.get("model") or _model_facts(rundir, manifest)))
    return model_config, stored_weights(folder, model_config, source or _deployed(rundir))


def _deployed(rundir: RunDir) -> str:
    """Which weights of a checkpoint are the run's models: those that trained, or their average."""
    options = run_yaml.load(rundir.resolved_yaml).family.options
    return "teacher" if options.get("deploy") == "ema" else "model"


def _model_facts(rundir: RunDir, manifest: dict[str, Any]) -> dict[str, Any]:
    facts = manifest.get("model") or read_json(rundir.manifest).get("model")
    if not isinstance(facts, dict):
        raise UserError(f"{rundir.manifest} does not say which model was trained")
    return facts
