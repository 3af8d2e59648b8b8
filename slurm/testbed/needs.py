"""What a testbed needs of the machine, what of it is missing, and how to get it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from motet.slurm.errors import SlurmError

# command -> Debian's and Ubuntu's package
COMMANDS = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "sbatch": "slurm-wlm",
    "scontrol": "slurm-wlm",
    "sinfo": "slurm-wlm",
    "munged": "munge",
    "ip": "iproute2",
    "tc": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "setsid": "util-linux",
    "mount": "mount",
    "hostname": "hostname",
}
SYSTEM_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/local/bin", "/usr/bin", "/bin")
CAP_NET_ADMIN, CAP_SYS_ADMIN = 12, 21  # capabilities(7)
VERSION_TIMEOUT_S = 20


def search_path() -> str:
    """PATH with the folders of system commands after it, where daemons lie."""
    known = [folder for folder in os.environ.get("PATH", "").split(":") if folder]
    return ":".join([*known, *(folder for folder in SYSTEM_FOLDERS if folder not in known)])


def missing() -> list[str]:
    """One line per missing thing, with what to do about it; empty when a testbed can start."""
    problems = []
    if os.geteuid() != 0:
        problems.append("it makes network namespaces, so it must be started as root (sudo)")
    elif lacking := _lacking_capabilities():
        problems.append(
            f"root lacks {', '.join(lacking)} here; in a container, start it with --privileged"
        )
    path = search_path()
    absent = [command for command in COMMANDS if shutil.which(command, path=path) is None]
    if absent:
        packages = " ".join(sorted({COMMANDS[command] for command in absent}))
        problems.append(f"no {', '.join(absent)} on PATH; apt-get install {packages}")
    return problems


def require() -> None:
    """Raise one SlurmError that names everything that is missing."""
    if problems := missing():
        raise SlurmError("a testbed cannot start here: " + "; ".join(problems))


def slurm_version() -> tuple[int, int]:
    """Year and month of the installed slurmctld, as (22, 5)."""
    program = shutil.which("slurmctld", path=search_path()) or "slurmctld"
    done = subprocess.run(
        [program, "-V"], capture_output=True, text=True, timeout=VERSION_TIMEOUT_S
    )
    match = re.search(r"(\d+)\.(\d+)", done.stdout)
    if match is None:
        raise SlurmError(f"slurmctld -V printed {done.stdout.strip()!r}, which is no version")
    return int(match[1]), int(match[2])


def _lacking_capabilities() -> list[str]:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    held = int(match[1], 16) if match else 0
    wanted = {"CAP_NET_ADMIN": CAP_NET_ADMIN, "CAP_SYS_ADMIN": CAP_SYS_ADMIN}
    return [name for name, bit in wanted.items() if not held >> bit & 1]
