"""Which directions of the papers show in one run of `examples/ten_experiments.yaml`.

    python bench/directions.py RUN [--json]     after bench/ten_experiments.py, or any run of that file
    python bench/directions.py --summary        print what is kept in bench/results/directions.json

One line for each, by the primary outcome of its experiment (its trend where the question is one of
doses) or by the one outcome that asks it. `shows` is the direction with p at most .05, uncorrected:
of eight looks at nothing one in three tables would have a false one. Where it does not show, `detectable` says what could have been found with 80 % power,
2.8 standard errors from the interval's width (Bloom, "Minimum detectable effects", Evaluation
Review 1995). Nothing was tuned to make a direction show.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from validity import motet

from motet.core.files import write_json
from motet.experiments.library import generate, greenlist

KEPT = Path(__file__).parent / "results" / "directions.json"
Z, DETECTED = 1.96, 2.8
TEXTS, WORDS, GAMMA, DELTA = 8, 50, 0.25, 3.0

DIRECTIONS = (
    ("more doses, more memorized (canaries with suffixes)", "suffixes", "rank", True),
    ("more doses, more memorized (secrets)", "secrets", "exposure", True),
    ("more doses, higher accuracy on leaked questions", "questions", "accuracy", True),
    ("rare suffixes are easier to tell than plain text", "suffixes", "rare_over_plain", False),
    ("paraphrases are kept longer than duplicates", "facts", "retainability", False),
    ("watermarked text leaves its key in the model", "marked-text", "green", False),
    ("noise on embeddings is found again", "marked-noise", "alignment", False),
    ("a trigger changes behaviour in the poisoned arm", "poison", "behaviour", False),
)
"""(what, experiment, outcome, whether it is the trend per doubling of the dose)."""


def read(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per direction."""
    by_name = {entry["name"]: entry for entry in answers}
    rows = []
    for what, name, outcome, is_trend in DIRECTIONS:
        entry = by_name[name]
        (one,) = [o for o in (entry["primary"], *entry["secondary"]) if o["name"] == outcome]
        asked = one["trend"] if is_trend else one
        effect = asked["slope_per_doubling" if is_trend else "effect"]
        row = {"direction": what, "experiment": name, "outcome": outcome, "unit": one["unit"]}
        row |= {"per_doubling": is_trend, "effect": effect, "p": asked["p"], "n": one["n"]}
        row |= {"low": asked["low"], "high": asked["high"]}
        known = None not in (asked["low"], asked["high"])
        error = (asked["high"] - asked["low"]) / (2 * Z) if known else None
        row["detectable"] = None if error is None else DETECTED * error
        row["shows"] = effect > 0 and asked["p"] <= 0.05
        rows.append(row)
    return rows


def watermark_in_text(keys: int) -> dict[str, float]:
    """How surely the watermark is found in the texts themselves: the largest p of the keys that
    made them, and the smallest p of keys that made none.
    """
    own, other = [], []
    for number in range(keys):
        path = ("directions", number)
        language, key = greenlist.Language.invent(*path), f"key {path}"
        texts = [
            greenlist.watermarked(language, key, generate.Chooser(*path, text), WORDS, GAMMA, DELTA)
            for text in range(TEXTS)
        ]
        own.append(_p(texts, language, key))
        other.append(_p(texts, language, f"control {path}"))
    return {"keys": keys, "largest_p": max(own), "smallest_control_p": min(other)}


def _p(texts: list[list[str]], language: greenlist.Language, key: str) -> float:
    """Binomial p of the green words, each different k-gram counted once (Fernandez et al., "Three
    Bricks to Consolidate Watermarks", WIFS 2023, section IV-B: repeats are not independent).
    """
    from scipy.stats import binomtest

    seen: set[tuple[str, str, str]] = set()
    green = 0
    for words in texts:
        for one, two, word in zip(words, words[1:], words[2:], strict=False):
            if (one, two, word) not in seen:
                seen.add((one, two, word))
                options = language.followers[two]
                green += word in greenlist.green_list(key, (one, two), options, GAMMA)
    return float(binomtest(green, len(seen), GAMMA, alternative="greater").pvalue)


def said(found: dict[str, Any]) -> str:
    """As lines."""
    lines = []
    for row in found["directions"]:
        per = " per doubling" if row["per_doubling"] else ""
        span = "" if row["low"] is None else f" [{row['low']:+.3g}, {row['high']:+.3g}]"
        verdict = "shows" if row["shows"] else "does not show"
        if not row["shows"] and row["detectable"] is not None:
            verdict += f" ({row['detectable']:.2g} could be found)"
        effect = f"{row['effect']:+.3g}{span} {row['unit']}{per}"
        lines.append(f"{row['direction']:<54} {effect:<58} p {row['p']:.2g}  {verdict}")
    text = found["watermark_in_text"]
    lines.append(
        f"watermark in the texts themselves, {text['keys']} keys: p at most {text['largest_p']:.1e} "
        f"by their own key, at least {text['smallest_control_p']:.2g} by one that made none"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--results", type=Path, default=KEPT)
    parser.add_argument("--summary", action="store_true", help="only print what is kept")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if not asked.summary:
        if asked.run is None:
            parser.error("name a run, or --summary")
        report = json.loads(motet("report", str(asked.run), "--json"))
        found = {"directions": read(report["answers"]["experiments"])}
        found |= {"watermark_in_text": watermark_in_text(20)}
        write_json(asked.results, found)
    found = json.loads(asked.results.read_text(encoding="utf-8"))
    print(json.dumps(found, indent=1) if asked.json else said(found))


if __name__ == "__main__":
    main()
