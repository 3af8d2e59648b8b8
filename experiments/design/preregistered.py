"""A definition that was signed off before training: written without a run, and held against what a
run was frozen with.

The file is one line of canonical JSON: the definition, its SHA-256 and that of the plan of
exposures. Who wants to prove when it was written commits it, or signs it, as any file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from motet.core.errors import UserError
from motet.core.files import read_text
from motet.core.hashing import canonical_json, sha256_hex
from motet.core.parsing import parse_json

FORMAT = "motet-preregistration"
SHOWN = 60
WORDS = {
    "seed": "the seed of randomization",
    "steps_total": "the length of the run in steps",
    "batch": "the batch sizes",
    "sequence_length": "data.sequence_length",
    "tokenizer_sha256": "the tokenizer",
    "data": "the corpora or their weights",
    "decontaminate": "what is done about units that the corpora hold",
    "imported": "the imported insertions",
    "members": "the members of the family",
    "analysis": "the analysis",
    "judged_by_sha256": "the version of Motet that judges",
    "plan_sha256": "the places or tokens of exposures",
}


def preregistration(definition: Mapping[str, Any]) -> str:
    """Return the file's text of a frozen definition (`frozen.definition`)."""
    text = canonical_json(definition)
    content = {
        "format": FORMAT,
        "version": 1,
        "definition_sha256": sha256_hex(text),
        "definition": dict(definition),
    }
    return canonical_json(content) + "\n"


def read_preregistration(path: Path, setting: str) -> dict[str, Any]:
    """Return the definition of a file that `motet experiments freeze` wrote.

    Args:
        path: of the file.
        setting: to blame.

    Raises:
        UserError: it is not one, or was altered since.
    """
    wrong = f"{setting}={path}"
    if not path.is_file():
        raise UserError(f"{wrong}: there is no such file; `motet experiments freeze` writes one")
    try:
        content = parse_json(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{wrong}: is no JSON ({error}); give what freeze wrote") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{wrong}: is not what `motet experiments freeze` writes")
    definition = content.get("definition")
    if not isinstance(definition, dict):
        raise UserError(f"{wrong}: has no definition")
    if sha256_hex(canonical_json(definition)) != content.get("definition_sha256"):
        raise UserError(f"{wrong}: was altered since it was written: its SHA-256 is another one")
    return definition


def deviations_from(registered: Mapping[str, Any], frozen: Mapping[str, Any]) -> list[str]:
    """Return how a frozen definition differs from the registered one, a sentence each; [] where
    they are the same.
    """
    return list(_differences(registered, frozen))


def _differences(registered: Mapping[str, Any], frozen: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted((registered.keys() | frozen.keys()) - {"experiments", "analysis"}):
        before, after = registered.get(key), frozen.get(key)
        if before != after:
            yield f"{WORDS.get(key, key)} {_change(before, after)}"
    analysis = [one.get("analysis") or {} for one in (registered, frozen)]
    for key in sorted(analysis[0].keys() | analysis[1].keys()):
        before, after = (one.get(key) for one in analysis)
        if before != after:
            yield f"analysis.{key} {_change(before, after)}"
    then, now = (
        {one["spec"]["name"]: one for one in each.get("experiments") or ()}
        for each in (registered, frozen)
    )
    for name in sorted(then.keys() - now.keys()):
        yield f"experiment {name} was registered and is not in the run"
    for name in sorted(now.keys() - then.keys()):
        yield f"experiment {name} is in the run and was not registered"
    for name in sorted(then.keys() & now.keys()):
        yield from _of_experiment(name, then[name], now[name])


def _of_experiment(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for part in sorted(then.keys() | now.keys()):
        before, after = then.get(part), now.get(part)
        if before == after:
            continue
        if part != "spec":
            yield f"{name}: {part} {_change(before, after)}"
            continue
        assert before is not None
        assert after is not None
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key):
                yield f"{name}: {key} {_change(before.get(key), after.get(key))}"


def _change(before: Any, after: Any) -> str:
    """ "was A, is B" in a few words; of hashes and long values the ends alone tell nothing."""
    texts = [json.dumps(value, ensure_ascii=False) for value in (before, after)]
    if any(len(text) > SHOWN for text in texts):
        return "changed"
    return f"was {texts[0]}, is {texts[1]}"
