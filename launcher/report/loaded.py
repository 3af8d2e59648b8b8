"""A run folder as Python data: settings, metrics, units, scores and answers for pandas."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motet.core.errors import UserError
from motet.core.files import read_json
from motet.core.parsing import parse_yaml
from motet.launcher.runs.metrics import Row, read_metrics
from motet.launcher.runs.rundir import RunDir

if TYPE_CHECKING:
    import pandas as pd

    from motet.experiments.analysis.measured import Measured
    from motet.launcher.study.after_training import StudyResult


def load(run: str | os.PathLike[str]) -> LoadedRun:
    """Open the folder of one run, finished or not.

    Nothing but the manifest is read yet; each attribute reads its part when it is first used.

    Args:
        run: the folder, such as `runs/demo`.

    Raises:
        UserError: it is not the folder of a run; the message says what is missing.
    """
    return LoadedRun(RunDir.open(Path(run)))


def load_runs(runs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> LoadedRuns:
    """Open several runs: a folder that holds run folders, or a list of run folders.

    Raises:
        UserError: the folder holds no run, or one of the list is none.
    """
    if not isinstance(runs, str | os.PathLike):
        return LoadedRuns([load(run) for run in runs])
    folder = Path(runs)
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; give a folder that holds runs, such as runs")
    found = sorted(path.parent for path in folder.glob("*/manifest.json"))
    if not found:
        raise UserError(f"{folder} holds no run: no folder in it has a manifest.json")
    return LoadedRuns([load(path) for path in found])


class LoadedRun:
    """One run as Python data; `motet.load` makes it.

    Every attribute is read from disk when it is first used, and kept: load the run again to see
    what was added since. In all frames `member` is `whole` for the whole model, or the name of a
    member of the run's family.
    """

    def __init__(self, rundir: RunDir) -> None:
        self._rundir = rundir
        self._manifest: dict[str, Any] = read_json(rundir.manifest)
        if not isinstance(self._manifest, dict):
            raise UserError(f"{rundir.manifest} is not the manifest of a run: it holds no names")

    def __repr__(self) -> str:
        return f"motet.load({str(self.path)!r})"

    @property
    def path(self) -> Path:
        """The folder of the run."""
        return self._rundir.root

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self._manifest.get("name") or self._rundir.name)

    @property
    def manifest(self) -> dict[str, Any]:
        """The frozen facts of the run, as in `manifest.json`: sizes, hashes, corpora."""
        return self._manifest

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Every setting with its value, nested as in run.yaml; `${oc.env:NAME}` stays as written.

        Raises:
            UserError: resolved.yaml is damaged.
        """
        path = self._rundir.resolved_yaml
        try:
            return dict(parse_yaml(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """One row per recorded training step: `step` (updates completed), `time` (Unix seconds),
        `loss` (nats per token), `lr`, `grad_norm`, `tokens` (consumed so far), `tokens_per_s`,
        `seconds.PHASE`, ... Steps that a restart repeated are there once.
        """
        return self.rows("step")

    def rows(self, kind: str) -> pd.DataFrame:
        """Rows of one kind of `metrics.jsonl`: step, probe, checkpoint, event or attempt.

        Args:
            kind: which rows; what is nested in a row becomes columns named with a dot.

        Raises:
            UserError: there is no such kind.
        """
        from motet.launcher.report.frames import metrics
        from motet.launcher.runs.metrics import KINDS

        if kind not in KINDS:
            raise UserError(
                f"kind={kind!r} is no kind of row; there are {', '.join(sorted(KINDS))}"
            )
        return metrics(self._rows, kind)

    @cached_property
    def units(self) -> pd.DataFrame:
        """One row per unit: `experiment`, `role`, `unit` (its id), `arm`, `dose` (exposures per
        unit, or the arm's total in the experiment's `dose_in`), `timing` (early, late, or missing),
        `cluster` (units of one cluster share an arm), `block`, and `attribute.NAME` for each
        attribute. Known as soon as the run is frozen.

        Raises:
            UserError: the frozen units were altered.
        """
        from motet.experiments.design.frozen import read_questions
        from motet.experiments.library.kinds import Library
        from motet.launcher.report.frames import units

        if not self._has_study:
            return units([])
        return units(read_questions(self._rundir.plan, Library(self._rundir.plugins)))

    @cached_property
    def scores(self) -> pd.DataFrame:
        """One row per probe step, unit, member and series: `step`, `experiment`, `unit`, `member`,
        `series`, `value`. A series is what the experiment makes of the scores of a unit's items,
        such as `exposure` in bits or `accuracy`; only probes of the final weights' lineage count.

        Raises:
            UserError: the run has no checkpoint yet, or a file of it is damaged.
        """
        from motet.launcher.report.frames import scores

        return scores(self._probed)

    @cached_property
    def items(self) -> pd.DataFrame:
        """One row per probe step, probe item and member: `step`, `experiment`, `unit`, `member`,
        `item`, `kind`, `logprob` (of the whole target, nats), `tokens` and `bytes` (of the target),
        `greedy` (whether greedy decoding gives the target), `generated` (what the model wrote after
        the prompt, "" where nothing was asked for).

        Raises:
            UserError: the run has no checkpoint yet, or a file of it is damaged.
        """
        from motet.launcher.report.frames import items

        return items(self._probed)

    @cached_property
    def answers(self) -> pd.DataFrame:
        """One row per outcome, experiment and member, the primary outcome of each experiment first:
        `experiment`, `use`, `role`, `member`, `primary`, `outcome`, `label`, `unit`, `test`
        (contrast, trend or omnibus), `contrast`, `effect` with its interval `low` to `high` at
        `confidence`, `p`, `p_corrected` (Holm over primary outcomes, Benjamini-Hochberg over the
        others), `control_mean`, `treated_mean`, `n`, `smallest_detectable`, `assumption`,
        `coverage_note` (how often such intervals hold the true effect, where that is known to be
        too seldom), and for primary outcomes `verdict` (found, not_found, negligible, saturated or
        invalid), `sentence`, and `negative_control` (passed, failed, or uninformative: it could not
        have failed) with its `negative_control_p`.
        An omnibus test has no single effect: `per_arm` of report.json has those of its arms.
        The verdict is that of the frozen step; `interim` or `exploratory` where there is none.
        Figures of another step follow as rows that are not primary, with the verdict `exploratory`.
        Effects are in `unit`; docs/statistics.md says how they are estimated.

        Raises:
            UserError: the run has no checkpoint yet, or a file of it is damaged.
        """
        from motet.experiments.analysis.analyze import analyze
        from motet.launcher.report.frames import answers
        from motet.launcher.study.judgement import judged

        found = judged(self.path, details=False)[1] if self._has_study else None
        return answers(found or analyze([], 0, 0))

    @property
    def _has_study(self) -> bool:
        from motet.launcher.report.collect import has_study

        return has_study(self._rundir)

    @property
    def _probed(self) -> list[Measured]:
        """All probes of the newest weights, also those after the step of judgement."""
        study = self._study
        if study is None:
            return []
        later = {(one.name, one.member): one for one in study.later}
        return [later.get((one.name, one.member), one) for one in study.measured]

    @cached_property
    def _study(self) -> StudyResult | None:
        from motet.launcher.study.after_training import load_measured

        return load_measured(self.path) if self._has_study else None

    @cached_property
    def _rows(self) -> list[Row]:
        return read_metrics(self._rundir.metrics)


class LoadedRuns:
    """Several runs; `motet.load_runs` makes it.

    `metrics`, `units`, `scores`, `items` and `answers` are those of all runs below each other, with
    the run's name in a first column `run`. Iterate over it for the runs themselves.
    """

    def __init__(self, runs: list[LoadedRun]) -> None:
        self.runs = runs

    def __len__(self) -> int:
        return len(self.runs)

    def __iter__(self) -> Iterator[LoadedRun]:
        return iter(self.runs)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """`LoadedRun.metrics` of every run."""
        return self._all(lambda run: run.metrics)

    @cached_property
    def units(self) -> pd.DataFrame:
        """`LoadedRun.units` of every run."""
        return self._all(lambda run: run.units)

    @cached_property
    def scores(self) -> pd.DataFrame:
        """`LoadedRun.scores` of every run."""
        return self._all(lambda run: run.scores)

    @cached_property
    def items(self) -> pd.DataFrame:
        """`LoadedRun.items` of every run."""
        return self._all(lambda run: run.items)

    @cached_property
    def answers(self) -> pd.DataFrame:
        """`LoadedRun.answers` of every run; p-values are corrected within a run, not over runs."""
        return self._all(lambda run: run.answers)

    def _all(self, frame_of: Callable[[LoadedRun], pd.DataFrame]) -> pd.DataFrame:
        import pandas as pd

        frames = []
        for run in self.runs:
            frame = frame_of(run).copy()
            frame.insert(0, "run", run.name)
            frames.append(frame)
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["run"])
