"""A private Slurm of four nodes on one machine: start, break, mend, stop.

It touches nothing of the machine but its own folder, five network namespaces and one interface, all
named after the
folder: a testbed that was killed is found again by its names, and `stop` or the next `start`
removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shlex
import signal
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from motet.slurm.errors import SlurmError
from motet.slurm.testbed import disk, needs, processes, shape
from motet.slurm.testbed.processes import Inhabitant, run, wait_for

MACHINE_LOCK = Path("/run/motet-testbed.lock")  # one start at a time, so that subnets differ
START_WAIT_S = 30.0
BIRTH_S = 5.0  # a daemon that is not alive after this will not come
STOP_WAIT_S = 10.0
HEAL_WAIT_S = 60.0
READY = ("idle", "mixed", "allocated", "completing")
DAEMONS = ("munged", "slurmctld", "slurmd")


class Testbed:
    """The testbed in a folder; making the object starts nothing.

    All methods raise SlurmError for users.
    """

    __test__ = False  # no class of tests, in spite of its name

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.names = shape.BedNames(self.folder)
        self.files = shape.Files(self.folder)

    # --- start and stop ---

    def plan(self, rate_mbit: float = shape.DEFAULT_RATE_MBIT) -> str:
        """The commands that make the network, and slurm.conf; the subnet is the first that `start`
        tries.
        """
        shape.check_rate(rate_mbit)
        shape.check_folder(self.files)
        subnet = int(self.names.tag, 16) % shape.SUBNETS
        commands = shape.network_commands(self.names, subnet, rate_mbit)
        lines = "\n".join(shlex.join(command) for command in commands)
        return f"{lines}\n\n{shape.slurm_conf_text(self.files, subnet)}"

    def start(self, rate_mbit: float = shape.DEFAULT_RATE_MBIT) -> None:
        """Start everything and wait until every node is idle.

        One that runs is left as it is, but for its rate.
        """
        needs.require()
        shape.check_rate(rate_mbit)
        disk.check_ours(self.files)
        with _machine_lock():
            if self.running:
                self.set_rate(rate_mbit)
                return
            self._remove()
            try:
                self._build(rate_mbit)
            except BaseException as error:
                told = disk.log_errors(self.files)
                self._remove()
                if isinstance(error, SlurmError) and told:
                    raise SlurmError(f"{error}\n{told}") from None
                raise

    def stop(self) -> None:
        """End every process on the testbed's hosts and remove its network; logs and job records
        stay.
        """
        needs.require()
        with _machine_lock():
            daemons = [who for who in self._people() if _is_daemon(who)]
            processes.send(daemons, signal.SIGTERM)  # slurmctld saves its state
            ours = {who.pid for who in daemons}
            wait_for(lambda: not ours & {w.pid for w in self._people()}, STOP_WAIT_S)
            self._remove()

    @property
    def running(self) -> bool:
        """Whether every daemon is alive."""
        return set(self.pids()) == {"munged", *self.names.hosts}

    def pids(self) -> dict[str, int]:
        """Process id of each daemon that is alive: "munged", "ctl" (slurmctld), and slurmd by its
        node.
        """
        daemons = [who for who in self._people() if _is_daemon(who)]
        return {"munged" if w.name == "munged" else w.host: w.pid for w in daemons}

    def leftovers(self) -> list[str]:
        """What of this testbed is on the machine now: processes, namespaces, interface."""
        return [str(who) for who in self._people()] + self._made()

    # --- what users and tests need to use it ---

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes."""
        return tuple(shape.NODES)

    def address(self, host: str) -> str:
        """IPv4 address of a node, or of "ctl"."""
        return shape.address(self._record()["subnet"], host)

    def environment(self) -> dict[str, str]:
        """Variables with which Slurm's commands talk to this testbed."""
        return {"SLURM_CONF": str(self.files.slurm_conf), "PATH": needs.search_path()}

    def enter(self, host: str) -> list[str]:
        """Words before a command that runs it on a node: its network, host name, /etc/hosts."""
        if host != shape.CONTROLLER:
            shape.check_node(host)
        return shape.enter_command(self.names, self.files, host)

    def inhabitants(self) -> list[Inhabitant]:
        """Every process on a node that is not its daemon: what jobs run, or left behind."""
        return [w for w in self._people() if not _is_daemon(w) and w.host != shape.CONTROLLER]

    def node_states(self) -> dict[str, str]:
        """State of each node in Slurm's words: "idle", "mixed", "down*" (no answer), ..."""
        lines = self._slurm("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines()
        return dict(line.split() for line in lines)

    @property
    def rate_mbit(self) -> float:
        """Rate of the link between the clusters, Mbit/s."""
        return float(self._record()["rate_mbit"])

    # --- break and mend ---

    def set_rate(self, rate_mbit: float) -> None:
        """Shape the link between the clusters to this rate in Mbit/s, in each direction."""
        shape.check_rate(rate_mbit)
        record = self._record()
        for command in shape.rate_commands(self.names, rate_mbit):
            _system(command)
        disk.write_record(self.files, {**record, "rate_mbit": rate_mbit})

    def cut(self, node: str) -> None:
        """Pull a node's network cable; its processes live on."""
        shape.check_node(node)
        self._record()
        _system(shape.cut_command(self.names, node, up=False))

    def crash(self, host: str = shape.CONTROLLER) -> None:
        """SIGKILL everything on a node as if its power failed, or the controller's slurmctld."""
        if host == shape.CONTROLLER:
            self.stop_controller(kill=True)
            return
        shape.check_node(host)
        processes.kill_all(lambda: self._people(host))

    def mend(self, node: str) -> None:
        """Put the cable back, start slurmd anew, and wait until Slurm takes the node again."""
        shape.check_node(node)
        self._record()
        _system(shape.cut_command(self.names, node, up=True))
        self._end_daemon(node, signal.SIGTERM)
        since = datetime.now(UTC).replace(microsecond=0, tzinfo=None)
        self._start_slurmd(node)
        ready = wait_for(lambda: self._is_ready(node, since), START_WAIT_S, poll_s=0.1)
        if not ready:
            state = self.node_states().get(node, "unknown")
            told = disk.log_errors(self.files)
            raise SlurmError(f"{node} is {state} after {START_WAIT_S:.0f} s\n{told}")

    def stop_controller(self, kill: bool = False) -> None:
        """End slurmctld: asked, so that it saves its state, or by SIGKILL."""
        record = self._record()
        disk.write_record(self.files, {**record, "killed": kill or record.get("killed", False)})
        self._end_daemon(shape.CONTROLLER, signal.SIGKILL if kill else signal.SIGTERM)

    def restart_controller(self) -> None:
        """Start slurmctld from its saved state (ending it first when it runs) and wait until it
        answers.

        Slurm uses the nodes again when it has asked them, about 4 s later; until then they are
        "unknown".
        """
        self.stop_controller()
        self._start_slurmctld()
        if not wait_for(self._answers, START_WAIT_S, poll_s=0.05):
            raise SlurmError(
                f"slurmctld gives no answer in {START_WAIT_S:.0f} s; {disk.log_errors(self.files)}"
            )

    def heal(self) -> list[Inhabitant]:
        """Undo all of the above and cancel every job; returns the strays that outlived their jobs,
        now killed.
        """
        if shape.CONTROLLER not in self.pids():
            self.restart_controller()
        if self.rate_mbit != shape.DEFAULT_RATE_MBIT:
            self.set_rate(shape.DEFAULT_RATE_MBIT)
        self._slurm("scancel", "--user=root")
        for node in self._broken_nodes():
            self.mend(node)
        if not wait_for(self._is_quiet, HEAL_WAIT_S, poll_s=0.2):
            queue = self._slurm("squeue", "--noheader")
            raise SlurmError(f"jobs that do not end: {queue}; nodes: {self.node_states()}")
        wait_for(lambda: not self.inhabitants(), 2.0)
        strays = self.inhabitants()
        processes.kill_all(self.inhabitants)
        if self._record().get(
            "killed"
        ):  # it may have forgotten a job, and would give its number again,
            self.stop()  # which a slurmd may refuse for long
            self.start()
        return strays

    # --- how ---

    def _build(self, rate_mbit: float) -> None:
        version, subnet = needs.slurm_version(), _free_subnet(self.names.tag)
        disk.write(self.files, {"subnet": subnet, "rate_mbit": rate_mbit}, version)
        for command in shape.network_commands(self.names, subnet, rate_mbit):
            _system(command)
        self._start_munged()
        self._start_slurmctld()
        for node in self.nodes:
            self._start_slurmd(node)
        began_s = time.monotonic()

        def over() -> bool:
            tried = time.monotonic() - began_s > BIRTH_S
            return (self._answers() and not self._not_idle()) or (tried and not self.running)

        if not wait_for(over, START_WAIT_S, 0.05) or not self.running:
            raise SlurmError(f"Slurm did not start; alive: {', '.join(self.pids()) or 'nothing'}")

    def _start_munged(self) -> None:
        munge = self.files.munge
        command = ["munged", "--foreground", "--force", f"--socket={self.files.munge_socket}"]
        command += [f"--key-file={munge / 'key'}", f"--pid-file={munge / 'pid'}"]
        command += [f"--seed-file={munge / 'seed'}", f"--log-file={munge / 'log'}"]
        self._start(shape.CONTROLLER, command, "munged")
        if not wait_for(self.files.munge_socket.exists, START_WAIT_S):
            raise SlurmError(f"munged made no socket in {START_WAIT_S:.0f} s")

    def _start_slurmctld(self) -> None:
        log = self.files.logs / "slurmctld.log"
        command = ["slurmctld", "-D", "-f", str(self.files.slurm_conf), "-L", str(log)]
        self._start(shape.CONTROLLER, command, "slurmctld")

    def _start_slurmd(self, node: str) -> None:
        log = self.files.logs / f"slurmd-{node}.log"
        command = ["slurmd", "-D", "-N", node, "-f", str(self.files.slurm_conf), "-L", str(log)]
        self._start(node, command, f"slurmd-{node}")

    def _start(self, host: str, command: list[str], name: str) -> None:
        environment = {**self.environment(), "LC_ALL": "C"}
        log = self.files.logs / f"{name}.out"
        processes.start_daemon([*self.enter(host), *command], log, environment)

    def _end_daemon(self, host: str, number: signal.Signals) -> None:
        """End the Slurm daemon of a host and wait for its end; SIGKILL when it takes too long."""

        def alive() -> list[Inhabitant]:
            return [w for w in self._people(host) if _is_daemon(w) and w.name != "munged"]

        processes.send(alive(), number)
        if not wait_for(lambda: not alive(), STOP_WAIT_S):
            processes.kill_all(alive)

    def _remove(self) -> None:
        """End what lives on our hosts, however it got there, and take the network away."""
        processes.kill_all(self._people)
        for command in shape.removal_commands(self.names, self._made()):
            _system(command)

    def _made(self) -> list[str]:
        """Our namespaces and our interface, those that exist."""
        namespaces = [self.names.namespace(host) for host in self.names.hosts]
        made = [name for name in namespaces if (processes.NAMESPACES / name).exists()]
        interface = Path("/sys/class/net") / self.names.host_interface
        return [*made, *([interface.name] if interface.exists() else [])]

    def _people(self, host: str | None = None) -> list[Inhabitant]:
        hosts = self.names.hosts if host is None else (host,)
        return processes.inhabitants({h: self.names.namespace(h) for h in hosts})

    def _answers(self) -> bool:
        """Whether slurmctld takes a connection (Slurm's commands wait long when it does not)."""
        try:
            place = (self.address(shape.CONTROLLER), shape.CONTROLLER_PORT)
            socket.create_connection(place, timeout=1).close()
        except OSError:
            return False
        return True

    def _not_idle(self) -> list[str]:
        states = self.node_states()
        return [node for node in self.nodes if states.get(node) != "idle"]

    def _broken_nodes(self) -> list[str]:
        """Nodes that are cut, have no slurmd, or that Slurm does not take."""
        alive, states = self.pids(), self.node_states()
        return [
            node
            for node in self.nodes
            if node not in alive or states.get(node) not in READY or not self._has_link(node)
        ]

    def _has_link(self, node: str) -> bool:
        inside = self.names.namespace(shape.CONTROLLER)
        return "state UP" in _system(["ip", "-n", inside, "link", "show", node])

    def _is_ready(self, node: str, since: datetime) -> bool:
        """Whether Slurm takes the node with its slurmd of now; a node put down or drained is put
        back.
        """
        if not self._answers():
            return False
        told = self._slurm("scontrol", "--oneliner", "show", "node", node)
        started = re.search(r"SlurmdStartTime=(\d{4}-\S+)", told)
        if started is None or datetime.fromisoformat(started[1]) < since:
            return False
        state = self.node_states().get(node, "")
        if state.startswith(("down", "drain")) and not state.endswith("*"):
            with contextlib.suppress(SlurmError):
                self._slurm("scontrol", "update", f"nodename={node}", "state=resume")
        return state in READY

    def _is_quiet(self) -> bool:
        """Whether all is idle; cancels what is not, again and again: a job may requeue itself when
        it is asked to end.
        """
        if not self._slurm("squeue", "--noheader").strip():
            return not self._not_idle()
        self._slurm("scancel", "--user=root")
        return False

    def _slurm(self, *command: str) -> str:
        self._record()
        return run(command, {**self.environment(), "LC_ALL": "C", "TZ": "UTC"})

    def _record(self) -> dict[str, Any]:
        """What `start` chose; SlurmError when nothing was started since the machine was."""
        if not self.files.marker.exists() or not self._made():
            raise SlurmError(
                f"no testbed runs in {self.folder}; `motet slurm testbed start` does it"
            )
        return disk.read_record(self.files)


def _is_daemon(who: Inhabitant) -> bool:
    return who.leads and who.name in DAEMONS


def _system(command: list[str]) -> str:
    """Run a command of the system's folders (root's PATH may lack them)."""
    return run(command, {"PATH": needs.search_path(), "LC_ALL": "C"})


def _free_subnet(tag: str) -> int:
    """A number from the tag that no interface here uses as its third byte of 198.18.*.*."""
    used = _system(["ip", "-oneline", "-4", "address", "show"])
    first = int(tag, 16)
    for subnet in ((first + i) % shape.SUBNETS for i in range(shape.SUBNETS)):
        if f" 198.18.{subnet}." not in used:
            return subnet
    raise SlurmError(f"all {shape.SUBNETS} networks of 198.18.0.0/16 are in use")


@contextlib.contextmanager
def _machine_lock() -> Iterator[None]:
    """Held while a testbed is started or stopped, whichever it is."""
    descriptor = os.open(MACHINE_LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
