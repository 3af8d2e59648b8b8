"""What the corpora of a run hold of its units: searched once, kept in the user's cache, and decided
upon before anything is assigned.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

from motet.core.cache import cache_file, recall, remember
from motet.core.errors import Problem, UserError, raise_problems
from motet.experiments.corpora.progress import search_bar
from motet.experiments.corpora.tokenizer import Tokenizer
from motet.experiments.design.decontaminate import RESERVED, Decision, decide
from motet.experiments.design.experiment import Kinds, make
from motet.experiments.design.in_corpus import (
    Found,
    Sieve,
    found_json,
    found_of,
    scan,
    scan_key,
)
from motet.experiments.design.spec import ExperimentSpec
from motet.experiments.design.study import Study
from motet.experiments.types import Unit
from motet.launcher.config.sections import RunSettings
from motet.launcher.runs.manifest import training_sources

LONG_TOKENS = 50_000_000
"""Searching more than this takes seconds; a bar shows how far it is."""


def sieve_of(settings: RunSettings) -> Sieve:
    """What counts as held."""
    asked = settings.experiments.decontaminate
    return Sieve(asked.tokens, asked.share, asked.similar)


def units_of(specs: Sequence[ExperimentSpec], kinds: Kinds) -> dict[str, list[Unit]]:
    """All units of experiments by name, before any is left out; of those that can be read."""
    found = {}
    for spec in specs:
        with contextlib.suppress(UserError):  # told where they are asked
            experiment = make(spec, kinds)
            if not experiment.removes:  # whatever is removed is in the corpora on purpose
                found[spec.name] = experiment.units()
    return found


def searched(
    settings: RunSettings, asked: Mapping[str, Sequence[Unit]], tokenizer: Tokenizer, most: int
) -> list[Found] | None:
    """Return what the corpora hold of some units, out of the user's cache where it is there.

    Args:
        settings: of the run; what it trains on is searched.
        asked: units by the name of their experiment.
        tokenizer: of the corpora.
        most: tokens that are searched; None is returned where there are more.
    """
    corpora, sieve = training_sources(settings), sieve_of(settings)
    file = cache_file("scans", scan_key(asked, tokenizer, corpora, sieve))
    with contextlib.suppress(TypeError, KeyError):  # kept by a version with other fields
        if (kept := recall(file)) is not None:
            return found_of(kept)
    total = sum(corpus.n_tokens for corpus in corpora)
    if total > most:
        return None
    if total > LONG_TOKENS:
        said = f"motet: searching the corpora for units of the experiments: {total:,} tokens, once"
        print(said, file=sys.stderr)
        with search_bar(total) as advance:
            found = scan(asked, tokenizer, corpora, sieve, advance)
    else:
        found = scan(asked, tokenizer, corpora, sieve)
    remember(file, found_json(found))
    return found


def decided(
    settings: RunSettings,
    specs: Sequence[ExperimentSpec],
    kinds: Kinds,
    tokenizer: Tokenizer,
    always: bool = False,
) -> Decision:
    """Return what is done about units that the corpora hold.

    Args:
        always: search also where nothing depends on it, as far as `experiments.scan_tokens` allows.

    Raises:
        UserError: the policy cannot be followed, and why.
    """
    policy, sieve = settings.experiments.decontaminate.policy, sieve_of(settings)
    if policy == "report" and not always:
        return Decision(policy, sieve)
    raise_problems(_unfit(settings, specs))
    asked = units_of(specs, kinds)
    most = settings.experiments.scan_tokens
    found = searched(settings, asked, tokenizer, most)
    if found is None and policy != "report":
        total = sum(corpus.n_tokens for corpus in training_sources(settings))
        message = (
            f"is {most:,}, but experiments.decontaminate.policy={policy} has to search all "
            f"{total:,} tokens of the corpora; experiments.scan_tokens={total} does"
        )
        raise_problems([Problem("experiments.scan_tokens", message)])
    decision, problems = decide(policy, sieve, asked, found or ())
    raise_problems(problems)
    return decision


def with_found(study: Study, settings: RunSettings) -> Study:
    """Return a study with what the corpora hold of its units, to be kept in the run."""
    if study.decision.found:
        return study
    specs = [question.spec for question in study.questions]
    setting = study.setting
    decision = decided(settings, specs, setting.kinds, setting.tokenizer, always=True)
    return replace(study, decision=decision)


def _unfit(settings: RunSettings, specs: Sequence[ExperimentSpec]) -> list[Problem]:
    """Why places cannot be replaced."""
    if settings.experiments.decontaminate.policy != "replace":
        return []
    found = []
    if settings.experiments.lock:
        message = (
            "is replace, but experiments.lock keeps exposures at places that replacements may "
            "need; use exclude, or leave experiments.lock out"
        )
        found.append(Problem("experiments.decontaminate.policy", message))
    if any(spec.name == RESERVED for spec in specs):
        message = "is the name under which base text is replaced; give the experiment another"
        found.append(Problem(f"experiments.{RESERVED}.name", message))
    return found
