"""Radioactivity: does a watermark in training text leave its trace in the model?

Source: Sander et al., "Watermarking Makes Language Models Radioactive" (arXiv 2402.14904): green
lists with gamma .25, delta 3 and a window of 2; the model's predictions are scored once per
different k-gram, without which p-values are too small; p < 1e-5 with 5 % of watermarked text.

Units are keys: texts with a treated key are shown, those with a held-out key never, so that the
comparison is a randomized one. Each k-gram asks which of four words follows, one of them green: a
model that does not know the key is right in exactly one of four. A second key, which made no text,
is scored on the same predictions and must find nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from motet.core.errors import Problem
from motet.experiments.design.experiment import Experiment
from motet.experiments.design.units import texts_of
from motet.experiments.library import generate
from motet.experiments.library.greenlist import (
    WINDOW,
    Language,
    chosen,
    green_list,
    watermarked,
)
from motet.experiments.types import F64, ItemScores, ItemTable, OutcomeSpec, ProbeItem, Unit

CANDIDATES = 4
CHANCE = 1 / CANDIDATES


@dataclass(frozen=True)
class RadioactivityOptions:
    """gamma, delta: of the watermark. texts, words: how many texts a key has, and their length.
    grams: different k-grams that are scored per key. context: words of the text that are read
    before the place that is scored."""

    gamma: float = 0.25
    delta: float = 3.0
    texts: int = 8
    words: int = 50
    grams: int = 32
    context: int = 8


class Radioactivity(Experiment):
    """Green predictions."""

    description = "does watermarked training text leave the watermark in the model"
    protocol = (
        "Each unit is a watermark key; texts that were sampled with it are shown 0 or more times. "
        "After different k-grams of the texts the likeliest of four words is green by chance in "
        "one of four cases; more is the trace of the key."
    )
    Options: ClassVar[type[Any]] = RadioactivityOptions
    fields: ClassVar[dict[str, tuple[type, ...]]] = {"texts": (list,), "grams": (list,)}
    defaults: ClassVar[dict[str, Any]] = {
        "hypothesis": "After training on watermarked text the model predicts green words.",
        "generate": {"count": 24, "seed": 0},
        "arms": [
            {"name": "held_out", "dose": 0},
            {"name": "shown", "dose": 40, "variants": "cycle"},
        ],
        "schedule": {"kind": "uniform", "window": [0.0, 1.0]},
        "placement": "anywhere",
        "cluster_by": "none",
        "probe_at": {"every": 0.25},
    }

    def definition_problems(self) -> list[Problem]:
        options, where, found = self.options, f"experiments.{self.spec.name}.options", []
        if not 0.125 <= options.gamma <= 0.625:
            message = f"is {options.gamma}; it must be .125 to .625: four words hold one green one"
            found.append(Problem(f"{where}.gamma", message))
        if not 0 <= options.delta <= 100:
            found.append(Problem(f"{where}.delta", f"is {options.delta}; it must be 0 to 100"))
        least = {"texts": 1, "words": 12, "grams": 1, "context": WINDOW}
        for name, low in least.items():
            if not low <= getattr(options, name) <= 10_000:
                message = f"is {getattr(options, name)}; it must be {low} to 10000"
                found.append(Problem(f"{where}.{name}", message))
        return found

    @property
    def outcomes(self) -> tuple[OutcomeSpec, ...]:
        n = self.options.grams
        share = "share of k-grams"
        return (
            OutcomeSpec(
                "green",
                f"green predictions ({CHANCE:g} by chance)",
                share,
                "more of the watermark",
                primary=True,
                secondary=False,
                null_sd=float(np.sqrt(CHANCE * (1 - CHANCE) / n)),
                low=0.0,
                high=1.0,
            ),
            OutcomeSpec(
                "control_key",
                "green predictions by a key that made no text",
                share,
                "more of the watermark",
                low=0.0,
                high=1.0,
            ),
            OutcomeSpec(
                "evidence",
                "-log10 p of the unit's own key (binomial)",
                "decades",
                "more of the watermark",
                low=0.0,
            ),
        )

    def generate_rows(self, count: int, seed: int) -> list[dict[str, Any]]:
        path = (self.spec.use, self.spec.name, seed)
        return [
            {"id": f"key-{number:05d}", **self._invented((*path, number))}
            for number in range(count)
        ]

    def _invented(self, path: tuple[str | int, ...]) -> dict[str, Any]:
        options = self.options
        key, other = f"key {path}", f"control {path}"
        language = Language.invent(*path)
        texts = [
            watermarked(
                language,
                key,
                generate.Chooser(*path, "text", number),
                options.words,
                options.gamma,
                options.delta,
            )
            for number in range(options.texts)
        ]
        grams: dict[tuple[str, str], dict[str, Any]] = {}
        for words in texts:
            for at in range(WINDOW, len(words)):
                before = (words[at - 2], words[at - 1])
                read = words[max(0, at - options.context) : at]
                again = before in pairwise(read[:-1])
                if before in grams or again or len(grams) == options.grams:
                    continue
                choose = generate.Chooser(*path, "gram", *before)
                gram = _gram(language, before, key, other, options.gamma, choose)
                grams[before] = {"context": " ".join(read), **gram}
        return {"texts": [f"{' '.join(words)}." for words in texts], "grams": list(grams.values())}

    def unit_of(self, row: Mapping[str, Any]) -> Unit:
        items: list[ProbeItem] = []
        for number, gram in enumerate(row["grams"]):
            context, candidates, places = _checked(gram)
            kinds = ["+".join(name for name in places if places[name] == at) for at in range(4)]
            items += [
                ProbeItem(f"gram-{number:04d}-{at}", kind or "red", context, f" {candidate}")
                for at, (kind, candidate) in enumerate(zip(kinds, candidates, strict=True))
            ]
        contexts = [item.prompt for item in items[::CANDIDATES]]
        last = [tuple(context.split()[-WINDOW:]) for context in contexts]
        if len(set(last)) < len(last):
            raise ValueError("has a k-gram twice; each counts once, or p-values are too small")
        return Unit(row["id"], tuple(texts_of(row, "texts")), tuple(items))

    def measure(self, units: Sequence[Unit], scores: ItemScores) -> dict[str, F64]:
        table = ItemTable(units)
        logprob_GC = scores.logprob.reshape(-1, CANDIDATES)
        top_GC = logprob_GC == logprob_GC.max(axis=1, keepdims=True)
        share_GC = top_GC / np.maximum(top_GC.sum(axis=1), 1)[:, None]
        unit_G = table.unit_I[::CANDIDATES]
        n_U = np.bincount(unit_G, minlength=len(units))
        found = {}
        for name, word in (("green", "green"), ("control_key", "control")):
            is_GC = np.array([word in kind for kind in table.kind_I]).reshape(-1, CANDIDATES)
            hit_G = np.where(is_GC, share_GC, 0.0).sum(axis=1)
            hit_G = np.where(np.isfinite(logprob_GC).all(axis=1), hit_G, np.nan)
            total = np.bincount(unit_G, weights=hit_G, minlength=len(units))
            found[name] = total / np.maximum(n_U, 1)
        return found | {"evidence": evidence(found["green"] * n_U, n_U)}


def _gram(
    language: Language,
    before: tuple[str, str],
    key: str,
    other: str,
    gamma: float,
    choose: generate.Chooser,
) -> dict[str, Any]:
    """Four words that may follow, one of them green; which of them the other key favours."""
    options = language.followers[before[1]]
    green = green_list(key, before, options, gamma)
    red = [word for word in options if word not in green]
    one = choose.pick(green)
    words = choose.sample([one, *choose.sample(red, CANDIDATES - 1)], CANDIDATES)
    return {
        "candidates": words,
        "green": words.index(one),
        "control": words.index(chosen(other, before, tuple(words), 1)[0]),
    }


def _checked(gram: Any) -> tuple[str, list[str], dict[str, int]]:
    """Context, candidates and which of them either key favours. ValueError."""
    shape = "{context: text, candidates: [4 words], green: 0 to 3, control: 0 to 3}"
    wrong = ValueError(f"has in grams {gram!r:.80}; it must be {shape}")
    if not isinstance(gram, Mapping):
        raise wrong
    context, candidates = gram.get("context"), gram.get("candidates")
    places = {name: gram.get(name) for name in ("green", "control")}
    if not isinstance(context, str) or len(context.split()) < WINDOW:
        raise wrong
    if not isinstance(candidates, list) or len(candidates) != CANDIDATES:
        raise wrong
    if not all(isinstance(word, str) and word.strip() for word in candidates):
        raise wrong
    if len({word.strip() for word in candidates}) < CANDIDATES:
        raise wrong
    if not all(type(at) is int and 0 <= at < CANDIDATES for at in places.values()):
        raise wrong
    return context.strip(), [word.strip() for word in candidates], places  # type: ignore[return-value]


def evidence(hits_U: F64, n_U: Any) -> F64:
    """-log10 of the chance that so many of n predictions are green without knowing the key, float64
    [U]; a share of a tie counts as nothing.
    """
    from scipy.stats import binom

    safe = np.floor(np.nan_to_num(hits_U) + 1e-9)
    log_p = binom.logsf(safe - 1, n_U, CHANCE)
    return np.where(np.isfinite(hits_U), np.maximum(0.0, -log_p / np.log(10)), np.nan)
