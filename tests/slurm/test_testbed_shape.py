"""What a testbed would be made of: names, addresses, texts, and what is said when it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from motet.launcher import cli
from motet.slurm.errors import SlurmError
from motet.slurm.testbed import disk, needs, shape
from motet.slurm.testbed.bed import Testbed

GOLDEN = Path(__file__).parents[1] / "golden" / "testbed.txt"
BED = Path("/srv/bed")


def test_the_commands_and_the_configuration_are_the_golden_ones() -> None:
    assert Testbed(BED).plan() == GOLDEN.read_text(encoding="utf-8")


def test_names_come_from_the_folder_alone_and_fit_the_kernel() -> None:
    names, other = shape.BedNames(BED), shape.BedNames(BED / "other")
    assert names.namespace("n1") == shape.BedNames(Path("/srv/bed")).namespace("n1")
    assert names.namespace("n1") != other.namespace("n1")
    assert names.host_interface != other.host_interface
    assert len(names.host_interface) <= 15


def test_every_host_has_an_address_of_its_own() -> None:
    hosts = ["", shape.CONTROLLER, *shape.NODES]
    assert len({shape.address(7, host) for host in hosts}) == len(hosts)
    conf = shape.slurm_conf_text(shape.Files(BED), 7)
    for node in shape.NODES:
        assert f"NodeName={node} NodeAddr={shape.address(7, node)} " in conf
        assert f"{shape.address(7, node)} {node}\n" in shape.hosts_text(7)


def test_only_things_with_our_names_are_removed() -> None:
    names = shape.BedNames(BED)
    other = shape.BedNames(BED / "other")
    made = ["eth0", other.host_interface, other.namespace("n1"), "motet", names.namespace("n2")]
    removed = shape.removal_commands(names, [*made, names.host_interface])
    assert [command[-1] for command in removed] == [names.host_interface, names.namespace("n2")]


def test_a_fast_link_gets_a_bucket_that_holds_a_tick() -> None:
    slow, fast = (
        shape.rate_commands(shape.BedNames(BED), rate_mbit)[0] for rate_mbit in (10.0, 4000.0)
    )
    assert slow[slow.index("burst") + 1] == "65536b"
    assert fast[fast.index("burst") + 1] == "2000000b"


@pytest.mark.parametrize("rate_mbit", [0.0, -5.0, 1e6, float("nan")])
def test_an_impossible_rate_is_refused(rate_mbit: float) -> None:
    with pytest.raises(SlurmError, match=r"the link takes 0\.1 to 100,000"):
        shape.check_rate(rate_mbit)


def test_a_folder_whose_sockets_would_have_too_long_names_is_refused() -> None:
    def folder(length: int) -> shape.Files:
        return shape.Files(Path("/" + "x" * (length - 1)))

    with pytest.raises(SlurmError, match="may have at most") as told:
        shape.check_folder(folder(100))
    most = int(str(told.value).partition("at most ")[2].split()[0])
    shape.check_folder(folder(most))
    assert len(f"{folder(most).spool('n1')}/n1_1234567.4294967295") == 107
    with pytest.raises(SlurmError, match=f"at most {most} bytes"):
        shape.check_folder(folder(most + 1))


@pytest.mark.parametrize("name", ["it's", "a bed", "a\nb", "%n", "a#b", "a=b", "a,b", "ä"])
def test_a_folder_that_slurm_conf_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(SlurmError, match="use letters, digits"):
        shape.check_folder(shape.Files(Path("/srv") / name))


@pytest.mark.parametrize(
    ("version", "text"), [((22, 5), "IgnoreSystemd=yes\n"), ((24, 11), "CgroupPlugin=disabled\n")]
)
def test_cgroups_are_avoided_in_the_words_of_the_version(
    version: tuple[int, int], text: str
) -> None:
    assert shape.cgroup_text(version) == text


def test_a_folder_with_other_files_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(SlurmError, match="holds other files"):
        disk.check_ours(shape.Files(tmp_path))
    disk.check_ours(shape.Files(tmp_path / "new"))


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without root and without Slurm."""
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr(needs, "SYSTEM_FOLDERS", ())
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize(
    "words",
    [["start"], ["stop"], ["status"], ["env"], ["rate", "5"], ["cut", "n1"], ["crash", "ctl"]],
    ids=" ".join,
)
def test_everything_that_is_missing_is_told_in_one_message(
    bare: None, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["slurm", "testbed", *words, "--folder", str(tmp_path / "bed")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("motet: a testbed cannot start here: ")
    assert "started as root (sudo)" in told
    assert "apt-get install hostname iproute2 mount munge slurm-wlm util-linux" in told
    assert not (tmp_path / "bed").exists()


def test_root_without_capabilities_is_told_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    status = "Name:\tmotet\nCapEff:\t00000000a80425fb\n"  # Docker's default
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: status)
    assert any("root lacks CAP_NET_ADMIN, CAP_SYS_ADMIN" in line for line in needs.missing())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["start"], "NodeName=n4 "),
        (["stop"], "# nothing"),
        (["rate", "8"], "rate 8000000bit"),
        (["cut", "n3"], "link set n3 down"),
        (["mend", "n3"], "link set n3 up"),
        (["crash", "n2"], "every process of n2"),
        (["restart-controller"], "# end slurmctld"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_dry_run_needs_no_root_and_makes_nothing(
    bare: None, words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bed"
    assert cli.main(["slurm", "testbed", *words, "--dry-run", "--folder", str(folder)]) == 0
    assert told in capsys.readouterr().out
    assert not folder.exists()


@pytest.mark.parametrize("words", [["cut", "n9"], ["mend", "ctl"], ["crash", "host"]], ids=" ".join)
def test_a_host_that_there_is_not_is_named(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["slurm", "testbed", *words, "--dry-run"]) == 2
    assert f"node {words[-1]!r}: the testbed has n1, n2, n3, n4" in capsys.readouterr().err


def test_the_command_line_and_the_testbed_have_the_same_defaults() -> None:
    parsed: Any = cli._parse(["slurm", "testbed", "start"])
    assert parsed.folder == shape.DEFAULT_FOLDER
    assert parsed.rate == shape.DEFAULT_RATE_MBIT
