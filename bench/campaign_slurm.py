"""What goes wrong on a cluster, on the testbed: cases of `bench/campaign.py --slurm`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from campaign_world import QUIET, Case, World, must, unlike

from motet.launcher.runs.rundir import RunDir
from motet.slurm.testbed import needs
from motet.slurm.testbed.bed import Testbed
from tests.slurm.bed_fixture import slurm
from tests.slurm.fault_runs import HELPER, INTERVAL, RANK, TORCHRUN, FaultRun, preempt, write_run

BED: list[Testbed] = []
FULL = """
import errno
import os
from pathlib import Path
from motet import Hook, HookContext

class Full(Hook):
    # The disk of the second node takes no more: its ledger's writes are refused.
    def before_step(self, context: HookContext) -> None:
        full = Path(context.settings.runs) / context.settings.name / "full"
        if context.rank != 1:
            return
        if not full.exists():
            return
        def write(file: int, content: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.write = write
"""


def bed(world: World) -> Testbed:
    """The testbed of this campaign, healed."""
    if not BED:
        must(not needs.missing(), f"not shown: {'; '.join(needs.missing())}")
        BED.append(Testbed(world.folder / "bed"))
        BED[0].start()
    BED[0].heal()
    return BED[0]


def stop() -> None:
    """End the testbed, if there is one."""
    while BED:
        BED.pop().stop()


def submitted(world: World, *settings: str) -> FaultRun:
    """A run of two nodes, one rank on each."""
    world.count += 1
    folder = world.folder / f"case-{world.count}"
    folder.mkdir()
    yaml = write_run(folder, world.corpus, "r")
    (folder / "full.py").write_text(FULL)
    return FaultRun.submitted(bed(world), yaml, QUIET, "slurm.nodes=2", *settings)


def judged(one: FaultRun, twin: RunDir) -> str:
    """Let it end, and compare."""
    one.finish()
    different = unlike(one.run, twin)
    must(not different, f"differs from its twin in {'; '.join(different)}")
    reasons = [str(facts["reason"]) for facts in one.attempts()]
    lost = [one.steps_lost(number) for number in range(2, len(reasons) + 1)]
    must(all(steps <= INTERVAL for steps in lost), f"steps trained again: {lost}")
    return f"equal; attempts {', '.join(reasons)}; steps again {sum(lost)}"


def case(name: str, fault: Callable[[FaultRun], object], again: bool = True) -> Case:
    """A fault in the middle of a run."""

    def act(world: World) -> str:
        twin = world.twin()
        one = submitted(world)
        one.until_step(13)
        fault(one)
        if again:
            one.until(lambda: one.trains_again(1), "it trains again")
        else:
            before = one.step()
            one.until_step(before + 2)
        return judged(one, twin)

    perfect = "equal to its twin, at most an interval trained again"
    return Case(name, "Slurm", perfect, act)


def cut(one: FaultRun) -> None:
    """Pull the cable of the first node; it is put back once the run trains elsewhere."""
    head = one.people(HELPER)[0].host
    one.bed.cut(head)
    one.until(lambda: one.trains_again(1), "it trains again, elsewhere")
    one.bed.mend(head)


def lost_in_a_save(one: FaultRun) -> None:
    """The second node is gone while a checkpoint is written."""
    host = one.people(HELPER)[1].host
    one.until(lambda: list(one.run.checkpoints.glob(".*.part")), "a save")
    one.bed.crash(host)
    one.until(lambda: one.trains_again(1), "it trains again, elsewhere")
    one.bed.mend(host)


def full(world: World) -> str:
    """One node's writes are refused; there is room again, and the run is resumed."""
    twin = world.twin()
    one = submitted(world, "training.hooks=['pace.py:Pace','full.py:Full']")
    one.until_step(13)
    marker = Path(one.run.root / "full")
    marker.touch()
    one.until(lambda: not slurm(one.bed, "squeue", "--noheader"), "the job ends by itself")
    reasons = [str(facts["reason"]) for facts in one.attempts()]
    marker.unlink()
    must(reasons == ["refused"], f"recorded as {reasons}")
    from tests.slurm.jobs import motet, output

    must("No space left on device" in output(one.run), output(one.run)[-500:])
    done = motet(one.bed, "resume", str(one.run.root))
    must(done.returncode == 0, done.stderr)
    one.until(one.run.done.exists, "the run ends")
    return f"ended with the reason ({', '.join(reasons)}); {judged(one, twin)}"


CASES = [
    case("preempted", lambda one: preempt(one.bed, one.run.root)),
    case("scontrol requeue", lambda one: slurm(one.bed, "scontrol", "requeue", one.job_id)),
    case("the cable of the first node is cut", cut),
    case("a node is lost while a checkpoint is written", lost_in_a_save),
    case("the controller is restarted", lambda one: one.bed.restart_controller(), again=False),
    case("kill -9 of a rank on the second node", lambda one: one.kill(RANK, 1)),
    case("kill -9 of torchrun on the first node", lambda one: one.kill(TORCHRUN)),
    Case(
        "the disk of one node is full",
        "Slurm",
        "one end with its reason; resumed, equal to its twin",
        full,
    ),
]
