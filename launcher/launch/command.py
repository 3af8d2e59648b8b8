"""The command of one attempt, torchrun or `accelerate launch`, and its environment: pure functions
from settings to text.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from motet.launcher.config.sections import RunSettings
from motet.launcher.runs.ranks import WORKER
from motet.launcher.runs.rundir import RunDir

# Variables that are written to attempts/N/environment.json. Nothing else is: any other variable may
# be a secret.
RECORDED = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "DS_ACCELERATOR",
    "MKL_NUM_THREADS",
    "MOTET_ATTEMPT",
    "MOTET_RANK_OFFSET",
    "MOTET_STAGE",
    "OMP_NUM_THREADS",
    "PYTHONPATH",
    "PYTHONSAFEPATH",
)
RECORDED_PREFIXES = ("GLOO_", "NCCL_", "PYTORCH_", "TORCH_", "TORCHINDUCTOR_")
OWN = (
    *("MOTET_ATTEMPT", "MOTET_RANK_OFFSET", "MOTET_HOLDS_STORE", "MOTET_STORE"),
    *("MOTET_MEETING", "MOTET_ROUND", "MOTET_STAGE"),
)
"""Variables by which a launch tells its own ranks who they are; one of another launch must not
reach them.
"""
_OTHERS = ("PET_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
_OTHERS_NAMES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME"),
    *("MASTER_ADDR", "MASTER_PORT", "PYTHON_EXEC", "TORCH_ELASTIC_WORKER_IDENTICAL"),
)
"""What torchrun and `accelerate launch` read where an argument does not say it, and what they tell
their own ranks: a shell inside of another launch must not decide for this one.
"""
LOOPBACK = "127.0.0.1"
MEETING = Path(__file__).with_name("meeting.py")
"""Starts torchrun or Accelerate where there are several machines. By its path: the code of a run
that goes on may be older, and PYTHONPATH names that first.
"""
SHUTDOWN_TIMEOUT_S = 120
"""How long torchrun waits for ranks that were asked to stop: longer than a checkpoint takes to
write.
"""
_FSDP2 = (
    "--use_fsdp",
    "--fsdp_version",
    "2",
    "--fsdp_auto_wrap_policy",
    "TRANSFORMER_BASED_WRAP",
    "--fsdp_transformer_layer_cls_to_wrap",
    "Block",
)
_SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")


@dataclass(frozen=True)
class NodePlace:
    """Machines of one run.

    Attributes:
        count, rank: how many, and which one this is.
        endpoint: HOST or HOST:PORT of the first machine, where there are several; the address by
            which it is reached is the one that the run uses.
        offset: global rank of this machine's first process; None = all machines before have as many
            processes as this one.
        total: processes of all machines; None likewise.
        interface: network interface that ranks talk over; "" = as they choose.
        folder: private one in which the processes of all machines find each other; "" = not known
            yet (torchrun makes a file of its own for one machine).
    """

    count: int = 1
    rank: int = 0
    endpoint: str = ""
    offset: int | None = None
    total: int | None = None
    interface: str = ""
    folder: str = ""

    @property
    def host(self) -> str:
        """The first machine's name or address."""
        host, colon, port = self.endpoint.rpartition(":")
        return host if colon and port.isdecimal() else self.endpoint

    def first_rank(self, processes: int) -> int:
        """Return the global rank of the first of this machine's `processes`."""
        return self.rank * processes if self.offset is None else self.offset

    def world_size(self, processes: int) -> int:
        """Return the processes of all machines."""
        return self.count * processes if self.total is None else self.total


ONE_NODE = NodePlace()


def rendezvous_arguments(nodes: NodePlace, run_id: str) -> list[str]:
    """How the processes of all nodes find each other, in torchrun's words: in files of a private
    folder. torchrun's own ways listen on every interface, and unpickle what is written there.
    """
    if nodes.count == 1:
        words = ["--nnodes", "1", "--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file"]
        if nodes.folder:
            words += ["--rdzv-endpoint", _machines_file(nodes)]
        return [*words, "--rdzv-id", run_id, "--local-addr", LOOPBACK]
    _check(nodes)
    return [
        "--nnodes",
        str(nodes.count),
        "--rdzv-backend",
        "motet",
        "--rdzv-conf",
        f"rank={nodes.rank}",
        *(["--rdzv-endpoint", nodes.folder] if nodes.folder else []),  # else torchrun wonders
        "--rdzv-id",
        run_id,
    ]


def _check(nodes: NodePlace) -> None:
    if not nodes.endpoint or not 0 <= nodes.rank < nodes.count:
        raise ValueError(f"{nodes} needs an endpoint HOST:PORT and a rank below its count")


def launcher_words(nodes: NodePlace, module: str) -> list[str]:
    """The words that start torchrun or Accelerate, by its module, on one of the nodes."""
    return [sys.executable, *(["-m"] if nodes.count == 1 else [str(MEETING)]), module]


def _machines_file(nodes: NodePlace) -> str:
    return f"{nodes.folder}/machines"


def attempt_command(
    settings: RunSettings,
    rundir: RunDir,
    attempt: int,
    nodes: NodePlace = ONE_NODE,
    terminal: bool = False,
) -> list[str]:
    """Arguments that start the workers of one attempt on this node, by what the engine is started
    with.

    With `terminal`, the first rank writes to this process's own, where it shows a bar; otherwise
    each writes to its file as well.
    """
    make = accelerate_command if settings.layout.engine == "accelerate" else torchrun_command
    return make(settings, rundir, attempt, nodes, terminal)


def accelerate_command(
    settings: RunSettings,
    rundir: RunDir,
    attempt: int,
    nodes: NodePlace = ONE_NODE,
    terminal: bool = False,
) -> list[str]:
    """Arguments of `accelerate launch` (which starts torchrun itself).

    Numbers of processes and machines are ours, and go before those of the user's file. Without a
    file Accelerate is asked for FSDP2 over all ranks, or for DDP where `layout.dp_shard` is 1.
    """
    layout = settings.layout
    processes = nodes.world_size(layout.processes)
    if layout.accelerate_config:
        kind = ["--config_file", layout.accelerate_config]
    else:
        replicas = layout.dp_shard == 1 and processes > 1
        kind = ["--multi_gpu"] if replicas else list(_FSDP2)
        kind += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return [
        *launcher_words(nodes, "accelerate.commands.launch"),
        *kind,
        "--num_processes",
        str(processes),
        "--num_machines",
        str(nodes.count),
        *_accelerate_rendezvous(nodes),
        "--max_restarts",
        str(settings.training.max_restarts),
        *_logs(settings, rundir, attempt, nodes, terminal),
        "--module",
        WORKER,
        str(rundir.root),
    ]


def _accelerate_rendezvous(nodes: NodePlace) -> list[str]:
    """How the processes of all nodes find each other, in Accelerate's words."""
    if nodes.count == 1:  # the rest stands in `launch_environment`
        words = ["--main_process_port", "0", "--rdzv_backend", "c10d"]
        return [*words, "--rdzv_conf", "store_type=file"]
    _check(nodes)
    return [
        "--machine_rank",
        str(nodes.rank),
        "--main_process_ip",
        nodes.host,
        "--main_process_port",
        "0",  # nothing listens there; Accelerate refuses one that is in use
        "--rdzv_backend",
        "motet",
        "--rdzv_conf",
        f"rank={nodes.rank}",
    ]


def _logs(
    settings: RunSettings, rundir: RunDir, attempt: int, nodes: NodePlace, terminal: bool
) -> list[str]:
    """What ranks print is copied into the attempt's folder, in one named by the first rank of this
    machine.
    """
    processes = settings.layout.processes
    copied = ",".join(f"{rank}:3" for rank in range(int(terminal), processes))
    folder = rundir.logs(attempt) / f"ranks-{nodes.first_rank(processes)}"
    return ["--log-dir", str(folder), "--tee", copied] if copied else []


def torchrun_command(
    settings: RunSettings,
    rundir: RunDir,
    attempt: int,
    nodes: NodePlace = ONE_NODE,
    terminal: bool = False,
) -> list[str]:
    """Arguments that start the workers of one attempt on this node, and start them anew when one
    dies.
    """
    return [
        *launcher_words(nodes, "torch.distributed.run"),
        *rendezvous_arguments(nodes, f"{settings.name}-{attempt}"),
        "--nproc-per-node",
        str(settings.layout.processes),
        "--max-restarts",
        str(settings.training.max_restarts),
        *_logs(settings, rundir, attempt, nodes, terminal),
        "-m",
        WORKER,
        str(rundir.root),
    ]


def launch_environment(
    settings: RunSettings,
    rundir: RunDir,
    inherited: Mapping[str, str],
    cores: int,
    attempt: int = 0,
    nodes: NodePlace = ONE_NODE,
) -> dict[str, str]:
    """Environment of the workers: the inherited one, and what a run must not leave to chance.

    The snapshot of the code goes first in PYTHONPATH, and the working directory is not searched. A
    thread count that the user chose stays.

    Args:
        cores: of this machine, for its processes.
        attempt: the one that the launcher claimed; 0 = not known yet.
    """
    out = without_launches(inherited)
    if attempt:
        out["MOTET_ATTEMPT"] = str(attempt)
    if nodes.count > 1:
        out["MOTET_RANK_OFFSET"] = str(nodes.first_rank(settings.layout.processes))
    out |= meeting_place(nodes, out)
    out["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # see rank_main._hold_store
    out["PYTHONPATH"] = ":".join(filter(None, (str(rundir.code), inherited.get("PYTHONPATH", ""))))
    out["PYTHONSAFEPATH"] = "1"
    out.setdefault("PYTHONUNBUFFERED", "1")  # lines come when they are printed, also through a pipe
    out.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_TIMEOUT_S))
    out.setdefault("OMP_NUM_THREADS", str(max(1, cores // settings.layout.processes)))
    if settings.layout.engine == "deepspeed" and settings.layout.device == "cpu":
        out.setdefault("DS_ACCELERATOR", "cpu")  # it would take a GPU that is there
    if settings.training.deterministic:
        out.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return out


def without_launches(inherited: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without what launches, ours and others', tell their processes."""
    return {
        name: value
        for name, value in inherited.items()
        if name not in (*OWN, *_OTHERS_NAMES) and not name.startswith(_OTHERS)
    }


def meeting_place(nodes: NodePlace, chosen: Mapping[str, str]) -> dict[str, str]:
    """Return how ranks find each other and talk: through files that nobody else can write, and over
    one interface (of a single machine one that nobody else can reach) unless others were `chosen`.
    """
    out, names = {}, ["GLOO_SOCKET_IFNAME"]
    if nodes.count == 1:
        out["PET_LOCAL_ADDR"] = LOOPBACK  # `accelerate launch` has no argument for it
        if nodes.folder:
            out["PET_RDZV_ENDPOINT"] = _machines_file(nodes)
    elif nodes.folder:
        out["MOTET_MEETING"] = nodes.folder
    if nodes.folder:
        out["MOTET_STORE"] = f"{nodes.folder}/ranks"
    if nodes.count == 1 or nodes.interface == "lo":
        names.append("NCCL_SOCKET_IFNAME")  # else it may know a faster network than the endpoint's
    if nodes.interface:
        out |= {name: nodes.interface for name in names if name not in chosen}
    return out


def recorded_environment(
    environment: Mapping[str, str], also: Sequence[str] = ()
) -> dict[str, str]:
    """The part of an environment that may be stored: known names only, and none that sounds like a
    secret.

    Args:
        also: what begins further names: those of schedulers' variables.
    """
    prefixes = (*RECORDED_PREFIXES, *also)
    return {
        name: value
        for name, value in sorted(environment.items())
        if (name in RECORDED or name.startswith(prefixes))
        and not any(word in name for word in _SECRET_WORDS)
    }


def shell_text(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The command as one may paste it into a shell, with the recorded variables before it."""
    shown = [f"{name}={shlex.quote(v)}" for name, v in recorded_environment(environment).items()]
    return " ".join([*shown, shlex.join(command)])
