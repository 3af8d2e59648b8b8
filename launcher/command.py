"""The command of one attempt, torchrun or `accelerate launch`, and its environment: pure functions from settings to text."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from motet.launcher.rundir import RunDir
from motet.launcher.settings import RunSettings

# Variables that are written to attempts/N/environment.json. Nothing else is: any other variable may be a secret.
RECORDED = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "DS_ACCELERATOR",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "PYTHONPATH",
    "PYTHONSAFEPATH",
)
RECORDED_PREFIXES = ("GLOO_", "NCCL_", "PYTORCH_", "SLURM_JOB_", "TORCH_", "TORCHINDUCTOR_")
SHUTDOWN_TIMEOUT_S = 120
"""How long torchrun waits for ranks that were asked to stop: longer than a checkpoint takes to write."""
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
class Nodes:
    """Machines of one run. `endpoint` is HOST:PORT of the machine that holds the rendezvous."""

    count: int = 1
    rank: int = 0
    endpoint: str = ""


ONE_NODE = Nodes()


def rendezvous_arguments(nodes: Nodes, run_id: str) -> list[str]:
    """How the processes of all nodes find each other."""
    if nodes.count == 1:
        return ["--standalone"]
    if not nodes.endpoint or not 0 <= nodes.rank < nodes.count:
        raise ValueError(f"{nodes} needs an endpoint HOST:PORT and a rank below its count")
    return [
        "--nnodes",
        str(nodes.count),
        "--node-rank",
        str(nodes.rank),
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        nodes.endpoint,
        "--rdzv-id",
        run_id,
    ]


def attempt_command(
    settings: RunSettings, rundir: RunDir, attempt: int, nodes: Nodes = ONE_NODE
) -> list[str]:
    """Arguments that start the workers of one attempt on this node, by what the engine is started with."""
    make = accelerate_command if settings.layout.engine == "accelerate" else torchrun_command
    return make(settings, rundir, attempt, nodes)


def accelerate_command(
    settings: RunSettings, rundir: RunDir, attempt: int, nodes: Nodes = ONE_NODE
) -> list[str]:
    """Arguments of `accelerate launch` (which starts torchrun itself).

    Numbers of processes and machines are ours, and go before those of the user's file. Without a file Accelerate is asked for
    FSDP2 over all ranks, or for DDP where `layout.dp_shard` is 1.
    """
    layout = settings.layout
    processes = layout.processes * nodes.count
    if layout.accelerate_config:
        kind = ["--config_file", layout.accelerate_config]
    else:
        replicas = layout.dp_shard == 1 and processes > 1
        kind = ["--multi_gpu"] if replicas else list(_FSDP2)
        kind += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *kind,
        "--num_processes",
        str(processes),
        "--num_machines",
        str(nodes.count),
        *_accelerate_rendezvous(nodes),
        "--max_restarts",
        "0",
        *_logs(settings, rundir, attempt),
        "--module",
        "motet.launcher.worker",
        str(rundir.root),
    ]


def _accelerate_rendezvous(nodes: Nodes) -> list[str]:
    """How the processes of all nodes find each other, in Accelerate's words."""
    if nodes.count == 1:
        return ["--main_process_port", "0"]
    rendezvous_arguments(nodes, "")  # checks them
    host, _, port = nodes.endpoint.rpartition(":")
    return [
        "--machine_rank",
        str(nodes.rank),
        "--main_process_ip",
        host,
        "--main_process_port",
        port,
        "--rdzv_backend",
        "c10d",
    ]


def _logs(settings: RunSettings, rundir: RunDir, attempt: int) -> list[str]:
    """The first process writes to the terminal; the others are copied into the attempt's folder as well."""
    copied = ",".join(f"{rank}:3" for rank in range(1, settings.layout.processes))
    return ["--log-dir", str(rundir.attempt(attempt) / "logs"), "--tee", copied] if copied else []


def torchrun_command(
    settings: RunSettings, rundir: RunDir, attempt: int, nodes: Nodes = ONE_NODE
) -> list[str]:
    """Arguments that start the workers of one attempt on this node.

    A crash ends the attempt (no restarts inside it): `motet resume` makes the next one from the last checkpoint.
    """
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *rendezvous_arguments(nodes, f"{settings.name}-{attempt}"),
        "--nproc-per-node",
        str(settings.layout.processes),
        "--max-restarts",
        "0",
        *_logs(settings, rundir, attempt),
        "-m",
        "motet.launcher.worker",
        str(rundir.root),
    ]


def launch_environment(
    settings: RunSettings, rundir: RunDir, inherited: Mapping[str, str], cores: int
) -> dict[str, str]:
    """Environment of the workers: the inherited one, and what a run must not leave to chance.

    The snapshot of the code goes first in PYTHONPATH, and the working directory is not searched. A thread count that the
    user chose stays.
    """
    out = dict(inherited)
    out["PYTHONPATH"] = ":".join(filter(None, (str(rundir.code), inherited.get("PYTHONPATH", ""))))
    out["PYTHONSAFEPATH"] = "1"
    out.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_TIMEOUT_S))
    out.setdefault("OMP_NUM_THREADS", str(max(1, cores // settings.layout.processes)))
    if settings.layout.engine == "deepspeed" and settings.layout.device == "cpu":
        out.setdefault("DS_ACCELERATOR", "cpu")  # it would take a GPU that is there
    if settings.training.deterministic:
        out.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return out


def recorded_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that may be stored: known names only, and none that sounds like a secret."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if (name in RECORDED or name.startswith(RECORDED_PREFIXES))
        and not any(word in name for word in _SECRET_WORDS)
    }


def shell_text(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The command as one may paste it into a shell, with the recorded variables before it."""
    shown = [f"{name}={shlex.quote(v)}" for name, v in recorded_environment(environment).items()]
    return " ".join([*shown, shlex.join(command)])
