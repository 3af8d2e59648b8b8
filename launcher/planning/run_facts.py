"""What a run will be, before it starts: its model and its facts, from settings alone."""

from __future__ import annotations

from pathlib import Path

from motet.launcher.config import run_yaml
from motet.launcher.config.sections import RunSettings
from motet.launcher.runs.described_model import UNKNOWN_VOCABULARY, vocabulary_size


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
        return f"from {run_yaml.public(settings)['model']['from_hf']}"
    from motet.models import config as models
    from motet.models import counts

    size = vocabulary_size(settings)
    overrides = {k: v for k, v in settings.model.overrides().items() if k != "vocabulary_size"}
    model = models.preset(settings.model.preset, size or UNKNOWN_VOCABULARY, **overrides)
    matmul = counts.parameters_non_embedding(model)
    total = counts.parameters(model)
    known = "" if size else " (no corpus yet: vocabulary taken as 32,768)"
    flops = counts.training_flops_per_token(model, settings.data.sequence_length) * tokens
    return (
        f"{settings.model.preset}: {total:,} parameters, {matmul:,} without embeddings{known}; "
        f"{flops:.2e} FLOPs, {tokens / max(matmul, 1):.1f} tokens per parameter"
    )
