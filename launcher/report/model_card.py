"""README.md of an exported model: what it was cut from, what trained it, and how it is loaded."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from motet.core import format
from motet.core.errors import UserError
from motet.core.files import read_json
from motet.experiments.stream.ledger import lineage, stretch_records
from motet.launcher.config.sections import RunSettings
from motet.launcher.runs.kept_models import stage_with, stages_of
from motet.launcher.runs.metrics import read_metrics, rows_of
from motet.launcher.runs.rundir import RunDir
from motet.models import counts
from motet.models.config import ModelConfig
from motet.models.member import Member, name_of

LAST_ROWS = 20
"""Steps at the end whose training losses are averaged."""


class RunFacts:
    """What the cards of all models of one checkpoint share; the ledger is read once.

    Args:
        settings: of the run, resolved.
    """

    def __init__(self, run: RunDir, step: int, settings: RunSettings) -> None:
        self.run, self.step, self.settings = run, step, settings
        self.length = settings.data.sequence_length
        manifest = read_json(run.manifest)
        stages = stages_of(run, manifest)  # where they really began
        self.manifest: Mapping[str, Any] = {**manifest, **({"stages": stages} if stages else {})}
        self.rows = [r for r in rows_of(read_metrics(run.metrics), "step") if r["step"] <= step]
        self.sequences = _sequences(run, step)

    def tokens(self, member: Member | None) -> int | None:
        """Return the tokens that a model trained on itself; None where no ledger says."""
        if self.sequences is None:
            return None
        return self.sequences[name_of(member)] * self.length

    def stage_tokens(self, stage: Mapping[str, Any], who: str | None) -> int:
        """Return the tokens that a stage read up to the step, whoever of its members trained on
        them.
        """
        assert self.sequences is not None
        if not stage.get("members"):
            return self.sequences[who] * self.length
        starts = [int(one["start_step"]) for one in self.manifest["stages"]]
        start, before = int(stage["start_step"]), self.settings.slots_before
        stop = min([self.step, *(one for one in starts if one > start)])
        return max(0, before(stop) - before(start)) * self.length

    def lineage(self, member: Member | None) -> list[dict[str, Any]]:
        """Return the stages that led to a model that grew, or to what it is a slice of, its own
        last; [] where none does.
        """
        stages = self.manifest.get("stages") or []
        names = [stage["name"] for stage in stages]
        name = stage_with(stages, name_of(member) or "whole") if stages else "whole"
        entries = {entry["name"]: entry for entry in self._members()} | {"whole": self.manifest}
        return [
            {**entries[stage["name"]], **stage}
            for stage in stages[: names.index(name) + 1 if stages else 0]
        ]

    def is_stage(self, member: Member | None) -> bool:
        """Return whether a model is that of a stage, and no slice of one."""
        names = {stage["name"] for stage in self.manifest.get("stages") or []}
        return (name_of(member) or "whole") in names

    def ran_flops_of(self, name: str | None, each: float) -> float:
        """Return the operations per token of a model's steps: where its layers run several times,
        the mean of its stage.
        """
        stages = {stage["name"]: stage for stage in self.manifest.get("stages") or []}
        return float(stages.get(name or "whole", {}).get("virtual_flops_per_token", each))

    def run_flops(self) -> float | None:
        """Return the operations of all passes with a gradient up to the step."""
        if self.sequences is None:
            return None
        each = {member["name"]: member["flops_per_token"] for member in self._members()}
        each[None] = self.manifest["flops_per_token"]
        each = {name: self.ran_flops_of(name, value) for name, value in each.items()}
        known = sum(each.get(name, 0.0) * number for name, number in self.sequences.items())
        return known * self.length

    def loss(self, member: Member | None) -> float | None:
        """Return the mean training loss of a model over the last steps in which it trained."""
        name = name_of(member) or "whole"
        found = [row.get("losses", {}).get(name) for row in self.rows]
        if self.manifest.get("stages"):
            found = [
                row["losses"].get(name) if "losses" in row else row.get("loss")
                for row in self.rows
                if name in row.get("losses", (row.get("member", "whole"),))
            ]
        elif member is None and not any(x is not None for x in found):
            found = [row.get("loss") for row in self.rows]
        last = [x for x in found if isinstance(x, int | float) and math.isfinite(x)][-LAST_ROWS:]
        return sum(last) / len(last) if last else None

    def _members(self) -> list[dict[str, Any]]:
        return list(self.manifest.get("members", []))


def _sequences(run: RunDir, step: int) -> Counter[str | None] | None:
    """Return how many sequences each model trained on in the lineage of a checkpoint."""
    found: Counter[str | None] = Counter()
    try:
        segment = int(read_json(run.checkpoint(step) / "manifest.json")["segment"])
        for stretch in lineage(run.ledger, segment, step):
            for _, record in stretch_records(run.ledger, stretch):
                shares = record.members or ((None,),)
                for names in shares if record.applied else ():
                    for name in names:
                        found[name] += record.count // len(shares)
    except (UserError, KeyError, TypeError, ValueError):
        return None
    return found


def card(facts: RunFacts, member: Member | None, found: str, scores: Mapping[str, Any]) -> str:
    """Return the text of the card.

    Args:
        member: None is the whole model.
        found: how the model was chosen, in words.
        scores: `benchmarks` of it.
    """
    name = name_of(member) or "whole model"
    manifest = facts.manifest
    config = ModelConfig(**manifest["model"]) if member is None else member.config
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [motet]",
        "---",
        "",
        f"# {facts.settings.name}: {name}",
        "",
        f"{found} Written by `motet export` from step {facts.step:,} of the run "
        f"`{facts.run.name}`.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in _facts(facts, member, config)),
        "",
        *_scores(scores),
        *_use(config),
    ]
    return "\n".join(lines) + "\n"


def _facts(facts: RunFacts, member: Member | None, config: ModelConfig) -> list[tuple[str, str]]:
    total, matmul = counts.parameters(config), counts.parameters_non_embedding(config)
    tokens, run_flops, loss = facts.tokens(member), facts.run_flops(), facts.loss(member)
    each = counts.training_flops_per_token(config, facts.length)
    each = facts.ran_flops_of(name_of(member), each)
    flops = None if tokens is None else tokens * each
    tail = f"nats per token, mean of the last {LAST_ROWS} logged steps in which it trained"
    return [
        ("parameters", f"{total:,}; {matmul:,} outside embedding and head"),
        *_grown_from(facts, member),
        *_parent(facts, member, config),
        *_multiplied(config),
        ("tokens it trained on", _or_unknown(tokens, "no step trained it as such")),
        ("FLOPs of its own training", _flops(flops)),
        ("FLOPs of the whole run", _flops(run_flops)),
        ("training loss", "not known" if loss is None else f"{loss:.4f} {tail}"),
        ("sequence length", f"{facts.length:,} tokens"),
        ("seed", str(facts.settings.seed)),
        ("licence", "not set; that of the tokenizer and the text is not known to Motet"),
    ]


def _parent(facts: RunFacts, member: Member | None, config: ModelConfig) -> list[tuple[str, str]]:
    """Return what a model is a part of; [] where it is one that grew."""
    if facts.lineage(member) and facts.is_stage(member):
        return []
    part = "all of it" if member is None else f"`{json.dumps(spec(member, config))}`"
    parent = [facts.manifest, *facts.lineage(member)][-1]
    return [
        ("parent", f"{parent.get('parameters', 0):,} parameters, run `{facts.run.name}`"),
        ("part of the parent", part),
    ]


def _multiplied(config: ModelConfig) -> list[tuple[str, str]]:
    """Return what became of the multiplier of a model's logits; [] where it has none."""
    if config.output_multiplier == 1.0:
        return []
    told = f"logits x {config.output_multiplier:.6g} (muP), folded into the last norm of this model"
    return [("width multipliers", told)]


def _grown_from(facts: RunFacts, member: Member | None) -> list[tuple[str, str]]:
    """Return which models a model grew from, and what they trained on; [] where it did not."""
    told, tokens = [], 0
    for stage in facts.lineage(member):
        who = None if stage["name"] == "whole" else stage["name"]
        own = None if facts.sequences is None else facts.stage_tokens(stage, who)
        tokens += own or 0
        made = f"{stage['operator']} → " if stage["operator"] else ""
        trained = "" if own is None else f", {own:,} tokens"
        told.append(f"{made}{stage['name']} ({stage['parameters']:,} parameters{trained})")
    if not told:
        return []
    run = f"run `{facts.run.name}`"
    found = [("lineage", f"{run}: {' → '.join(told)}")]
    return found if facts.sequences is None else [*found, ("tokens of its lineage", f"{tokens:,}")]


def spec(member: Member, config: ModelConfig) -> dict[str, Any]:
    """Return what a model is of its parent, as `motet export --spec` takes it."""
    found: dict[str, Any] = {
        "layers": list(member.layers),
        "d_model": config.d_model,
        "n_kv_heads": config.n_kv_heads,
    }
    if config.n_moe_layers < config.n_layers:
        found["d_ffn"] = list(config.layer_ffn) if config.layer_ffn else config.d_ffn
    if config.n_experts:
        found |= {"n_experts": config.n_experts, "d_expert": config.expert_width}
    if config.shared_width:
        found["d_shared"] = config.shared_width
    return found


def _or_unknown(tokens: int | None, none: str) -> str:
    if tokens is None:
        return "not known: the run has no whole ledger"
    return f"{tokens:,}" if tokens else f"0: {none}"


def _flops(value: float | None) -> str:
    return "not known" if value is None else format.power_of_ten(value) if value else "0"


def _scores(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    if not scores:
        return []
    rows = [
        f"| {task} | {metric} | {value:.4f} |"
        for task, values in scores.items()
        for metric, value in values.items()
        if "stderr" not in metric
    ]
    return ["| task | metric | value |", "|---|---|---|", *rows, ""]


def _use(config: ModelConfig) -> list[str]:
    lines = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")',
        'tokens = tokenizer("Once upon a time", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50)[0]))",
        "```",
    ]
    if config.layer_ffn is not None and len(set(config.layer_ffn)) > 1:
        widths = list(config.layer_ffn)
        lines += [
            "",
            f"Its layers are {widths} hidden channels wide. A plain decoder has one width for all: "
            f"zeros fill each layer up to {max(widths):,}, which changes no output. "
            "`layer_intermediate_sizes` in config.json keeps the true widths.",
        ]
    return lines
