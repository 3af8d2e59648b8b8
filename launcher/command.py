"""The torchrun command of one attempt and its environment: pure functions from settings to text."""

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
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "PYTHONPATH",
    "PYTHONSAFEPATH",
)
RECORDED_PREFIXES = ("GLOO_", "NCCL_", "PYTORCH_", "SLURM_JOB_", "TORCH_", "TORCHINDUCTOR_")
SHUTDOWN_TIMEOUT_S = 120
"""How long torchrun waits for ranks that were asked to stop: longer than a checkpoint takes to write."""
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


def torchrun_command(
    settings: RunSettings, rundir: RunDir, attempt: int, nodes: Nodes = ONE_NODE
) -> list[str]:
    """Arguments that start the workers of one attempt on this node.

    A crash ends the attempt (no restarts inside it): `motet resume` makes the next one from the last checkpoint. The first
    process writes to the terminal; the others are copied into the attempt's folder as well.
    """
    processes = settings.layout.processes
    copied = ",".join(f"{rank}:3" for rank in range(1, processes))
    logs = ["--log-dir", str(rundir.attempt(attempt) / "logs"), "--tee", copied] if copied else []
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *rendezvous_arguments(nodes, f"{settings.name}-{attempt}"),
        "--nproc-per-node",
        str(processes),
        "--max-restarts",
        "0",
        *logs,
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
