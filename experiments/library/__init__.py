"""The built-in experiments, found by the name that YAML's `use:` gives."""

from __future__ import annotations

from motet.experiments.library.base import Experiment
from motet.experiments.library.contamination import Contamination
from motet.experiments.library.controls import Placebo, PositiveControl
from motet.experiments.library.forgetting import Forgetting
from motet.experiments.library.knowledge import Knowledge
from motet.experiments.library.memorization import Memorization

LIBRARY: dict[str, type[Experiment]] = {
    "memorization": Memorization,
    "contamination": Contamination,
    "knowledge": Knowledge,
    "forgetting": Forgetting,
    "placebo": Placebo,
    "positive_control": PositiveControl,
}
