"""Are the probe scores of a run those of lm-evaluation-harness on the model that it exports?

    python bench/harness.py RUN [--results FILE] [--json]

Every item of every experiment is scored once more by the harness's own class for exported models
(`lm_eval.models.huggingface.HFLM`, fp32, on CPU), after an end of document as in training, and held
against the last probe file: the largest difference of log-likelihoods, in how many items greedy
decoding agrees, and, where answers are ranked, the accuracy of both. What a model writes and how
noise lies to its gradient are not the harness's to score; such items are compared by their targets.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from validity import motet

from motet.core.files import write_json
from motet.launcher.study.after_training import load_measured

ACCURACY = "accuracy"
KEPT = Path(__file__).parent / "results" / "harness.json"


def harness(folder: Path) -> Any:
    """The harness's model of an exported folder."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=16)


def compare(run: Path, model: Any) -> list[dict[str, Any]]:
    """One row per experiment."""
    from lm_eval.api.instance import Instance

    mark = model.tokenizer.eos_token
    rows = []
    for m in load_measured(run).measured:
        items = [item for unit in m.units for item in unit.items]
        kept = [i for i, item in enumerate(items) if item.target]
        asked = [
            Instance("loglikelihood", {}, (mark + items[i].prompt, items[i].target), number)
            for number, i in enumerate(kept)
        ]
        theirs = model.loglikelihood(asked, disable_tqdm=True)
        own = m.scores[-1]
        apart = [abs(own.logprob[i] - theirs[n][0]) for n, i in enumerate(kept)]
        agree = [bool(own.greedy[i]) == bool(theirs[n][1]) for n, i in enumerate(kept)]
        row = {"experiment": m.name, "use": m.experiment.spec.use, "items": len(kept)}
        row |= {"largest_difference": max(apart, default=0.0), "greedy_agrees": sum(agree)}
        if any(outcome.name == ACCURACY for outcome in m.experiment.outcomes):
            again = replace(own, logprob=np.array([score for score, _ in theirs]))
            measured = [m.experiment.measure(m.units, scores)[ACCURACY] for scores in (own, again)]
            row["accuracy"] = [float(np.mean(values)) for values in measured]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--results", type=Path, default=KEPT)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "exported"
        motet("export", str(asked.run), "--output", str(folder))
        rows = compare(asked.run, harness(folder))
    write_json(asked.results, {"rows": rows})
    if asked.json:
        print(json.dumps({"rows": rows}))
        return
    for row in rows:
        print(
            f"{row['experiment']:<18}{row['use']:<20}{row['items']:>5} items  largest difference "
            f"{row['largest_difference']:.1e}  greedy agrees in {row['greedy_agrees']}"
            + (
                f"  accuracy {row['accuracy'][0]} and {row['accuracy'][1]}"
                if "accuracy" in row
                else ""
            )
        )


if __name__ == "__main__":
    main()
