"""Write docs/api.md from the docstrings of what `dir(motet)` shows: `make docs`.

python docs/make_api.py [FILE]      (default: print the page)
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import motet

HEAD = """\
# The public API

The public API is what `dir(motet)` shows. Everything else may be imported, and may move. `import motet` is instant: a name is
loaded when it is first used. This page is written from the docstrings by `make docs`; a test runs its examples.

## A run in pandas
```python
import motet

run = motet.load("runs/demo")
print(run.name, run.settings["training"]["steps"], run.manifest["parameters"])

primary = run.answers[run.answers.primary]
print(primary[["experiment", "effect", "low", "high", "p_corrected", "verdict"]])
```

Scores say what every unit scored at every probe, units say which arm chance gave it; joined they are the raw data of every answer.
With a family of models each member has rows of its own (`member`; the whole model is `whole`).

```python
scores = run.scores.merge(run.units, on=["experiment", "unit"])
last = scores[scores.step == scores.step.max()]
means = last.groupby(["experiment", "series", "member", "dose"]).value.mean()
print(means.unstack("dose"))

losses = run.metrics.set_index("step").loss
print(losses.rolling(10).mean().dropna().tail(1))
```

```python
runs = motet.load_runs("runs")  # every run in a folder, or a list of run folders
print(runs.answers.groupby(["run", "verdict"]).size())
```

The same tables leave the command line as `motet export RUN --table csv` (or `parquet`, `md`, `latex`), with `--what` answers, units,
scores, items or metrics. CSV and Parquet hold everything; Markdown and LaTeX are for reading.

## What training reads
A corpus and a stream answer the same questions outside of training that they answer inside: which tokens does step 7 read?

```python
from pathlib import Path

corpus = motet.Corpus.open(run.settings["data"]["corpora"][0]["path"])
tokenizer = motet.Tokenizer.load(corpus.tokenizer_path)
plan = motet.ExposurePlan(Path("runs/demo/plan/exposures.plan"))
length = run.settings["data"]["sequence_length"]
seed = run.settings["seed"]  # or data.seed, where that is set
stream = motet.Stream([corpus], [1.0], length, seed, plan)
batch = stream.batch(0, 4)  # the first four sequences of the run, exposures laid over
print(batch.tokens_BT.shape, tokenizer.decode(batch.tokens_BT[0, :40]))
```

## Errors
```python
try:
    motet.load("runs/nowhere")
except motet.UserError as error:
    print(error)
```
"""
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Yields")
ENTRY = re.compile(r"([\w*., ]+):\s+(.*)")
MADE_BY_US = {"LoadedRun", "LoadedRuns", "Corpus", "Tokenizer", "HookContext"}
"""Classes whose objects come from a function or class method; their constructor is not shown."""


class Raw(str):
    """An annotation that prints as it was written, without quotes."""

    def __repr__(self) -> str:
        return str(self)


def signature(function: Callable[..., Any], without_self: bool = False) -> str:
    """`(name: type = default) -> type`, as written."""
    found = inspect.signature(function)
    parameters = list(found.parameters.values())[1 if without_self else 0 :]
    shown = [
        p if p.annotation is p.empty else p.replace(annotation=_raw(p.annotation))
        for p in parameters
    ]
    returns = found.return_annotation
    plain = returns is found.empty or returns in ("None", None)
    return str(
        found.replace(
            parameters=shown,
            return_annotation=found.empty if plain else _raw(returns),
        )
    )


def _raw(annotation: Any) -> Raw:
    return Raw(annotation if isinstance(annotation, str) else inspect.formatannotation(annotation))


def paragraphs(doc: str) -> Iterator[str]:
    """A docstring as Markdown: paragraphs, and a list for each section of `SECTIONS`."""
    for block in re.split(r"\n\s*\n", inspect.cleandoc(doc)):
        head, _, rest = block.partition("\n")
        if head.rstrip(":") in SECTIONS and head.endswith(":"):
            yield "\n".join([f"**{head.rstrip(':')}**", "", *entries(rest)])
        elif re.search(r"^[-*] ", block, re.MULTILINE):
            yield re.sub(r"\n {2,}", " ", block)
        else:
            yield " ".join(block.split())


def entries(text: str) -> Iterator[str]:
    """`name: what it is` lines as a list; a deeper line continues the one before."""
    lines = inspect.cleandoc("\n" + text).splitlines()
    joined: list[str] = []
    for line in lines:
        if line.startswith(" ") and joined:
            joined[-1] += " " + line.strip()
        else:
            joined.append(line.strip())
    for line in joined:
        match = ENTRY.fullmatch(line)
        yield f"- `{match[1]}`: {match[2]}" if match else f"- {line}"


def members(kind: type) -> Iterator[tuple[str, str, str]]:
    """(name, heading, docstring) of the public methods and properties that a class defines."""
    for name, value in vars(kind).items():
        if name.startswith("_"):
            continue
        if isinstance(value, property | functools.cached_property):
            function = value.fget if isinstance(value, property) else value.func
            doc = inspect.getdoc(function) or ""
            returns = inspect.signature(function).return_annotation
            yield name, f"{name}: {returns}", doc
        elif isinstance(value, classmethod | staticmethod):
            without = isinstance(value, classmethod)
            heading = f"{kind.__name__}.{name}{signature(value.__func__, without)}"
            yield name, heading, inspect.getdoc(value.__func__) or ""
        elif inspect.isfunction(value):
            yield name, f"{name}{signature(value, True)}", inspect.getdoc(value) or ""


def entry(name: str, value: Any) -> Iterator[str]:
    """The part of the page on one public name."""
    yield f"### motet.{name}"
    if inspect.isclass(value):
        own = "__init__" in vars(value) and not issubclass(value, Exception)
        if own and name not in MADE_BY_US:
            yield f"```text\n{name}{signature(value.__init__, True)}\n```"
        yield from paragraphs(inspect.getdoc(value) or "")
        if own and name not in MADE_BY_US and vars(value)["__init__"].__doc__:
            yield from paragraphs(value.__init__.__doc__)
        for _, heading, doc in members(value):
            yield f"#### `{heading}`"
            yield from paragraphs(doc)
    else:
        yield f"```text\n{name}{signature(value)}\n```"
        yield from paragraphs(inspect.getdoc(value) or "")


def public() -> dict[str, Any]:
    """Every public name with what it stands for, in the order of `motet`'s own list."""
    return {name: getattr(motet, name) for name in motet._PUBLIC}


def page() -> str:
    """The whole page."""
    parts = [HEAD.rstrip(), "## Reference"]
    for name, value in public().items():
        parts += entry(name, value)
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Write the page to the file that is named, or print it."""
    if arguments:
        Path(arguments[0]).write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
