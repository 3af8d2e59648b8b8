"""What the commands share: settings from arguments, tables, JSON, the facts of a run before it
starts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motet.core.errors import Problem, UserError
from motet.launcher.config import load as config
from motet.launcher.config.sections import RunSettings
from motet.launcher.runs.rundir import RunDir

if TYPE_CHECKING:
    from rich.console import Console


def load_settings(arguments: argparse.Namespace) -> RunSettings:
    """The settings that RUN.yaml and the command line give."""
    return config.load(run_yaml(arguments), arguments.settings)


def inspect_settings(arguments: argparse.Namespace) -> tuple[RunSettings | None, list[Problem]]:
    """As `load_settings`, with the problems handed back; None when the file cannot be read at all."""
    try:
        return config.inspect(run_yaml(arguments), arguments.settings)
    except UserError as error:
        return None, [Problem(str(arguments.run_yaml), str(error))]


def run_yaml(arguments: argparse.Namespace) -> Path:
    """The file that a command was given."""
    path = Path(arguments.run_yaml)
    if path.is_dir() and (path / "run.yaml").exists():
        raise UserError(f"{path} is a folder; give the file, {path / 'run.yaml'}")
    if "=" in path.name and not path.exists():
        raise UserError(f"{path}: the run.yaml comes first, then settings such as this one")
    return path


def yaml_with_overrides(text: str, overrides: Sequence[str]) -> str:
    """The user's file as it is stored: the settings of the command line follow as comments."""
    if not overrides:
        return text
    lines = "".join(f"#   {line}\n" for o in overrides for line in o.splitlines())
    return f"{text.rstrip()}\n\n# Given on the command line:\n{lines}"


def print_json(value: Any) -> None:
    """JSON for machines; NaN, which JSON lacks, becomes null."""
    print(json.dumps(_finite(value), indent=1, ensure_ascii=False, default=str, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(child) for child in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def console() -> Console:
    """Rich's console on standard output; wide when it is no terminal, so that files hold whole
    lines.
    """
    from rich.console import Console

    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=160)


def cell(value: Any) -> str:
    """A value in a table."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(cell(child) for child in value)
    return str(value)


def print_table(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None = None
) -> None:
    """A table of dictionaries; `columns` maps keys to headings (default: the keys of the rows)."""
    from rich.table import Table
    from rich.text import Text

    if columns is None:
        columns = {key: key.replace("_", " ") for row in rows for key in row}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for key, heading in columns.items():
        numeric = all(isinstance(row.get(key), int | float | None) for row in rows)
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell(row.get(key))) for key in columns))
    console().print(table)


def vocabulary_size(settings: RunSettings) -> int | None:
    """Rows of the embedding: as set, or the first corpus's tokenizer rounded up to 64; None without
    a corpus.
    """
    if settings.model.vocabulary_size is not None:
        return settings.model.vocabulary_size
    from motet.experiments.corpora.corpus import Corpus

    try:
        return -(-Corpus.open(Path(settings.data.corpora[0].path)).vocabulary_size // 64) * 64
    except UserError:
        return None


def run_facts(settings: RunSettings) -> list[tuple[str, str]]:
    """What a run will be, as lines of (name, value). Reads no more than a corpus's manifest."""
    steps, length = settings.steps, settings.data.sequence_length
    tokens = settings.slots_before(steps) * length
    per_step = settings.batch.sequences * length
    facts = [
        ("run folder", str(Path(settings.runs) / settings.name)),
        ("length", f"{steps:,} steps = {tokens:,} tokens ({per_step:,} per step)"),
        ("processes", f"{settings.layout.processes} ({settings.layout.device})"),
        ("layout", _layout_fact(settings)),
        ("model", _model_fact(settings, tokens)),
        ("experiments", ", ".join(str(e.get("name")) for e in settings.experiments.list) or "none"),
    ]
    every = settings.checkpoint.every_steps
    saving = f"every {every:,} steps, the last {settings.checkpoint.keep} kept"
    facts.append(("checkpoints", saving if every else "after the last step"))
    return facts


def _layout_fact(settings: RunSettings) -> str:
    layout = settings.layout_for(settings.layout.processes)
    names = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "etp")
    degrees = [f"{name} {getattr(layout, name)}" for name in names if getattr(layout, name) > 1]
    pipeline = [layout.schedule] if layout.pp > 1 else []
    return ", ".join([" x ".join(degrees) or "one rank", layout.engine, *pipeline])


def _model_fact(settings: RunSettings, tokens: int) -> str:
    if settings.model.from_hf is not None:
        return f"from {config.public(settings)['model']['from_hf']}"
    from motet.models import config as models
    from motet.models import counts

    size = vocabulary_size(settings)
    overrides = {k: v for k, v in settings.model.overrides().items() if k != "vocabulary_size"}
    model = models.preset(settings.model.preset, size or 1 << 15, **overrides)
    matmul = counts.parameters_non_embedding(model)
    total = counts.parameters(model)
    known = "" if size else " (no corpus yet: vocabulary taken as 32,768)"
    flops = counts.training_flops_per_token(model, settings.data.sequence_length) * tokens
    return (
        f"{settings.model.preset}: {total:,} parameters, {matmul:,} without embeddings{known}; "
        f"{flops:.2e} FLOPs, {tokens / max(matmul, 1):.1f} tokens per parameter"
    )


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Aligned lines, as comments, so that the whole dry run can be pasted."""
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"# {name.ljust(width)}  {value}")


def open_run(path: str) -> RunDir:
    """The run folder that an argument names."""
    return RunDir.open(Path(path))
