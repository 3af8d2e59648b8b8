"""The run folder of a guest: frozen as `motet train` freezes it, with records of checkpoints that
the user's own loop wrote.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from motet.core.errors import Problem, UserError, raise_problems
from motet.core.files import fsync_folder, write_json
from motet.core.hashing import sha256_file
from motet.core.listed import damage
from motet.experiments.design.experiment import make
from motet.launcher.config.run_yaml import load, store
from motet.launcher.config.sections import RunSettings
from motet.launcher.launch.local import prepare_run, verify_corpora
from motet.launcher.runs.begun import frozen_problems, yaml_with_overrides
from motet.launcher.runs.guest_settings import NO_WARMUP, not_read
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.seals import read_checkpoint, read_manifest
from motet.launcher.study.before_training import library_of, specs_of
from motet.parallel.runtime.mesh import World, first_complaint, tell_all

UNKNOWN_MODEL: Mapping[str, Any] = {
    "guest": True,
    "model": None,
    "imported_weights": False,
    "parameters": None,
    "parameters_non_embedding": None,
    "flops_per_token": None,
}


def run_of(settings: RunSettings) -> RunDir:
    """Return the run folder of a guest's settings."""
    return RunDir(Path(settings.runs) / settings.name)


def load_settings(run_yaml: Path, overrides: Sequence[str], resume: bool) -> RunSettings:
    """Read a run.yaml for a guest; one that goes on needs no files of its experiments.

    Raises:
        UserError: every problem at once, settings among them that only `motet train` obeys.
    """
    settings = load(
        run_yaml,
        overrides,
        NO_WARMUP,
        nodes=0,
        begun=lambda found: resume and run_of(found).manifest.exists(),
    )
    why = "is decided by your own training loop, which does not read it; leave it out"
    raise_problems([Problem(name, why) for name in not_read(settings)])
    return settings


def join_guest(timeout_s: float) -> World:
    """Return this process among those that `torch.distributed` already joined, with groups of our
    own for agreements.

    Raises:
        UserError: several processes were started and have not joined yet.
    """
    if not dist.is_initialized():
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started > 1:
            raise UserError(
                f"WORLD_SIZE={started}, but the processes have not joined yet; make motet.Guest "
                "after the line that joins them "
                "(TrainingArguments(...), Accelerator(), deepspeed.init_distributed() or "
                "torch.distributed.init_process_group())"
            )
        alone = cast(dist.ProcessGroup, None)  # never used: see `together`
        return World(0, 1, 0, torch.device("cpu"), timeout_s, alone, alone)
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return World(
        dist.get_rank(),
        dist.get_world_size(),
        local,
        torch.device("cpu"),
        timeout_s,
        control,
        control,
    )


def agree(complaint: str | None, world: World) -> None:
    """Raise what any process complains of on all of them (a collective)."""
    told = complaint if world.size == 1 else first_complaint(complaint, world)
    if told:
        raise UserError(told)


def tell(value: Any, world: World) -> Any:
    """Return rank 0's value on every process (a collective)."""
    return value if world.size == 1 else tell_all(value, world)


def freeze_or_open(
    run: RunDir, settings: RunSettings, run_yaml: Path, overrides: Sequence[str], resume: bool
) -> None:
    """Make the run folder, or find that it can go on with these settings (one process does).

    Raises:
        UserError: it exists and should not, or the other way round; settings changed; corpora are
            damaged.
    """
    exists = run.resolved_yaml.exists()
    if exists and not resume:
        raise UserError(
            f"name: the run {run.root} exists; motet.Guest(..., resume=True) goes on with it, or "
            "choose another name"
        )
    verify_corpora(settings)
    if not exists:
        if resume:
            raise UserError(f"{run.root} holds no run to go on with; leave out resume=True")
        text = yaml_with_overrides(run_yaml.read_text("utf-8"), overrides)
        _refuse_noise(settings)
        prepare_run(settings, run, text, UNKNOWN_MODEL)
        return
    if not read_manifest(run).get("guest"):
        raise UserError(f"{run.root} was begun by `motet train`; `motet resume` goes on with it")
    before = load(run.resolved_yaml)
    raise_problems(frozen_problems(before, settings))
    store(run.resolved_yaml, settings)
    run.done.unlink(missing_ok=True)


def _refuse_noise(settings: RunSettings) -> None:
    """Refuse experiments that change what another's loop computes: it would train without.

    Raises:
        UserError: all of them.
    """
    specs, problems = specs_of(settings, library_of(settings))
    raise_problems(problems)
    noisy = [spec for spec in specs if make(spec, library_of(settings)).noise_deviation]
    message = "adds noise to input embeddings, which a loop of your own does not; motet train does"
    raise_problems([Problem(f"experiments.{spec.name}.use", message) for spec in noisy])


def adopt(run: RunDir, facts: Mapping[str, Any], vocabulary_size: int) -> None:
    """Write down which model is trained, before its first step; later starts must bring the same
    (one process does).

    Raises:
        UserError: another model than before, or one with fewer tokens than the corpora have.
    """
    size = facts["model"].get("vocabulary_size")
    if size is not None and size < vocabulary_size:
        raise UserError(
            f"the model knows {size:,} tokens, the tokenizer of data.corpora[0] has "
            f"{vocabulary_size:,}; enlarge its embedding "
            "(transformers: model.resize_token_embeddings)"
        )
    manifest = read_manifest(run)
    if manifest["model"] is None:
        write_json(run.manifest, manifest | dict(facts))
        return
    for name, value in facts.items():
        if manifest[name] != value:
            raise UserError(
                f"this run trains another model: its {name} is {manifest[name]}, now it is "
                f"{value}; start another run for it"
            )


def parent_segment(run: RunDir, start_step: int, world: World) -> int:
    """Return the segment of the ledger that the weights of `start_step` came from, 0 for fresh
    ones; verify their files.

    Later records are set aside: their weights are not in the new lineage. A collective.

    Raises:
        UserError: no record of that step, or its files were altered.
    """
    recorded = tell(run.checkpoint_steps(), world)
    if start_step and start_step not in recorded:
        listed = ", ".join(f"{step:,}" for step in recorded) or "none"
        raise UserError(
            f"step {start_step:,} of {run.root} was not recorded when it was saved, so its lineage "
            f"is unknown; recorded: {listed} "
            "(guest.saved(step, folder) records)"
        )
    parent = 0
    if start_step:
        manifest = read_checkpoint(run, start_step)
        parent, folder, files = manifest["segment"], manifest["folder"], manifest["saved_files"]
        mine = {name: files[name] for name in sorted(files)[world.rank :: world.size]}
        gone = folder is None or not Path(folder).is_dir()  # moved away: it cannot be compared
        agree(None if gone else _damage(Path(folder), mine), world)
    if world.rank == 0:
        for step in recorded:
            if step > start_step:
                aside = run.checkpoint(step)
                aside.rename(aside.with_name(f"{aside.name}.superseded-{time.time_ns()}"))
    tell(None, world)
    return int(parent)


def _damage(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    for name, facts in files.items():
        path = folder / name
        if why := damage(path.parent, {path.name: facts}):
            return f"{folder} is not what was recorded: {why}"
    return None


def record_checkpoint(
    run: RunDir, step: int, folder: Path | None, facts: Mapping[str, Any], world: World
) -> None:
    """Write down that the weights of `step` exist, with the SHA-256 of every file that the user's
    loop saved (a collective).

    It is `checkpoints/step-N/manifest.json`, as for a checkpoint of Motet, and holds no weights
    itself. Without a folder it says of which step and segment the weights in memory are.
    """
    tell(None, world)  # every process has finished writing
    names: list[str] = []
    if folder is not None:
        names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    names = tell(names, world)
    agree(None if folder is None or names else f"{folder} holds no files of a checkpoint", world)
    mine = {} if folder is None else _hashed(folder, names[world.rank :: world.size])
    parts: list[dict[str, Any]] = [mine] * world.size
    if world.size > 1:
        dist.all_gather_object(parts, mine, group=world.control)
    if world.rank == 0:
        files = {name: part[name] for part in parts for name in part}
        manifest = {
            "version": 1,
            "step": step,
            "world_size": world.size,
            "folder": None if folder is None else str(folder.absolute()),
            "saved_files": dict(sorted(files.items())),
            **facts,
        }
        _publish(run, step, manifest)
    tell(None, world)


def _hashed(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    return {
        name: {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size}
        for name in names
    }


def _publish(run: RunDir, step: int, manifest: Mapping[str, Any]) -> None:
    final = run.checkpoint(step)
    if final.is_dir():
        write_json(final / "manifest.json", manifest)
        return
    aside = run.checkpoints / f".step-{step:08d}.part"
    aside.mkdir(parents=True, exist_ok=True)
    write_json(aside / "manifest.json", manifest)
    os.rename(aside, final)
    fsync_folder(run.checkpoints)
