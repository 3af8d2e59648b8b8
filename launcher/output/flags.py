"""Errors of the corpora room in the words of the command line: `--skip-bad` for `skip_bad`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from motet.core.errors import Problem, UserError, raise_problems

FLAGS = {
    "dtype": "--dtype",
    "eod": "--eod",
    "eod_marks": "--eod-marks",
    "eod_token": "--eod-token",
    "glob": "--glob",
    "hub_config": "--config",
    "hub_split": "--split",
    "config": "--config",
    "id_field": "--id-field",
    "max_documents": "--max-documents",
    "output": "--output",
    "skip_bad": "--skip-bad",
    "split": "--split",
    "text_field": "--text-field",
    "tokenizer": "--tokenizer",
    "vocabulary_size": "--vocabulary-size",
    "workers": "--processes",
}
# Words that mean nothing else stand for their flag anywhere, the others where a value follows.
_ANYWHERE = "|".join(word for word in FLAGS if "_" in word or word == "glob")
_WITH_VALUE = "|".join(word for word in FLAGS if "_" not in word)
_SETTING = re.compile(rf"(?<![\w'\"/.-])(?:({_ANYWHERE})\b|({_WITH_VALUE})(?==))(?![\w/])")


@contextlib.contextmanager
def named_as_typed() -> Iterator[None]:
    """Raise errors again with the flags that were, or can be, typed."""
    try:
        yield
    except UserError as error:
        if error.problems:
            raise_problems(
                [
                    Problem(FLAGS.get(p.setting, p.setting), as_typed(p.message))
                    for p in error.problems
                ]
            )
        raise UserError(as_typed(str(error))) from error


def as_typed(message: str) -> str:
    """Return a message with settings as their flags."""
    return _SETTING.sub(lambda found: FLAGS[found[1] or found[2]], message)
