"""`motet demo`: corpus, training and report in one command."""

from __future__ import annotations

import argparse
from pathlib import Path

from motet.core.errors import UserError
from motet.launcher import demo
from motet.launcher.commands import options
from motet.launcher.config import load as config
from motet.launcher.config.sections import RunSettings
from motet.launcher.runs.begun import yaml_with_overrides
from motet.launcher.runs.rundir import RunDir


def arguments(parser: argparse.ArgumentParser) -> None:
    """How long, and where."""
    options.dry_run(parser)
    parser.add_argument("--steps", type=int, help="length of the run")
    parser.add_argument("--folder", default=".", help="where corpora/ and runs/ go")
    options.settings(parser)


def run(arguments: argparse.Namespace) -> int:
    """Make what is missing, train, report.

    A demo that was interrupted goes on; a finished one is reported again.
    """
    steps = demo.DEMO_STEPS if arguments.steps is None else arguments.steps
    if steps < 1:
        raise UserError(f"--steps {steps} must be at least 1")
    folder = Path(arguments.folder).absolute()
    text = demo.demo_yaml(steps)
    settings = config.load(None, arguments.settings, text=text, base=folder)
    text = yaml_with_overrides(text, arguments.settings)
    if arguments.dry_run:
        print(text, end="")
        return 0
    prepare_corpus(demo.corpus_folder(folder))
    return train_and_report(settings, text)


def prepare_corpus(corpus: Path) -> None:
    """Tokenize the standard library's text, unless that was done before."""
    if (corpus / "corpus.json").exists():
        return
    from motet.launcher.commands.data.prepare import prepare_text

    print(f"tokenizing the text of Python's standard library into {corpus}")
    prepare_text([demo.CORPUS_INPUT], corpus, vocabulary_size=demo.VOCABULARY_SIZE)


def train_and_report(settings: RunSettings, text: str) -> int:
    """Train, or go on, or neither when the run is finished; then report."""
    from motet.launcher.commands.report import build
    from motet.launcher.launch.local import train
    from motet.launcher.runs.begun import differences, refuse_existing

    rundir = RunDir(Path(settings.runs) / settings.name)
    exists = rundir.resolved_yaml.exists()
    if not exists or differences(config.load(rundir.resolved_yaml), settings):
        refuse_existing(settings, rundir)
    if not rundir.done.exists():
        code = train(settings, rundir, yaml_text=text, resume=exists)
        if code or not rundir.done.exists():
            return code
    build(rundir)
    return 0
