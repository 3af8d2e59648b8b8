"""What a testbed is made of, as text: names, addresses, the commands that make its network, Slurm's
files.

    host --- [ bridge a ] === link, shaped === [ bridge b ]
    controller  n1  n2                            n3  n4
              feature ib                        feature eth

Both bridges lie in one network namespace, which is the controller's host as well; each node is a
network namespace with one interface, `eth0`. Nothing here touches the machine.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from motet.slurm.errors import SlurmError

NODES: Mapping[str, str] = {"n1": "ib", "n2": "ib", "n3": "eth", "n4": "eth"}  # name -> feature
CONTROLLER = "ctl"
DEFAULT_FOLDER = "/var/lib/motet-testbed"  # only root can make it; /run may forbid to execute jobs
CPUS_PER_NODE = 4  # declared, whatever the machine has, so that several ranks fit
MEMORY_PER_NODE_MIB = 64_000  # declared as well; nothing enforces it
DEFAULT_RATE_MBIT = 1000.0
LEAST_RATE_MBIT, MOST_RATE_MBIT = 0.1, 100_000.0
LINK_LATENCY_MS = 400
"""Longest wait in the queue before it drops: enough for what several streams have on their way at
50 Mbit/s.
"""
SUBNETS = 256  # 198.18.0.0/16, of the addresses that RFC 2544 keeps for benchmarks
LONGEST_SOCKET_PATH = 107  # bytes of sun_path on Linux, less the final zero
CONTROLLER_PORT, NODE_PORT = 17817, 17818


@dataclass(frozen=True)
class BedNames:
    """Every name of the testbed in `folder`.

    They depend on the folder only, so a crash loses none of them.
    """

    folder: Path

    @property
    def tag(self) -> str:
        """Eight characters that tell this testbed from others of the machine."""
        return hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]

    def namespace(self, host: str) -> str:
        """Name of a host's network namespace, as `ip netns` lists it."""
        return f"motet-{self.tag}-{host}"

    @property
    def host_interface(self) -> str:
        """The machine's own interface to the testbed (15 characters at most)."""
        return f"mt{self.tag}"

    @property
    def hosts(self) -> tuple[str, ...]:
        """The controller, then the nodes."""
        return (CONTROLLER, *NODES)


@dataclass(frozen=True)
class Files:
    """Every path of a testbed."""

    folder: Path

    @property
    def marker(self) -> Path:
        """Record of the testbed; a folder that holds it is ours to empty."""
        return self.folder / "testbed.json"

    @property
    def etc(self) -> Path:
        """Configuration; nodes see it as /etc/slurm too, where that folder exists."""
        return self.folder / "etc"

    @property
    def slurm_conf(self) -> Path:
        return self.etc / "slurm.conf"

    @property
    def cgroup_conf(self) -> Path:
        return self.etc / "cgroup.conf"

    @property
    def hosts(self) -> Path:
        """What the hosts see as /etc/hosts."""
        return self.etc / "hosts"

    @property
    def munge(self) -> Path:
        return self.folder / "munge"

    @property
    def munge_socket(self) -> Path:
        return self.munge / "socket"

    @property
    def state(self) -> Path:
        """What the controller remembers."""
        return self.folder / "state"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def spool(self, node: str) -> Path:
        return self.folder / "spool" / node

    @property
    def folders(self) -> tuple[Path, ...]:
        """What must exist before a daemon starts (slurmd makes no spool folder)."""
        return (self.etc, self.munge, self.state, self.logs, *map(self.spool, NODES))


def address(subnet: int, host: str) -> str:
    """IPv4 address of a host; "" is the machine itself."""
    last = {"": 254, CONTROLLER: 1} | {node: 11 + i for i, node in enumerate(NODES)}
    return f"198.18.{subnet}.{last[host]}"


def check_rate(rate_mbit: float) -> None:
    """Raise SlurmError for a rate that the link cannot have."""
    if not LEAST_RATE_MBIT <= rate_mbit <= MOST_RATE_MBIT:
        raise SlurmError(
            f"rate {rate_mbit:g} Mbit/s: the link takes {LEAST_RATE_MBIT:g} to "
            f"{MOST_RATE_MBIT:,.0f}"
        )


def check_node(node: str) -> None:
    """Raise SlurmError for a node that there is not."""
    if node not in NODES:
        raise SlurmError(f"node {node!r}: the testbed has {', '.join(NODES)}")


def check_folder(files: Files) -> None:
    """Raise SlurmError for a name that slurm.conf cannot hold, or with which sockets' names get too
    long for the kernel.
    """
    if wrong := sorted(set(re.sub(r"[A-Za-z0-9/._+-]", "", str(files.folder)))):
        raise SlurmError(
            f"folder {str(files.folder)!r}: slurm.conf cannot hold {''.join(wrong)!r} in it; "
            "use letters, digits and ._+-"
        )
    sockets = (files.munge_socket, files.spool("n1") / "n1_1234567.4294967295")
    longest = max(len(str(path).encode()) for path in sockets)
    if longest > LONGEST_SOCKET_PATH:
        most = LONGEST_SOCKET_PATH - longest + len(str(files.folder).encode())
        raise SlurmError(f"folder {files.folder}: its name may have at most {most} bytes (sockets)")


def rate_commands(names: BedNames, rate_mbit: float) -> list[list[str]]:
    """Shape both directions of the link between the clusters with a token bucket (tc-tbf(8))."""
    burst_bytes = max(64 * 1024, int(rate_mbit * 1e6 / 8 / 250))  # a tick of a kernel with HZ=250
    bucket = ["rate", f"{rate_mbit * 1e6:.0f}bit", "burst", f"{burst_bytes}b"]
    bucket += ["latency", f"{LINK_LATENCY_MS}ms"]
    prefix = ["tc", "-n", names.namespace(CONTROLLER), "qdisc", "replace", "dev"]
    return [[*prefix, end, "root", "tbf", *bucket] for end in ("link-a", "link-b")]


def cut_command(names: BedNames, node: str, up: bool) -> list[str]:
    """Take the switch's end of a node's cable down, or up again."""
    state = "up" if up else "down"
    return ["ip", "-n", names.namespace(CONTROLLER), "link", "set", node, state]


def network_commands(names: BedNames, subnet: int, rate_mbit: float) -> list[list[str]]:
    """Make namespaces, bridges, cables and the shaped link, in this order."""
    inside = ["ip", "-n", names.namespace(CONTROLLER)]
    commands = [["ip", "netns", "add", names.namespace(host)] for host in names.hosts]
    commands += [[*inside, "link", "add", f"bridge-{side}", "type", "bridge"] for side in "ab"]
    commands += [[*inside, "link", "add", "link-a", "type", "veth", "peer", "name", "link-b"]]
    commands += [[*inside, "link", "set", f"link-{s}", "master", f"bridge-{s}"] for s in "ab"]
    for node, feature in NODES.items():
        peer = ["peer", "name", "eth0", "netns", names.namespace(node)]
        bridge = "bridge-a" if feature == "ib" else "bridge-b"
        own = ["ip", "-n", names.namespace(node)]
        commands += [
            [*inside, "link", "add", node, "type", "veth", *peer],
            [*inside, "link", "set", node, "master", bridge, "up"],
            [*own, "address", "add", f"{address(subnet, node)}/24", "dev", "eth0"],
            [*own, "link", "set", "eth0", "up"],
            [*own, "link", "set", "lo", "up"],
        ]
    peer = ["peer", "name", "machine", "netns", names.namespace(CONTROLLER)]
    commands += [
        ["ip", "link", "add", names.host_interface, "type", "veth", *peer],
        [*inside, "link", "set", "machine", "master", "bridge-a", "up"],
        [*inside, "address", "add", f"{address(subnet, CONTROLLER)}/24", "dev", "bridge-a"],
        ["ip", "address", "add", f"{address(subnet, '')}/24", "dev", names.host_interface],
        ["ip", "link", "set", names.host_interface, "up"],
    ]
    for device in ("lo", "bridge-a", "bridge-b", "link-a", "link-b"):
        commands += [[*inside, "link", "set", device, "up"]]
    return [*commands, *rate_commands(names, rate_mbit)]


def removal_commands(names: BedNames, made: Sequence[str]) -> list[list[str]]:
    """Remove what of the network is there: namespaces and the machine's interface, by name."""
    commands = [["ip", "link", "delete", n] for n in made if n == names.host_interface]
    namespaces = {names.namespace(host) for host in names.hosts}
    return commands + [["ip", "netns", "delete", n] for n in made if n in namespaces]


def enter_command(names: BedNames, files: Files, host: str) -> list[str]:
    """The words before a command that runs it on a host: its network, host name, /etc/hosts and
    /etc/slurm.

    Not `ip netns exec`, which mounts another /sys, without the cgroups that slurmd looks for.
    """
    mount = (
        'mount --bind "$2" /etc/hosts; [ ! -d /etc/slurm ] || mount --bind "$3" /etc/slurm; '
        'hostname "$1"; shift 3; exec "$@"'
    )
    net = f"--net=/run/netns/{names.namespace(host)}"
    here = [host, str(files.hosts), str(files.etc)]
    return ["nsenter", net, "unshare", "--uts", "--mount", "sh", "-ec", mount, "sh", *here]


def hosts_text(subnet: int) -> str:
    """/etc/hosts of every host of the testbed."""
    lines = ["127.0.0.1 localhost"]
    lines += [f"{address(subnet, host)} {host}" for host in (CONTROLLER, *NODES)]
    return "\n".join(lines) + "\n"


def cgroup_text(version: tuple[int, int]) -> str:
    """cgroup.conf: no cgroups where Slurm can do without (24.05), else none of systemd's."""
    return "CgroupPlugin=disabled\n" if version >= (24, 5) else "IgnoreSystemd=yes\n"


# Slurm's timeouts in s, short: a fault should be seen within seconds. Heterogeneous jobs start from
# the backfill scheduler only. A requeued job may start once its old credential has expired.
_SLURM_CONF = """\
# Written by `motet slurm testbed start`.
ClusterName=motet
SlurmctldHost={controller}({address})
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
StateSaveLocation={state}
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
AuthType=auth/munge
CredType=cred/munge
# A requeued job may start when the old credential has expired: 5 s instead of 120 s.
AuthInfo=socket={munge_socket},cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.txt
MailProg=/bin/true
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=6
KillWait=5
InactiveLimit=0
TCPTimeout=2
MessageTimeout=5
JobRequeue=1
# Heterogeneous jobs start from the backfill scheduler only: let it look every second.
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU={memory_per_cpu_mib}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
{nodes}
PartitionName=low {every} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=5
PartitionName=high {every} PriorityTier=10 PreemptMode=OFF
"""


def slurm_conf_text(files: Files, subnet: int) -> str:
    """slurm.conf: short timeouts, preemption by requeueing, no accounting database, no cgroups."""
    size = f"CPUs={CPUS_PER_NODE} Boards=1 SocketsPerBoard=1 CoresPerSocket={CPUS_PER_NODE} "
    size += f"ThreadsPerCore=1 RealMemory={MEMORY_PER_NODE_MIB}"
    nodes = "\n".join(
        f"NodeName={node} NodeAddr={address(subnet, node)} NodeHostname={node} Feature={feature} "
        f"{size}"
        for node, feature in NODES.items()
    )
    return _SLURM_CONF.format(
        controller=CONTROLLER,
        address=address(subnet, CONTROLLER),
        controller_port=CONTROLLER_PORT,
        node_port=NODE_PORT,
        state=files.state,
        folder=files.folder,
        munge_socket=files.munge_socket,
        memory_per_cpu_mib=MEMORY_PER_NODE_MIB // CPUS_PER_NODE,
        nodes=nodes,
        every=f"Nodes={','.join(NODES)} MaxTime=INFINITE State=UP",
    )
