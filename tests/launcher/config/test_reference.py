from __future__ import annotations

from pathlib import Path

from motet.experiments.design.parser import KEYS
from motet.launcher.config import reference
from motet.launcher.config.reference import EXPERIMENT_KEYS

PAGE = Path(__file__).parents[3] / "docs" / "reference.md"


def test_the_committed_reference_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference.reference(), "run `make docs`"


def test_every_key_of_an_experiment_is_explained() -> None:
    assert tuple(EXPERIMENT_KEYS) == tuple(KEYS)


def test_the_page_names_settings_of_every_depth() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for piece in (
        "### `training`",
        "#### `training.optimizer`",
        "#### `data.corpora[]`",
        "| `async` | true/false | true |",
        "| `spike_sigma` | number | 6.0 |",
        "`${oc.env:NAME}`",
        "### `use: forgetting`",
        "| `7b` |",
    ):
        assert piece in page, piece


def test_a_bar_in_a_cell_does_not_break_the_table() -> None:
    assert reference.table([["a|b"]], ["x"])[-1] == "| a\\|b |"


def test_the_page_can_be_written_or_printed(tmp_path: Path, capsys: object) -> None:
    assert reference.main([str(tmp_path / "page.md")]) == 0
    assert (tmp_path / "page.md").read_text() == PAGE.read_text()
