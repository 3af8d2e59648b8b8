"""Kills, signals and clocks: cases of `bench/campaign.py`."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from campaign_world import ENGINES, WAIT_S, Case, Trained, World, as_twin, must

from tests.slurm.fault_runs import STEPS
from tests.system.runs import motet

AT = 13
"""Steps into the run: between two checkpoints."""
ITSELF = "goes on by itself; equal to its twin"
RESUMED = "ends alone, nobody left; resumed, equal to its twin"
Fault = Callable[[Trained], object]


def kill(pick: Callable[[Trained], list[int]]) -> Fault:
    """kill -9 of some processes."""

    def act(one: Trained) -> None:
        for pid in pick(one):
            os.kill(pid, signal.SIGKILL)

    return act


def everything(one: Trained) -> None:
    """kill -9 of the launcher, torchrun and all ranks, as when the power fails."""
    one.kill_all()


def tell(number: signal.Signals, times: int = 1, group: bool = False) -> Fault:
    """A signal to the launcher, or to all that it started as a terminal does."""

    def act(one: Trained) -> None:
        for _ in range(times):
            (os.killpg if group else os.kill)(one.pid, number)
            time.sleep(0.05)

    return act


def in_a_step(one: Trained) -> None:
    one.until_step(AT)


def in_a_save(one: Trained) -> None:
    one.until_step(AT)
    one.in_a_save()


def in_a_probe(one: Trained) -> None:
    """Half of the run is measured."""
    one.until_step(STEPS // 2)


def at_the_start(one: Trained) -> None:
    one.until(lambda: len(one.ranks()) == 2, "ranks are there")


def case(
    name: str,
    fault: Fault,
    when: Fault = in_a_step,
    itself: bool = False,
    codes: tuple[int, ...] = (0,),
    engine: str = "native",
    attempts: int = 0,
) -> Case:
    """A case of one fault at one moment.

    Args:
        itself: the launch goes on to the end; else it ends with one of `codes`, and is resumed.
        attempts: that it may take, 0 = any number.
    """

    def act(world: World) -> str:
        twin = world.twin(*ENGINES[engine], key=engine)
        one = world.new(*ENGINES[engine])
        with closing(one):
            one.start()
            when(one)
            fault(one)
            one.pace(0.0)
            code = one.ends(0) if itself else one.ends(*codes)
            if not (itself or one.run.done.exists()):
                one.resume()
            did = as_twin(one, twin)
            must(not attempts or len(one.attempts()) == attempts, f"{len(one.attempts())} attempts")
            return did if itself else f"exit {code}; {did}"

    group = "kills and signals" if engine == "native" else f"engine {engine}"
    return Case(name, group, ITSELF if itself else RESUMED, act)


def frozen(one: Trained) -> None:
    """A rank stands still for three seconds."""
    pid = one.ranks()[1]
    os.kill(pid, signal.SIGSTOP)
    time.sleep(3.0)
    os.kill(pid, signal.SIGCONT)


def second(one: Trained) -> None:
    """Somebody resumes a run that is being trained."""
    for pid in one.ranks():
        os.kill(pid, signal.SIGSTOP)
    done = motet("resume", str(one.run.root))
    for pid in one.ranks():
        os.kill(pid, signal.SIGCONT)
    must(done.returncode == 2 and "is being trained already" in done.stderr, done.stderr)


def many(world: World) -> str:
    """Five kills of anyone at any moment."""
    twin, one, killed = world.twin(), world.new(), []
    with closing(one):
        one.start()
        for _ in range(5):
            begun = one.step()
            one.until(lambda begun=begun: one.step() > begun, "it trains")
            saved = one.run.checkpoint_steps()
            one.until(lambda saved=saved: one.run.checkpoint_steps() != saved, "a checkpoint")
            time.sleep(world.rng.uniform(0.0, 1.0))
            who = world.rng.choice(["rank 0", "rank 1", "torchrun", "motet"])
            ranks = one.ranks()
            if len(ranks) < 2 or one.step() > STEPS - 12:
                break
            pid = {"torchrun": one.torchrun(), "motet": one.pid}.get(who) or ranks[who == "rank 1"]
            os.kill(pid, signal.SIGKILL)
            killed.append(who)
            if who in ("torchrun", "motet"):
                one.ends(0, 1, -9)
                one.start()
        one.pace(0.0)
        one.ends(0)
        return f"killed {', '.join(killed)}: {as_twin(one, twin)}"


BACK = """
import os, time
_now, _file = time.time, os.environ.get("CAMPAIGN_CLOCK", "")
time.time = lambda: _now() - (3600.0 if os.path.exists(_file) else 0.0)
"""
NO_LOCKS = """
import errno, fcntl, os
_flock = fcntl.flock
def flock(file, how):
    number = file if isinstance(file, int) else file.fileno()
    if "/runs/" in os.readlink(f"/proc/self/fd/{number}"):
        raise OSError(errno.ENOLCK, "No locks available")
    _flock(file, how)
fcntl.flock = flock
"""
"""Where runs are, nothing can be locked; elsewhere on the machine it can."""


def under(world: World, text: str, *settings: str) -> Trained:
    """A run whose processes all begin with some Python of ours."""
    one = world.new(*settings)
    site = one.yaml.parent / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(text)
    one.more = {"PYTHONPATH": f"{site}:{os.environ.get('PYTHONPATH', '')}"}
    one.more["CAMPAIGN_CLOCK"] = str(one.yaml.parent / "back")
    return one


def clock_back(world: World) -> str:
    """The clock goes back in the middle, and a rank is killed then."""
    one, twin = under(world, BACK), world.twin()
    with closing(one):
        one.start()
        one.until_step(AT)
        Path(one.more["CAMPAIGN_CLOCK"]).touch()
        one.until_step(AT + 4)
        os.kill(one.ranks()[1], signal.SIGKILL)
        one.until(lambda: len(one.attempts()) == 2, "it begins anew")
        one.until_step(AT + 12)
        os.kill(one.pid, signal.SIGTERM)
        one.ends(0)
        one.resume()
        return f"{as_twin(one, twin)}; attempts {', '.join(one.reasons())}"


LATE = """
import builtins, io, os, time
_stat, _mkdir, _listdir, _open, _made = os.stat, os.mkdir, os.listdir, io.open, set()
def late(path):
    # Whether others made a file so short a time ago that this machine does not show it yet.
    path = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
    if os.environ.get("RANK") != "1" or "/runs/r/" not in path or path in _made:
        return False
    try:
        age_s = time.time() - _stat(path).st_ctime
        return age_s < (25.0 if os.path.exists(os.environ["CAMPAIGN_CLOCK"]) else 3.0)
    except OSError:
        return False
def hidden(path):
    if late(path):
        raise FileNotFoundError(2, "No such file or directory", path)
def stat(path, *words, **more):
    hidden(path)
    return _stat(path, *words, **more)
def opened(file, mode="r", *words, **more):
    if any(c in mode for c in "wxa"):
        _made.add(os.fsdecode(file) if not isinstance(file, int) else "")
    elif not isinstance(file, int):
        hidden(file)
    return _open(file, mode, *words, **more)
def mkdir(path, *words, **more):  # the server says that it is there, and it is looked up anew
    _made.add(os.fsdecode(path))
    _mkdir(path, *words, **more)
def listdir(path="."):
    return [name for name in _listdir(path) if not late(os.path.join(os.fsdecode(path), name))]
os.stat, os.listdir, os.mkdir, io.open, builtins.open = stat, listdir, mkdir, opened, opened
"""
"""Rank 1 sees files and folders of others 3 seconds after they were last changed, then 25."""


def seen_late(world: World) -> str:
    """Ranks of other machines see new files late, as on NFS; and a rank is killed right after a
    checkpoint.
    """
    one, twin = under(world, LATE), world.twin()
    with closing(one):
        one.start()
        one.until(lambda: 20 in one.run.checkpoint_steps(), "a checkpoint")
        Path(one.more["CAMPAIGN_CLOCK"]).touch()
        os.kill(one.ranks()[0], signal.SIGKILL)
        one.pace(0.0)
        one.ends(0)
        must(not list(one.run.checkpoints.glob("*damaged*")), "a checkpoint was given up")
        must(one.attempts()[-1]["start_step"] == 20, "it went on from an older checkpoint")
        return as_twin(one, twin)


def without_locks(world: World) -> str:
    """flock fails with ENOLCK on the file system of the runs, in every process."""
    one, twin = under(world, NO_LOCKS), world.twin()
    with closing(one):
        one.start()
        in_a_step(one)
        kill(lambda one: one.ranks()[1:])(one)
        one.pace(0.0)
        one.ends(0)
        return as_twin(one, twin)


def other_ranks(world: World) -> str:
    """Killed, and resumed on one rank: sums are in another order, tokens are not."""
    one, twin = world.new(), world.twin()
    with closing(one):
        one.start()
        in_a_step(one)
        everything(one)
        one.ends(-9)
        one.resume("layout.processes=1")
        from campaign_world import numbers_of

        mine, theirs = numbers_of(one.run), numbers_of(twin)
        must(mine.keys() == theirs.keys(), "steps are missing")
        worst = max(abs(mine[step][0] / theirs[step][0] - 1) for step in theirs)
        must(worst < 1e-5, f"losses differ by {worst:.1e}")
        done = motet("experiments", "audit", str(one.run.root), "--replay")
        must(done.returncode == 0, done.stdout + done.stderr)
        return f"audit passes; losses within {worst:.0e}"


def bad_steps(world: World) -> str:
    """A run that is rolled back, killed: equal to one that is rolled back and not killed."""
    settings = ["training.bad_steps.spike_sigma=0.3", "training.bad_steps.window=8"]
    settings += ["training.bad_steps.most=1000", "training.bad_steps.policy=rollback"]
    twin, one = world.twin(*settings, key="rollback"), world.new(*settings)
    with closing(one):
        one.start()
        in_a_step(one)
        os.kill(one.ranks()[0], signal.SIGKILL)
        one.pace(0.0)
        one.ends(0)
        return as_twin(one, twin)


def by_hand(world: World) -> str:
    """torchrun by hand, killed at once, and once more by hand."""
    one, twin = world.new(), world.twin()
    with closing(one):
        one.start()
        in_a_step(one)
        everything(one)
        one.ends(-9)
        one.pace(0.0)
        done = subprocess.run(hand(one.run.root), capture_output=True, text=True, timeout=WAIT_S)
        must(done.returncode == 0, done.stderr[-800:])
        return as_twin(one, twin)


def hand(root: Path) -> list[str]:
    """How the README starts ranks by hand."""
    worker = ["-m", "motet.launcher.worker", str(root)]
    return ["torchrun", "--standalone", "--nproc-per-node", "2", *worker]


ranks, first, other = (
    kill(lambda one: one.ranks()),
    kill(lambda one: one.ranks()[:1]),
    kill(lambda one: one.ranks()[1:]),
)
CASES = [
    case("kill -9 of rank 0", first, itself=True, attempts=2),
    case("kill -9 of rank 1", other, itself=True, attempts=2),
    case("kill -9 of all ranks", ranks, itself=True, attempts=2),
    case("kill -9 of rank 1 while a checkpoint is written", other, in_a_save, itself=True),
    case("kill -9 of rank 0 while units are measured", first, in_a_probe, itself=True),
    case("kill -9 of rank 0 before the first step", first, at_the_start, itself=True),
    case("kill -9 of torchrun", kill(lambda one: [one.torchrun()])),
    case("kill -9 of motet", kill(lambda one: [one.pid]), codes=(-9,)),
    case("kill -9 of everything at once", everything, codes=(-9,)),
    case(
        "kill -9 of everything while a checkpoint is written",
        everything,
        in_a_save,
        codes=(-9,),
    ),
    case("SIGTERM to motet", tell(signal.SIGTERM)),
    case("SIGTERM twice", tell(signal.SIGTERM, 2)),
    case("SIGTERM before the first step", tell(signal.SIGTERM), at_the_start),
    case("SIGTERM while a checkpoint is written", tell(signal.SIGTERM), in_a_save),
    case("SIGTERM while units are measured", tell(signal.SIGTERM), in_a_probe),
    case("SIGTERM to one rank", lambda one: os.kill(one.ranks()[1], signal.SIGTERM)),
    case("Ctrl-C", tell(signal.SIGINT, group=True)),
    case("Ctrl-C twice", tell(signal.SIGINT, 2, group=True), codes=(0, 1, 130, -2)),
    case("SIGHUP to all, as a terminal that closes", tell(signal.SIGHUP, group=True)),
    case("a rank stands still for 3 s (SIGSTOP)", frozen, itself=True, attempts=1),
    case("a second resume while it trains", second, itself=True, attempts=1),
    Case("five kills of anyone at random moments", "kills and signals", "equal to its twin", many),
    Case(
        "killed, resumed on another number of ranks",
        "kills and signals",
        "tokens proved, losses within 1e-5",
        other_ranks,
    ),
    Case(
        "killed in a run that rolls back",
        "kills and signals",
        "equal to a twin that rolls back",
        bad_steps,
    ),
    Case("killed, torchrun by hand", "kills and signals", "equal to its twin", by_hand),
    Case(
        "the clock goes back an hour, then a kill and a stop",
        "disks and clocks",
        "equal to its twin",
        clock_back,
    ),
    Case(
        "a file system that shows new files late to one rank, and a kill",
        "disks and clocks",
        "waited for; equal to its twin",
        seen_late,
    ),
    Case(
        "a file system without flock, and a kill",
        "disks and clocks",
        "equal to its twin",
        without_locks,
    ),
    *(
        one
        for engine in ("deepspeed", "accelerate")
        for one in (
            case(f"{engine}: kill -9 of a rank", other, itself=True, engine=engine),
            case(
                f"{engine}: kill -9 of motet",
                kill(lambda one: [one.pid]),
                codes=(-9,),
                engine=engine,
            ),
            case(
                f"{engine}: kill -9 of everything while a checkpoint is written",
                everything,
                in_a_save,
                codes=(-9,),
                engine=engine,
            ),
            case(f"{engine}: SIGTERM", tell(signal.SIGTERM), engine=engine),
        )
    ),
]
