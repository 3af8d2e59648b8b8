from __future__ import annotations

import errno
import os
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from motet.core.errors import UserError
from motet.launcher.config.sections import LayoutSettings, RunSettings, TrainingSettings
from motet.launcher.launch.alone import found_here, interface_towards, private_folder
from motet.launcher.launch.command import (
    MEETING,
    NodePlace,
    launch_environment,
    recorded_environment,
    shell_text,
    torchrun_command,
)
from motet.launcher.runs.rundir import RunDir

GOLDEN = Path(__file__).parents[2] / "golden" / "torchrun.txt"
RUN = RunDir("/runs/a run")


def settings(processes: int) -> RunSettings:
    return RunSettings(name="first", layout=LayoutSettings(processes=processes))


def test_the_torchrun_commands_are_the_golden_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/venv/bin/python")
    commands = [
        torchrun_command(settings(1), RUN, 1),
        torchrun_command(settings(3), RUN, 2),
        torchrun_command(settings(8), RUN, 1, NodePlace(4, 2, "head:29500")),
        torchrun_command(settings(2), RUN, 1, terminal=True),
    ]
    nodes = NodePlace(4, 2, "head:29500")
    environment = launch_environment(settings(2), RUN, {"PYTHONPATH": "/mine"}, 16, 3, nodes)
    lines = [*map(shlex.join, commands), shell_text(["python"], environment)]
    lines = [line.replace(str(MEETING), "/motet/meeting.py") for line in lines]
    assert "\n".join(lines) + "\n" == GOLDEN.read_text()


def test_torchrun_understands_the_arguments() -> None:
    from torch.distributed.run import get_args_parser

    for nodes in (NodePlace(), NodePlace(2, 1, "head:29500")):
        command = torchrun_command(settings(2), RUN, 1, nodes)
        parsed = get_args_parser().parse_args(command[3:])
        assert parsed.nproc_per_node == "2"
        assert parsed.max_restarts == 3
        assert parsed.training_script == "motet.launcher.worker"
        assert parsed.training_script_args == ["/runs/a run"]
        assert parsed.standalone is False
        assert parsed.rdzv_conf == ("store_type=file" if nodes.count == 1 else "rank=1")


def test_machines_of_unequal_size_are_numbered_one_after_the_other() -> None:
    nodes = NodePlace(3, 2, "head:1", offset=6, total=7)
    made = launch_environment(settings(1), RUN, {"MOTET_RANK_OFFSET": "99"}, 4, 5, nodes)
    assert (made["MOTET_ATTEMPT"], made["MOTET_RANK_OFFSET"]) == ("5", "6")
    assert "/runs/a run/attempts/5/logs/ranks-6" in torchrun_command(settings(1), RUN, 5, nodes)


def test_what_another_launch_told_its_ranks_does_not_reach_this_one() -> None:
    inherited = {"MOTET_ATTEMPT": "9", "MOTET_RANK_OFFSET": "4", "MOTET_HOLDS_STORE": "0"}
    inherited |= {"MOTET_MEETING": "/tmp/y", "MOTET_ROUND": "3"}
    inherited |= {"MOTET_STORE": "/tmp/x", "PET_NNODES": "2", "PET_NODE_RANK": "0", "RANK": "1"}
    inherited |= {"MASTER_ADDR": "elsewhere", "ACCELERATE_USE_FSDP": "true", "ROLE_RANK": "1"}
    inherited |= {"TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for nodes in (NodePlace(), NodePlace(2, 1, "head:1")):
        made = launch_environment(settings(1), RUN, inherited, 4, 0, nodes)
        assert {name: made[name] for name in inherited if name in made} in (
            {},
            {"MOTET_RANK_OFFSET": "1"},
        )


def test_every_variable_that_torchrun_reads_is_set_by_us_or_cleared() -> None:
    """Those of its parser, and those that its sources name."""
    from torch.distributed import elastic, run

    folder = Path(str(elastic.__file__)).parent
    sources = [Path(run.__file__), *folder.rglob("*.py")]
    read = re.compile(r"""(?:environ\.get\(|getenv\(|environ\[)\s*["']([A-Z_]+)["']""")
    named = {name for path in sources for name in read.findall(path.read_text(encoding="utf-8"))}
    named |= {f"PET_{action.dest.upper()}" for action in run.get_args_parser()._actions}
    assert {"PET_NNODES", "TORCHELASTIC_ERROR_FILE"} <= named
    # What a user may want to decide, and what names files, devices and how loud it is.
    theirs = {"CUDA_VISIBLE_DEVICES", "LOGLEVEL", "OMP_NUM_THREADS", "USE_LIBUV"}
    theirs |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "TORCH_NCCL_ASYNC_ERROR_HANDLING"}
    theirs |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE"}
    inherited = dict.fromkeys(named - theirs, "of another launch")
    made = launch_environment(settings(1), RUN, inherited, 4)
    assert "of another launch" not in made.values()


def test_one_machine_meets_in_private_files_and_talks_to_itself() -> None:
    place = NodePlace(folder="/tmp/motet-x", interface="lo")
    made = launch_environment(settings(2), RUN, {"NCCL_SOCKET_IFNAME": "ib0"}, 4, 1, place)
    assert made["MOTET_STORE"] == "/tmp/motet-x/ranks"
    assert (made["GLOO_SOCKET_IFNAME"], made["NCCL_SOCKET_IFNAME"]) == ("lo", "ib0")
    words = torchrun_command(settings(2), RUN, 1, place)
    assert words[words.index("--rdzv-endpoint") + 1] == "/tmp/motet-x/machines"
    with found_here(NodePlace(), Path("/no/such")) as here:
        assert Path(here.folder).stat().st_mode & 0o077 == 0
    assert not Path(here.folder).exists()


def test_several_machines_meet_in_a_private_folder_and_talk_over_the_network_of_the_endpoint(
    tmp_path: Path,
) -> None:
    meeting = tmp_path / "attempts/1/meeting"
    with found_here(NodePlace(2, 0, "127.0.0.1:1"), meeting) as place:
        assert (place.folder, place.interface) == (str(meeting), "lo")
        assert meeting.stat().st_mode & 0o077 == 0
        assert not list(meeting.iterdir())
    assert [path.name for path in meeting.iterdir()] == ["closed"]
    made = launch_environment(settings(2), RUN, {}, 4, 1, replace(place, interface="eth7"))
    assert made["MOTET_STORE"] == f"{meeting}/ranks"
    assert made["MOTET_MEETING"] == str(meeting)
    assert made["GLOO_SOCKET_IFNAME"] == "eth7"
    assert not {"PET_LOCAL_ADDR", "NCCL_SOCKET_IFNAME"} & made.keys()
    chosen = launch_environment(settings(2), RUN, {"GLOO_SOCKET_IFNAME": "ib0"}, 4, 1, place)
    assert chosen["GLOO_SOCKET_IFNAME"] == "ib0"
    assert interface_towards("no-such-host.invalid") == ""


@pytest.mark.parametrize("kind", ["open", "link", "file"])
def test_a_meeting_that_others_may_write_to_is_refused(tmp_path: Path, kind: str) -> None:
    meeting = tmp_path / "meeting"
    if kind == "open":
        meeting.mkdir()
        meeting.chmod(0o770)
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        meeting.symlink_to(tmp_path / "elsewhere")
    else:
        meeting.write_text("")
    with pytest.raises(UserError, match=str(meeting)):
        private_folder(meeting)


def test_a_file_system_without_locks_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_lock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", no_lock)
    with pytest.raises(UserError, match=r"meeting: Function not implemented.*-o flock"):
        private_folder(tmp_path / "meeting")


@pytest.mark.parametrize(
    "nodes", [NodePlace(2, 0), NodePlace(2, 2, "h:1"), NodePlace(2, -1, "h:1")]
)
def test_several_nodes_need_an_endpoint_and_a_rank_among_them(nodes: NodePlace) -> None:
    with pytest.raises(ValueError, match="endpoint"):
        torchrun_command(settings(1), RUN, 1, nodes)


@pytest.mark.parametrize(
    ("cores", "processes", "threads"), [(16, 2, "8"), (2, 2, "1"), (2, 8, "1"), (7, 2, "3")]
)
def test_processes_share_the_cores(cores: int, processes: int, threads: str) -> None:
    made = launch_environment(settings(processes), RUN, {}, cores)
    assert made["OMP_NUM_THREADS"] == threads


def test_the_snapshot_comes_before_anything_else_that_python_searches() -> None:
    made = launch_environment(settings(1), RUN, {"PYTHONPATH": "/a:/b", "HOME": "/h"}, 1)
    assert made["PYTHONPATH"] == "/runs/a run/code:/a:/b"
    assert made["PYTHONSAFEPATH"] == "1"
    assert made["HOME"] == "/h"


def test_what_the_user_set_stays() -> None:
    inherited = {"OMP_NUM_THREADS": "5", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    assert inherited.items() <= launch_environment(settings(2), RUN, inherited, 16).items()
    free = RunSettings(name="x", training=TrainingSettings(deterministic=False))
    assert "CUBLAS_WORKSPACE_CONFIG" not in launch_environment(free, RUN, {}, 1)


def test_no_secret_of_the_environment_is_recorded() -> None:
    secrets = {
        "WANDB_API_KEY": "s3cret",
        "HF_TOKEN": "s3cret",
        "NCCL_SECRET_KEY": "s3cret",
        "TORCH_HUB_TOKEN": "s3cret",
        "AWS_SESSION": "s3cret",
        "HOME": "s3cret",
    }
    made = launch_environment(settings(2), RUN, {**secrets, "NCCL_DEBUG": "INFO"}, 4)
    assert made["WANDB_API_KEY"] == "s3cret"
    recorded = recorded_environment(made)
    assert recorded["NCCL_DEBUG"] == "INFO"
    assert "s3cret" not in "".join(recorded.values()) + shell_text(["x"], made)
