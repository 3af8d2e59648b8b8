"""`motet experiments new NAME`: a commented class of one's own, and a test of it."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from motet.core.errors import UserError
from motet.core.files import atomic_write
from motet.launcher.commands import options

NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")

_CLASS = '''\
"""{title}: an experiment of your own. In run.yaml, beside this file:

    experiments: [{{name: {name}, use: "{name}.py:{kind}"}}]
"""

from motet import Experiment, ItemTable, OutcomeSpec, ProbeItem, Unit, generated_texts, per_token


class {kind}(Experiment):
    description = "are endings of sentences learned from repetition"  # for lists
    protocol = "Each unit is a sentence, shown 0 or more times; its last word is asked for."
    treatment = "local"  # units in the stream; see docs/experiments/valid.md for the others
    fields = {{"start": (str,), "end": (str,)}}  # of a row of items, beside its id
    defaults = {{"generate": {{"count": 24, "seed": 0}}, "doses": [0, 8]}}  # 0 is the control
    outcomes = (  # one of them is primary: it answers the question
        OutcomeSpec("logprob", "log-probability", "nats/token", "better", primary=True),
        OutcomeSpec("said", "end written by greedy decoding", "share", "more said", binary=True),
    )

    def unit_of(self, row):  # what an exposure shows, and what is measured
        # The prompt ends without a space, the target begins with one. With max_tokens the model
        # also writes after the prompt.
        item = ProbeItem("end", "end", row["start"], " " + row["end"], max_tokens=8)
        return Unit(row["id"], (row["start"] + " " + row["end"] + ".",), (item,))

    def generate_rows(self, count, seed):  # row i follows from seed and i alone
        return [
            {{"id": f"s{{i}}", "start": f"Line {{seed}} {{i}} is", "end": f"w{{seed}}x{{i}}"}}
            for i in range(count)
        ]

    def measure(self, units, scores):  # a plain function: {{series: one value per unit}}
        texts = generated_texts(scores)  # what was written, one per item
        ends = [item.target.strip() for unit in units for item in unit.items]
        said = [end in text for end, text in zip(ends, texts, strict=True)]
        table = ItemTable(units)  # never look at a unit's arm here
        return {{"logprob": table.mean(per_token(scores), "end"), "said": table.mean(said, "end")}}
'''

_TEST = '''\
"""A test of {name}.py, without a model: pytest test_{name}.py"""

from pathlib import Path

from motet import try_experiment

HERE = Path(__file__).parent


def tried():
    return try_experiment("{name}.py:{kind}", HERE)


def test_units_are_divided_over_the_arms_and_no_text_stands_twice():
    found = tried()
    assert [len(units) for units in found.arms.values()] == [12, 12]
    assert len({{unit.texts[0] for unit in found.units}}) == 24


def test_an_end_that_is_known_scores_better_than_one_that_is_not():
    found = tried()
    unknown = found.measure(logprob=lambda unit, item: -9.0)
    known = found.measure(
        logprob=lambda unit, item: -0.5, written=lambda unit, item: item.target + "."
    )
    assert (known["logprob"] > unknown["logprob"]).all()
    assert unknown["said"].tolist() == [0.0] * 24
    assert known["said"].tolist() == [1.0] * 24
'''


def arguments(parser: argparse.ArgumentParser) -> None:
    """The name."""
    options.dry_run(parser)
    what = "of the file: small letters, digits and _"
    parser.add_argument("name", metavar="NAME", help=what)


def run(arguments: argparse.Namespace) -> int:
    """Write NAME.py and test_NAME.py here, or print them; what is there stays."""
    name = arguments.name.removesuffix(".py")
    if not NAME.fullmatch(name) or name.startswith("test_"):
        raise UserError(
            f"NAME={arguments.name!r} must begin with a small letter, not with test_, then have "
            "small letters, digits or _: for example slogans"
        )
    words = {
        "name": name,
        "kind": "".join(part.capitalize() for part in name.split("_")),
        "title": name.replace("_", " ").capitalize(),
    }
    texts = {
        Path(f"{name}.py"): _CLASS.format(**words),
        Path(f"test_{name}.py"): _TEST.format(**words),
    }
    if arguments.dry_run:
        for text in texts.values():
            print(text)
        return 0
    if there := [str(path) for path in texts if path.exists()]:
        raise UserError(
            f"{' and '.join(there)} already there; choose another name (nothing was written)"
        )
    for path, text in texts.items():
        atomic_write(path, text)
    print(f"wrote {' and '.join(map(str, texts))}; now:")
    print(f"  pytest test_{name}.py")
    print(f'  put  - {{name: {name}, use: "{name}.py:{words["kind"]}"}}  into run.yaml, beside it')
    print("  motet experiments check run.yaml")
    return 0
