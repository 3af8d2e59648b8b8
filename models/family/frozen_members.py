"""Members as a run's manifest names them. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from motet.models import counts
from motet.models.config import ModelConfig
from motet.models.member import Member


def member_facts(members: Iterable[Member], sequence_length: int) -> list[dict[str, Any]]:
    """Return what a run's manifest says of its members."""
    return [
        {
            "name": member.name,
            "model": vars(member.config),
            "layers": list(member.layers),
            "groups": member.groups,
            "parameters": counts.parameters(member.config),
            "parameters_non_embedding": counts.parameters_non_embedding(member.config),
            "flops_per_token": counts.training_flops_per_token(member.config, sequence_length),
        }
        for member in members
    ]


def members_of(manifest: Mapping[str, Any]) -> list[Member]:
    """Return the members that a manifest names; none where it was written without."""
    return [
        Member(
            entry["name"],
            ModelConfig(**entry["model"]),
            tuple(entry["layers"]),
            entry.get("groups", 1),
        )
        for entry in manifest.get("members", ())
    ]
