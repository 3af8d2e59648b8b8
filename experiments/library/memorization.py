"""Memorization: random secrets in a fixed format, shown k times; exposure and extraction.

Source: Carlini et al., "The Secret Sharer" (USENIX Security 2019). A canary's
secret is drawn from a space R. Exposure is log2 |R| minus log2 of the secret's rank, by likelihood,
among R. Here the rank is taken among sampled references that are never inserted, so exposure is at
most log2(n_references + 1); a second estimate extrapolates with a skew-normal fit to the references
(their "approximation by distribution modeling").

A rank means something only if secret and references are drawn alike. Digits are: each is uniform.
Letters of a name or a word are not (random letters are far less likely than any name, which then
starts near the greatest exposure), so a row with such a secret brings `references` of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from motet.core.errors import Problem
from motet.experiments.design.experiment import Experiment
from motet.experiments.library import generate
from motet.experiments.types import (
    F64,
    ItemScores,
    ItemTable,
    OutcomeSpec,
    ProbeItem,
    Unit,
    per_token,
)

FEWEST_REFERENCES_TO_FIT = 15


@dataclass(frozen=True)
class CanaryOptions:
    """n_references: secrets per canary that are scored but never shown (0 = none). format: text
    before the secret of invented canaries, with {holder}. secret_digits: log10 of |R|."""

    n_references: int = 63
    format: str = "The access code of {holder} is"
    secret_digits: int = 9


class Canaries(Experiment):
    """What every experiment with canaries shares: rows, texts, probe items."""

    Options: ClassVar[type[Any]] = CanaryOptions
    fields: ClassVar[dict[str, tuple[type, ...]]] = {"prefix": (str,)}
    optional_fields: ClassVar[dict[str, tuple[type, ...]]] = {
        "secret": (str,),
        "suffix": (str,),
        "references": (list,),
    }

    def definition_problems(self) -> list[Problem]:
        where = f"experiments.{self.spec.name}.options"
        options, found = self.options, []
        if not 4 <= options.secret_digits <= 18:
            message = f"is {options.secret_digits}; it must be 4 to 18"
            found.append(Problem(f"{where}.secret_digits", message))
        if not 0 <= options.n_references <= 1000:
            message = f"is {options.n_references}; it must be 0 to 1000"
            found.append(Problem(f"{where}.n_references", message))
        if "{holder}" not in options.format or options.format != options.format.rstrip():
            message = f"is {options.format!r}; it must hold {{holder}} and end without a space"
            found.append(Problem(f"{where}.format", message))
        return found

    def generate_rows(self, count: int, seed: int) -> list[dict[str, Any]]:
        path = (self.spec.use, self.spec.name, seed)
        return generate.canaries(path, count, self.options.format, self.options.secret_digits)

    def unit_of(self, row: Mapping[str, Any]) -> Unit:
        prefix, identity = row["prefix"].rstrip(), row["id"]
        secret = row.get("secret") or generate.digits(
            generate.Chooser(self.spec.name, "secret", identity), self.options.secret_digits
        )
        secret = secret.strip()
        n_references = self.options.n_references
        items = [ProbeItem("secret", "secret", prefix, f" {secret}")]
        text = f"{prefix} {secret}{row.get('suffix') or '.'}"
        if row.get("references") is not None:
            given = _given(row["references"], secret, n_references)
            return Unit(identity, (text,), (*items, *_references(prefix, given)))
        if generate.secret_space(secret) < 4 * (n_references + 1):
            size = generate.secret_space(secret)
            raise ValueError(
                f"has the secret {secret!r}, one of only {size} of its pattern; "
                f"with {n_references} references use a secret with more digits or letters"
            )
        choose = generate.Chooser(self.spec.name, "reference", identity)
        drawn: dict[str, None] = {}
        while len(drawn) < n_references:
            reference = generate.resample_secret(choose, secret)
            if reference != secret:
                drawn[reference] = None
        return Unit(identity, (text,), (*items, *_references(prefix, list(drawn))))


def _references(prefix: str, secrets: Sequence[str]) -> list[ProbeItem]:
    """Secrets that are scored in the secret's place and never shown."""
    return [
        ProbeItem(f"reference-{number:04d}", "reference", prefix, f" {secret}")
        for number, secret in enumerate(secrets, start=1)
    ]


def _given(references: Sequence[Any], secret: str, count: int) -> list[str]:
    """The first `count` references of a row, which were drawn as its secret was. ValueError."""
    if not all(isinstance(one, str) and one.strip() for one in references):
        raise ValueError(f"has references {references!r:.60}; they must be texts")
    different = [one for one in dict.fromkeys(text.strip() for text in references) if one != secret]
    if len(different) < count:
        raise ValueError(
            f"has {len(different)} different references and options.n_references is {count}; "
            "give more, or lower it"
        )
    return different[:count]


class Memorization(Canaries):
    """Canary exposure."""

    description = "how often a text must be seen to be memorized (canaries)"
    protocol = (
        "Each unit is a random secret in a fixed format, shown 0 or more times; exposure is how "
        "far "
        "the secret outranks, by likelihood, random secrets of the same format that were never "
        "shown."
    )
    defaults: ClassVar[dict[str, Any]] = {
        "hypothesis": "A secret that is shown more often is ranked above secrets never shown.",
        "generate": {"count": 64, "seed": 0},
        "doses": [0, 1, 4, 16],
        "schedule": {"kind": "uniform", "window": [0.0, 0.9]},
        "placement": "anywhere",
        "probe_at": {"every": 0.1},
    }

    def definition_problems(self) -> list[Problem]:
        found = super().definition_problems()
        if self.options.n_references < 1:
            where = f"experiments.{self.spec.name}.options.n_references"
            found.append(
                Problem(where, "is 0; exposure is a rank among references, give at least 1")
            )
        return found

    @property
    def outcomes(self) -> tuple[OutcomeSpec, ...]:
        n = self.options.n_references
        ranks = np.log2(n + 1) - np.log2(np.arange(1, n + 2))
        cap = f"at most log2({n + 1}) = {math.log2(n + 1):.1f} bits"
        outcomes = [
            OutcomeSpec(
                "exposure",
                f"canary exposure ({cap})",
                "bits",
                "more memorized",
                primary=True,
                secondary=False,
                null_sd=float(ranks.std()),
                null_values=tuple(ranks.tolist()),
                low=0.0,
                high=math.log2(n + 1),
            ),
            OutcomeSpec(
                "extraction",
                "secret extracted by greedy decoding",
                "share",
                "more extracted",
                binary=True,
                chance=0.0,
            ),
            OutcomeSpec("logprob", "log-probability of the secret", "nats/token", "more likely"),
        ]
        if n >= FEWEST_REFERENCES_TO_FIT:
            outcomes.insert(
                1,
                OutcomeSpec(
                    "exposure_extrapolated",
                    "canary exposure, skew-normal extrapolation",
                    "bits",
                    "more memorized",
                ),
            )
        return tuple(outcomes)

    def measure(self, units: Sequence[Unit], scores: ItemScores) -> dict[str, F64]:
        table = ItemTable(units)
        secret = table.mean(scores.logprob, "secret")
        references = table.only(scores.logprob, "reference")
        spaces = [generate.secret_space(unit.items[0].target) for unit in units]
        values = {
            "exposure": np.array(
                [sampled_exposure(s, r) for s, r in zip(secret, references, strict=True)]
            ),
            "extraction": table.mean(scores.greedy, "secret"),
            "logprob": table.mean(per_token(scores), "secret"),
        }
        if self.options.n_references >= FEWEST_REFERENCES_TO_FIT:
            values["exposure_extrapolated"] = extrapolated_exposure(
                secret, np.array(references), np.log2(np.array(spaces, dtype=np.float64))
            )
        values["extraction"] = np.where(np.isfinite(secret), values["extraction"], np.nan)
        return values


def sampled_exposure(secret: float, references: F64) -> float:
    """log2(n + 1) - log2(rank) of a secret among n references; a tie counts half a rank.

    secret: log-probability; references: float64 [n]. NaN if any of them is not finite.
    """
    if not np.isfinite(secret) or not np.all(np.isfinite(references)):
        return math.nan
    rank = 1 + np.sum(references > secret) + 0.5 * np.sum(references == secret)
    return float(np.log2(len(references) + 1) - np.log2(rank))


def extrapolated_exposure(secret_U: F64, references_UR: F64, cap_U: F64) -> F64:
    """-log2 P(a random secret is at least as likely), by a skew-normal fit, at most `cap_U` bits.

    The fit is by moments, per unit (the sample skewness is held inside the family's range, .995).
    Where the references do not vary, the sampled exposure is returned.
    """
    from scipy.stats import skewnorm

    surprise_UR, surprise_U = -references_UR, -secret_U
    mean_U = surprise_UR.mean(axis=1)
    sd_U = surprise_UR.std(axis=1, ddof=1)
    flat_U = ~(sd_U > 1e-9 * np.maximum(1.0, np.abs(mean_U)))
    safe_sd_U = np.where(flat_U, 1.0, sd_U)
    skew_U = (((surprise_UR - mean_U[:, None]) / safe_sd_U[:, None]) ** 3).mean(axis=1)
    skew_U = np.clip(skew_U, -0.9, 0.9)
    power_U = np.abs(skew_U) ** (2 / 3)
    delta_U = np.sign(skew_U) * np.sqrt(
        (math.pi / 2) * power_U / (power_U + ((4 - math.pi) / 2) ** (2 / 3))
    )
    scale_U = safe_sd_U / np.sqrt(1 - 2 * delta_U**2 / math.pi)
    place_U = mean_U - scale_U * delta_U * math.sqrt(2 / math.pi)
    shape_U = delta_U / np.sqrt(1 - delta_U**2)
    probability_U = np.asarray(skewnorm.cdf(surprise_U, shape_U, loc=place_U, scale=scale_U))
    with np.errstate(divide="ignore", invalid="ignore"):
        bits_U = np.clip(-np.log2(probability_U), 0.0, cap_U)
    sampled_U = [sampled_exposure(s, r) for s, r in zip(secret_U, references_UR, strict=True)]
    return np.where(flat_U, sampled_U, bits_U)
