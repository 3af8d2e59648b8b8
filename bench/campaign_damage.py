"""Damage to what an answer rests on, bad input of any size, and who may come in: cases of
`bench/campaign.py`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from campaign_kills import hand
from campaign_world import WAIT_S, Case, Trained, World, as_twin, must

from motet.core.files import read_json, sealed_text, write_json
from motet.experiments.scoring.store import probe_path
from motet.launcher.runs.rundir import RunDir
from tests.slurm.fault_runs import INTERVAL, RUN_YAML, STEPS
from tests.system.runs import MOTET, environment, motet_here

ROOT = Path(__file__).parents[1]
NAMED = "every command that uses it names it, exit code not 0"
LIMIT_S, LIMIT_MIB = 2.0, 1024
"""What a refusal may take: seconds of processor time, and memory."""


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def named(run: RunDir, word: str, *commands: tuple[str, ...]) -> str:
    """Each command refuses or warns with an exit code, and names the damage without a traceback."""
    for command in commands:
        done = motet_here(*command, str(run.root))
        text = " ".join((done.stdout + done.stderr).split())
        shown = f"{' '.join(command)}: exit {done.returncode}: {text[:400]}"
        must(done.returncode != 0 and word in text and "Traceback" not in text, shown)
    return f"{', '.join(command[0] for command in commands)} name it"


def bit(where: str, *commands: tuple[str, ...]) -> Case:
    """One bit in the first file of a pattern."""

    def act(world: World) -> str:
        run = world.copy(world.twin())
        path = sorted(run.root.glob(where))[0]
        flip(path)
        return named(run, path.name, *(commands or (("report",), ("verify",))))

    return Case(f"one bit of {where}", "damage", NAMED, act)


def zeroed(world: World) -> str:
    """One probe's scores are set to 0."""
    run = world.copy(world.twin())
    path = probe_path(run.probes, STEPS)
    with np.load(path) as arrays:
        kept = {name: arrays[name] for name in arrays.files}
    kept["canaries/logprob"] = np.zeros_like(kept["canaries/logprob"])
    with path.open("wb") as file:
        np.savez(file, **kept)
    return named(run, path.name, ("report",), ("verify",))


def renamed(world: World) -> str:
    """A checkpoint under another step's name."""
    run = world.copy(world.twin())
    steps = run.checkpoint_steps()
    shutil.rmtree(run.checkpoint(steps[-1]))
    shutil.copytree(run.checkpoint(steps[-2]), run.checkpoint(steps[-1]))
    return named(
        run,
        f"is that of step {steps[-2]}",
        ("experiments", "audit"),
        ("report",),
        ("export",),
        ("verify",),
    )


def edited(world: World) -> str:
    """A learning rate ten times as high, with a hash that fits, is trained on by nobody."""
    run = world.copy(world.twin())
    text = run.resolved_yaml.read_text().rpartition("# sha256")[0]
    other = re.sub(r"(?m)^(    lr:) .*", r"\1 0.03", text)
    must(other != text, "no lr in the settings")
    run.resolved_yaml.write_text(sealed_text(other))
    run.done.unlink()
    done = motet_here("resume", str(run.root), "--dry-run")
    told = done.stdout + done.stderr
    must(done.returncode == 2 and "lr" in told, f"exit {done.returncode}: {told[-400:]}")
    return "resume names training.optimizer.lr"


def manifest_edited(world: World) -> str:
    """A model with another norm."""
    run = world.copy(world.twin())
    facts = read_json(run.manifest)
    write_json(run.manifest, facts | {"model": facts["model"] | {"norm_eps": 1.0}})
    return named(run, "is of another run", ("export",), ("verify",))


def tokens(by_hand: bool) -> Callable[[World], str]:
    """Altered tokens of a corpus, times put back as `cp -p` would."""

    def act(world: World) -> str:
        run = half(world)
        path = next(world.corpus.glob("tokens-*.bin"))
        kept, times = path.read_bytes(), path.stat()
        flip(path)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        command = hand(run.run.root) if by_hand else [*MOTET, "resume", str(run.run.root)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=WAIT_S, env=environment()
            )
        finally:
            path.write_bytes(kept)
        told = done.stdout + done.stderr
        errors = "".join(p.read_text() for p in run.run.root.glob("attempts/*/error.txt"))
        must(path.name in told + errors, told[-500:])
        logged = (run.run.root / "metrics.jsonl").read_text().splitlines()
        must(len(logged) == run.known, "it trained")
        return f"exit {done.returncode}, names {path.name}, no step"

    return act


def half(world: World) -> Trained:
    """A copy of the twin as it was in the middle: its last half is gone."""
    twin = world.twin()
    run = world.copy(twin)
    one = Trained(run.root.parents[1] / "r.yaml")
    shutil.copy(twin.root.parents[1] / "r.yaml", one.yaml)
    shutil.copy(twin.root.parents[1] / "pace.py", one.yaml.parent)
    for step in run.checkpoint_steps():
        if step > STEPS // 2:
            shutil.rmtree(run.checkpoint(step))
    run.done.unlink()
    probe_path(run.probes, STEPS).unlink()
    one.known = len((run.root / "metrics.jsonl").read_text().splitlines())
    return one


def resumed(damage: Callable[[RunDir], object], told: str = "") -> Callable[[World], str]:
    """Damage that a resume goes around."""

    def act(world: World) -> str:
        one = stopped(world)
        damage(one.run)
        one.resume()
        must(told in one.said(), one.said()[-500:])
        return as_twin(one, world.twin())

    return act


def stopped(world: World) -> Trained:
    """A run that was stopped in the middle, after it was measured."""
    one = world.new()
    try:
        one.start()
        one.until_step(STEPS // 2 + 2)
        one.process.terminate()  # type: ignore[union-attr]
        one.ends(0)
        return one
    except BaseException:
        one.close()
        raise


def newest(run: RunDir) -> None:
    """A bit in the newest checkpoint's weights."""
    flip(next(run.checkpoint(run.checkpoint_steps()[-1]).glob("*.distcp")))


def at_resume(run: RunDir) -> None:
    """The probe file of the step that is gone on from: cut, and the checkpoints after it gone."""
    for step in run.checkpoint_steps():
        if step > STEPS // 2:
            shutil.rmtree(run.checkpoint(step))
    path = probe_path(run.probes, STEPS // 2)
    path.write_bytes(path.read_bytes()[:100])


def given_up(world: World) -> str:
    """A segment that was begun and says nothing, and that no checkpoint grew from: the proof goes
    without, `verify` names it and says what to do.
    """
    one = stopped(world)
    folder = one.run.ledger / "segment-00002"
    folder.mkdir()
    (folder / "segment.json").write_text('{"attempt": 2, "par')
    one.resume()
    audit = motet_here("experiments", "audit", str(one.run.root), "--replay")
    must(audit.returncode == 0 and "no part of this proof" in audit.stdout, audit.stdout[-500:])
    told = named(one.run, "take ledger/segment-00002 away", ("verify",))
    shutil.rmtree(folder)
    return f"audit passes without it, {told}; taken away: {as_twin(one, world.twin())}"


def of_the_lineage(world: World) -> str:
    """The segment that the weights grew from says nothing: its steps can no longer be proved, and
    that is what the audit says; nothing else is lost.
    """
    one = stopped(world)
    path = one.run.ledger / "segment-00001" / "segment.json"
    kept = path.read_text()
    path.write_text(kept[: len(kept) // 2])
    one.resume()
    told = named(
        one.run, "ledger/segment-00001/segment.json", ("experiments", "audit"), ("verify",)
    )
    path.write_text(kept)
    return f"resumed; {told}; put back from a copy: {as_twin(one, world.twin())}"


def all_damaged(world: World) -> str:
    """Every checkpoint is damaged: the run starts over by an explicit word only."""
    one = stopped(world)
    for step in one.run.checkpoint_steps():
        flip(next(one.run.checkpoint(step).glob("*.distcp")))
    codes = []
    for _ in range(2):
        one.start(0.0)
        codes.append(one.ends(1, 2))
    must("--from-start" in one.said(), one.said()[-500:])
    one.start(0.0, "--from-start")
    one.ends(0)
    return f"exit {codes[0]}, {codes[1]}; --from-start: {as_twin(one, world.twin())}"


COUNTED = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], capture_output=True, text=True, timeout=100)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([done.returncode, done.stdout + done.stderr, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))
"""


def asked(world: World, text: str, *words: str) -> tuple[int, str, float, float]:
    """(exit code, words, seconds of CPU, most MiB) of a dry run of a run.yaml."""
    folder = world.folder / f"case-{world.count}-input"
    folder.mkdir(exist_ok=True)
    (folder / "r.yaml").write_text(text)
    command = [sys.executable, "-c", COUNTED, *MOTET, "train", "r.yaml", "--dry-run", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment(), timeout=120
    )
    must(done.returncode == 0, f"no answer in 100 s: {done.stderr[-300:]}")
    code, said, cpu_s, mib = json.loads(done.stdout)
    return code, said, cpu_s, mib


def plain(world: World) -> str:
    """The run.yaml of all cases."""
    return RUN_YAML.format(
        name="r", corpus=world.corpus, steps=STEPS, interval=INTERVAL, processes=2
    ).replace(", hooks: ['pace.py:Pace']", "")


def refused(name: str, edit: Callable[[str], str], told: str, *words: str) -> Case:
    """A run.yaml that is refused at once, in words."""

    def act(world: World) -> str:
        code, said, cpu_s, mib = asked(world, edit(plain(world)), *words)
        shown = f"exit {code}, {cpu_s:.1f} s of CPU, {mib:.0f} MiB"
        must(code == 2 and told in said and "Traceback" not in said, f"{shown}: {said[-400:]}")
        must(cpu_s <= LIMIT_S and mib <= LIMIT_MIB, shown)
        return shown

    within = f"refused within {LIMIT_S:.0f} s of CPU and 1 GiB"
    return Case(name, "bad input", within, act)


def units(count: int) -> Callable[[str], str]:
    """So many canaries."""
    return lambda text: text.replace("count: 12", f"count: {count}")


def nested(levels: int, flow: bool) -> Callable[[str], str]:
    """Values inside each other."""
    if flow:
        return lambda text: text + f"\nnotes: {'[' * levels}{']' * levels}\n"
    return lambda text: text + "".join(f"\n{' ' * n}n{n}:" for n in range(levels)) + " 1\n"


def bomb(text: str) -> str:
    """Ten to the ninth values, by aliases."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    return "\n".join(lines) + "\n" + text


def long_word(world: World) -> str:
    """A corpus whose text is one word of 400 kB."""
    folder = world.folder / f"case-{world.count}-word"
    folder.mkdir()
    (folder / "word.txt").write_text("ab" * 200_000 + "\n" + "plain words follow here\n" * 50)
    began = time.monotonic()
    done = motet_here(
        "data",
        "prepare",
        str(folder / "word.txt"),
        "--output",
        str(folder / "out"),
        "--vocabulary-size",
        "512",
    )
    took_s = time.monotonic() - began
    must(
        done.returncode in (0, 2) and took_s < 20.0, f"exit {done.returncode} after {took_s:.0f} s"
    )
    return f"exit {done.returncode} after {took_s:.1f} s"


def weights(world: World) -> str:
    """A model to go on from whose weights are cut."""
    folder = world.folder / f"case-{world.count}-hf"
    folder.mkdir()
    run = world.copy(world.twin())
    done = motet_here("export", str(run.root), "--output", str(folder / "m"))
    must(done.returncode == 0, done.stderr)
    path = next((folder / "m").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    text = re.sub(r"model: \{.*\}", f"model: {{from_hf: {folder / 'm'}}}", plain(world))
    code, said, *_ = asked(world, text)
    must(code == 2 and path.name in said and "Traceback" not in said, f"exit {code}: {said[-400:]}")
    return f"exit {code}, names {path.name}, before start"


def shown_by(*nodes: str, long: bool) -> Callable[[World], str]:
    """What a test of the suite shows."""

    def act(world: World) -> str:
        mark = ["-m", "long or not long"] if long else []
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            *mark,
            *nodes,
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
        last = (done.stdout.strip().splitlines() or ["nothing"])[-1]
        must(done.returncode == 0 and "skipped" not in last, f"{last}: {done.stdout[-500:]}")
        return f"`{nodes[0]}`{' and more' * (len(nodes) > 1)} passes"

    return act


def suite(name: str, group: str, perfect: str, *nodes: str, long: bool = False) -> Case:
    """A case that is a test."""
    return Case(name, group, perfect, shown_by(*nodes, long=long))


ALONE, CHECKPOINT, MARKS = (
    "tests/system/test_alone.py",
    "tests/launcher/rank/test_checkpoint.py",
    "tests/core/test_marks.py",
)
EQUAL = "said or gone around; equal to its twin"
CASES: Sequence[Case] = [
    *(bit(f"ledger/segment-00001/{one}", ("report",), ("experiments", "audit"), ("verify",)) for one in ("rank-00000.bin", "segment.json")),
    *(bit(f"plan/{one}") for one in ("definition.json", "exposures.plan", "units/*")),
    bit("probes/step-*.npz"),
    bit("resolved.yaml", ("report",), ("resume",), ("export",)),
    bit("manifest.json", ("report",), ("resume", "--dry-run"), ("export",)),
    bit(f"checkpoints/step-{STEPS:08d}/manifest.json", ("report",), ("export",), ("experiments", "audit")),
    bit(f"checkpoints/step-{STEPS:08d}/*.distcp", ("export",), ("verify",)),
    bit("code/motet/launcher/*.py", ("verify",), ("resume", "--dry-run")),
    bit("metrics.jsonl"),
    Case("scores of a probe set to 0", "damage", NAMED, zeroed),
    Case("a checkpoint under another step's name", "damage", NAMED, renamed),
    Case("the learning rate edited, with a hash that fits", "damage", "refused", edited),
    Case("norm_eps edited in the manifest, with a hash that fits", "damage", NAMED, manifest_edited),
    Case("altered tokens, motet resume", "damage", "refused, names the file, no step", tokens(False)),
    Case("altered tokens, torchrun by hand", "damage", "refused, names the file, no step", tokens(True)),
    Case("the newest checkpoint is damaged", "damage", EQUAL, resumed(newest)),
    Case("every checkpoint is damaged", "damage", "refused twice; over again by an explicit word, equal to its twin", all_damaged),
    Case("a cut probe file at the step of a resume", "damage", EQUAL, resumed(at_resume)),
    Case("a cut segment.json", "damage", "the run goes on, equal to its twin; verify names it with what to do", given_up),
    Case("a cut segment.json of steps that count", "damage", "the run goes on; audit and verify name what is lost, and no more", of_the_lineage),
    suite("every file of a run x five damages x six commands", "damage", "0 tracebacks, 0 silent differences", "tests/launcher/runs/test_verify.py", long=True),
    refused("100,000 units that cannot fit", units(100_000), "100,000 units"),
    refused("1,000,000 units that cannot fit", units(1_000_000), "1,000,000 units"),
    refused("n_layers=100000000", str, "n_layers", "model.n_layers=100000000"),
    refused("10,000 levels of YAML, blocks", nested(10_000, False), "nested"),
    refused("10,000 levels of YAML, brackets", nested(10_000, True), "nested"),
    refused("a bomb of aliases", bomb, "unfolds to more than"),
    Case("one word of 400 kB", "bad input", "within 20 s", long_word),
    Case("from_hf with weights that are cut", "bad input", "refused before start, names the file", weights),
    suite("ports on one machine, and on two", "nobody in", "none on one, the ranks' alone on two", ALONE),
    suite("pickles in a checkpoint's index, classes changed, files that nobody lists", "nobody in", "refused, nothing runs", CHECKPOINT),
    suite("signs that command terminals", "nobody in", "shown as marks", MARKS),
    suite("secrets of the environment", "nobody in", "in no file", "tests/launcher/rank/test_wandb_mirror.py::test_a_secret_in_environment_or_arguments_is_nowhere_under_the_run"),
]  # fmt: skip
