from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from motet.core.files import atomic_write, write_json
from motet.launcher.runs.job_files import read_jobs
from motet.launcher.runs.rundir import RunDir
from motet.slurm.client import _QUEUE
from tests.imports import ROOT
from tests.slurm.fake import FakeSlurm
from tests.system.conftest import corpus as corpus
from tests.system.runs import MOTET, write_yaml

CANARY = "c4n4ry-5ecret"
GROUPS = "slurm.groups=[{nodes: 2, partition: a}, {nodes: 1, partition: b, processes: 2}]"


@pytest.fixture
def fake(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path / "bin")


@pytest.fixture
def yaml(tmp_path: Path, corpus: Path) -> Path:
    return write_yaml(
        tmp_path, corpus, "r", lambda text: text.replace("processes: 2", "processes: 1")
    )


def motet(fake: FakeSlurm, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**fake.environment(), "WANDB_API_KEY": CANARY, **more}
    return subprocess.run(
        [*MOTET, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=fake.folder.parent,
        env=environment,
    )


def jobs(run: Path) -> list[dict[str, object]]:
    return list(read_jobs(RunDir(run)))


def test_a_dry_run_prints_the_script_and_the_most_it_can_cost_and_makes_nothing(
    fake: FakeSlurm, yaml: Path
) -> None:
    done = motet(fake, "submit", str(yaml), "--dry-run", "slurm.time=12:30", "slurm.nodes=2")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --time=12:30\n" in done.stdout
    assert "at most 0.4167 node-hours (2 nodes x 0.2083 h)" in done.stdout
    assert "memory per rank" in done.stdout
    assert "Job 9 to start at 2030-01-01" in done.stdout
    assert not (yaml.parent / "runs").exists()
    (note,) = fake.asked()
    assert note["arguments"] == ["--test-only"]
    assert done.stdout.startswith(note["stdin"])


def test_a_dry_run_predicts_time_and_memory_where_it_knows_the_machines(
    fake: FakeSlurm, yaml: Path, tmp_path: Path
) -> None:
    asked = ("submit", str(yaml), "--dry-run", "slurm.time=30", "training.steps=100000000")
    blind = motet(fake, *asked)
    assert blind.returncode == 0, blind.stderr
    assert "not known: nothing says what these nodes are; set layout.cluster" in blind.stdout
    gpus = ("layout.device=cuda", "slurm.gpus_per_node=2", "slurm.gpu_type=nvidia_h100_80gb_hbm3")
    known = motet(fake, *asked, *gpus)
    assert known.returncode == 0, known.stderr
    assert "(h100 by its data sheet, 200 Gbit/s of network for each)" in known.stdout
    assert "over slurm.time: it takes about" in known.stdout
    assert "GiB on the fullest device" in known.stdout
    machines = tmp_path / "cluster.yaml"
    machines.write_text("groups: [{name: hall, device: a100-80, nodes: 1, devices_per_node: 4}]\n")
    told = motet(fake, *asked, f"layout.cluster={machines}")
    assert told.returncode == 0, told.stderr
    assert f"(machines of {machines})" in told.stdout


def test_a_dry_run_needs_no_slurm(yaml: Path, tmp_path: Path) -> None:
    done = motet(
        FakeSlurm(tmp_path / "empty", ()), "submit", str(yaml), "--dry-run", PATH=f"{tmp_path}"
    )
    assert done.returncode == 0, done.stderr
    assert "not asked: Slurm's commands are not on this machine" in done.stdout
    refused = motet(FakeSlurm(tmp_path / "empty", ()), "submit", str(yaml), PATH=f"{tmp_path}")
    assert refused.returncode == 2
    assert refused.stderr == "motet: sbatch is not on the PATH; is this a machine with Slurm?\n"


def test_a_submitted_run_has_its_folder_its_script_and_its_job(fake: FakeSlurm, yaml: Path) -> None:
    done = motet(fake, "submit", str(yaml), "metrics.wandb=offline", GROUPS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "4711"
    run = yaml.parent / "runs" / "r"
    (job,) = jobs(run)
    assert (job["job_id"], job["array_task"], job["resumed"]) == ("4711", None, False)
    command = json.loads((run / "slurm" / "command.json").read_text())
    assert command["groups"] == [{"nodes": 2, "processes": 1}, {"nodes": 1, "processes": 2}]
    assert (run / "code" / "motet" / "launcher" / "node.py").exists()
    assert (run / "wandb-run-id").exists() or list(run.glob("*wandb*"))
    last = fake.asked("sbatch")[-1]
    assert last["arguments"] == ["--parsable", str(run / "slurm" / "job.sbatch")]
    again = motet(fake, "submit", str(yaml))
    assert again.returncode == 2
    assert "exists" in again.stderr


def test_what_slurm_refuses_leaves_no_folder(fake: FakeSlurm, yaml: Path) -> None:
    fake.answer("sbatch", error="sbatch: error: QOS is over its limit\n", code=1)
    done = motet(fake, "submit", str(yaml))
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[-1] == "motet: sbatch says: sbatch: error: QOS is over its limit"
    )
    assert not (yaml.parent / "runs" / "r").exists()


def test_where_slurm_falls_silent_the_folder_stays_because_the_job_may_have_been_taken(
    fake: FakeSlurm, yaml: Path
) -> None:
    fake.answer("sbatch", error="sbatch: error: Unable to contact slurm controller\n", code=1)
    done = motet(fake, "submit", str(yaml))
    assert done.returncode == 2
    assert "motet resume" in done.stderr
    run = yaml.parent / "runs" / "r"
    assert (run / "manifest.json").exists()
    fake.answer("sbatch", "4712\n")
    again = motet(fake, "resume", str(run))
    assert again.returncode == 0, again.stderr
    assert [job["job_id"] for job in jobs(run)] == ["4712"], "it is submitted, not trained here"


def test_an_array_is_one_job_and_a_run_for_each_seed(fake: FakeSlurm, yaml: Path) -> None:
    done = motet(fake, "submit", str(yaml), "slurm.array=[1,5]", "slurm.array_limit=1")
    assert done.returncode == 0, done.stderr
    assert len([n for n in fake.asked("sbatch") if "--parsable" in n["arguments"]]) == 1
    for seed in (1, 5):
        run = yaml.parent / "runs" / f"r-seed{seed}"
        (job,) = jobs(run)
        assert (job["job_id"], job["array_task"]) == (f"4711_{seed}", seed)
        assert f"\nseed: {seed}\n" in (run / "resolved.yaml").read_text()
        assert "--array=1,5%1\n" in (run / "slurm" / "job.sbatch").read_text()


@pytest.mark.parametrize("groups", [[], [GROUPS]])
def test_the_jobs_of_a_chain_wait_for_each_other(
    fake: FakeSlurm, yaml: Path, groups: list[str]
) -> None:
    settings = ["slurm.chain=3", "slurm.dependency=[afterok:5]", *groups]
    done = motet(fake, "submit", str(yaml), *settings)
    assert done.returncode == 0, done.stderr
    asked = [n["arguments"] for n in fake.asked("sbatch") if "--parsable" in n["arguments"]]
    own = "afterany:4711" if groups else "singleton"
    waits = [a for arguments in asked for a in arguments if a.startswith("--dep")]
    assert waits == [f"--dependency=afterok:5,{own}"] * 2
    assert [job["resumed"] for job in jobs(yaml.parent / "runs" / "r")] == [False, True, True]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("slurm.partition=a b", "slurm.partition: 'a b' cannot be handed to Slurm"),
        ("slurm.time=1h", "slurm.time: '1h' cannot be handed to Slurm; it is a time"),
        ("slurm.groups=[{partition: 'x;id'}]", "slurm.groups.0.partition: 'x;id'"),
        ("slurm.environment=[NOT_THERE]", "NOT_THERE is not set in this shell"),
        ("slurm.environment=[MY_TOKEN=abc]", "MY_TOKEN sounds like a secret"),
        ("slurm.environment=[LD_PRELOAD=/x.so]", "with slurm.loader_variables=true"),
        ("slurm.secrets=[LD_PRELOAD=/x.so]", "LD_PRELOAD decides which code"),
        ("slurm.secrets=[MY_TOKEN=/nowhere]", "MY_TOKEN=/nowhere cannot be read"),
        ("slurm.time=4", "slurm.time: 4 is 240 s, but the run is told to stop 180 s before"),
        ("slurm.chain=2 slurm.array=[1,2]", "an array has no chain"),
        ("slurm.array=[1,1]", "names a seed twice"),
        ("slurm.mail_type=[END]", "slurm.mail_user: is missing"),
        ("slurm.gpus_per_node=1", "layout.device=cpu uses none"),
        ("slurm.nodes=3 layout.tp=2", "layout.tp"),
        ("slurm.nodes=2 layout.dp_shard=4", "but 2 are started"),
        ("runs=/tmp/a;b", "runs: '/tmp/a;b/r' cannot be handed to Slurm"),
        ("slurm.signal_s=5", "slurm.signal_s: 5 must be at least 30 seconds"),
        ("slurm.partitoin=x", "did you mean 'partition'"),
    ],
)
def test_a_bad_setting_is_one_clear_error_before_anything_is_asked(
    fake: FakeSlurm, yaml: Path, setting: str, words: str
) -> None:
    settings = [setting] if " b" in setting or "{" in setting else setting.split(" ")
    done = motet(fake, "submit", str(yaml), *settings)
    assert done.returncode == 2, done.stdout
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert fake.asked() == []
    assert not (yaml.parent / "runs").exists()


def test_partition_and_times_are_what_was_typed(fake: FakeSlurm, yaml: Path) -> None:
    text = yaml.read_text() + "slurm: {partition: no, account: 012, time: 12:30, qos: 1_0}\n"
    yaml.write_text(text)
    done = motet(fake, "submit", str(yaml), "--dry-run")
    assert done.returncode == 0, done.stderr
    for option in ("partition=no", "account=012", "time=12:30", "qos=1_0"):
        assert f"#SBATCH --{option}\n" in done.stdout


def test_a_value_of_the_environment_is_there_in_the_job_as_well(
    fake: FakeSlurm, yaml: Path, corpus: Path
) -> None:
    yaml.write_text(yaml.read_text().replace(str(corpus), '"${oc.env:MY_CORPUS}"'))
    done = motet(fake, "submit", str(yaml), "--dry-run", MY_CORPUS=str(corpus))
    assert done.returncode == 2
    assert "add MY_CORPUS to slurm.environment" in done.stderr
    named = "slurm.environment=[MY_CORPUS]"
    done = motet(fake, "submit", str(yaml), "--dry-run", named, MY_CORPUS=str(corpus))
    assert done.returncode == 0, done.stderr
    assert "SHELL,USER" in done.stdout
    assert "MY_CORPUS" in done.stdout
    assert f"={corpus}" not in done.stdout


def test_a_secret_goes_by_name_only(fake: FakeSlurm, yaml: Path) -> None:
    secret = yaml.parent / "key"
    secret.write_text(f"{CANARY}\n")
    os.chmod(secret, 0o644)
    names = ["slurm.environment=[WANDB_API_KEY]", f"slurm.secrets=[HF_TOKEN={secret}]"]
    refused = motet(fake, "submit", str(yaml), *names)
    assert refused.returncode == 2
    assert f"chmod 600 {secret}" in refused.stderr
    secret.chmod(0o600)
    dry = motet(fake, "submit", str(yaml), "--dry-run", *names)
    done = motet(fake, "submit", str(yaml), *names)
    assert done.returncode == 0, done.stderr
    printed = dry.stdout + dry.stderr + done.stdout + done.stderr + refused.stderr
    assert CANARY not in printed
    run = yaml.parent / "runs" / "r"
    holding = [p for p in run.rglob("*") if p.is_file() and CANARY.encode() in p.read_bytes()]
    assert holding == []
    assert all(CANARY not in str(note["arguments"]) + note["stdin"] for note in fake.asked())
    assert "WANDB_API_KEY" in (run / "slurm" / "job.sbatch").read_text()


def test_resume_submits_a_run_again_once_its_job_is_over(fake: FakeSlurm, yaml: Path) -> None:
    assert motet(fake, "submit", str(yaml), "slurm.time=10").returncode == 0
    run = RunDir(yaml.parent / "runs" / "r")
    line = "".join(v.ljust(w) for v, w in zip(("4711", "PENDING"), _QUEUE.values(), strict=False))
    fake.answer("squeue", line + "\n")
    done = motet(fake, "resume", str(run.root))
    assert done.returncode == 2
    assert "4711 (PENDING)" in done.stderr
    fake.answer("squeue", error="slurm_load_jobs error: Invalid job id specified\n", code=1)
    fake.answer("sbatch", "4800\n")
    array = motet(fake, "resume", str(run.root), "slurm.array=[1,2]")
    assert array.returncode == 2
    assert "makes new runs" in array.stderr
    run.cancelled.touch()
    write_json(run.attempt(1) / "attempt.json", {"attempt": 1, "reason": "running"})
    done = motet(fake, "resume", str(run.root), "slurm.time=20", "slurm.nodes=2")
    assert done.returncode == 0, done.stderr
    assert [job["job_id"] for job in jobs(run.root)] == ["4711", "4800"]
    assert jobs(run.root)[-1]["resumed"] is True
    script = run.job_script.read_text()
    assert "--time=20\n" in script
    assert "--nodes=2\n" in script
    assert not run.cancelled.exists()
    assert json.loads(run.job_command.read_text())["since_attempt"] == 2


def test_a_finished_run_is_not_submitted_again(fake: FakeSlurm, yaml: Path) -> None:
    assert motet(fake, "submit", str(yaml)).returncode == 0
    run = RunDir(yaml.parent / "runs" / "r")
    atomic_write(run.done, "24\n")
    done = motet(fake, "resume", str(run.root))
    assert done.returncode == 0
    assert "is finished" in done.stdout
    assert len(jobs(run.root)) == 1


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_resume_submits_nothing_when_a_class_of_ones_own_is_missing_or_changed(
    fake: FakeSlurm, yaml: Path, damage: str
) -> None:
    shutil.copy(ROOT / "examples" / "slogans.py", yaml.parent)
    yaml.write_text(f"{yaml.read_text()}    - {{name: s, use: 'slogans.py:Slogans'}}\n")
    assert motet(fake, "submit", str(yaml), "slurm.time=10").returncode == 0
    run = RunDir(yaml.parent / "runs" / "r")
    fake.answer("squeue", error="slurm_load_jobs error: Invalid job id specified\n", code=1)
    write_json(run.attempt(1) / "attempt.json", {"attempt": 1, "reason": "running"})
    kept = run.plugins / "slogans.py"
    if damage == "missing":
        kept.unlink()
    else:
        kept.write_text(kept.read_text() + "# later\n")
    asked = len(fake.asked("sbatch"))
    done = motet(fake, "resume", str(run.root))
    assert done.returncode == 2
    assert done.stderr.startswith("motet: experiments.s.use: is 'slogans.py:Slogans'; ")
    assert len(done.stderr.splitlines()) == 1
    assert len(fake.asked("sbatch")) == asked
    assert len(jobs(run.root)) == 1


def test_variables_of_the_loader_go_to_the_job_when_asked(fake: FakeSlurm, yaml: Path) -> None:
    asked = ["slurm.loader_variables=true", "slurm.environment=[LD_LIBRARY_PATH=/opt/a:/opt/b]"]
    done = motet(fake, "submit", str(yaml), *asked, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "export LD_LIBRARY_PATH=/opt/a:/opt/b\n" in done.stdout


@pytest.mark.parametrize("folder", ["my runs", "Läufe", "二 つ/実行", "re\u0301sultats"])
def test_runs_may_lie_in_folders_with_blanks_and_letters_of_any_script(
    fake: FakeSlurm, yaml: Path, folder: str
) -> None:
    runs = yaml.parent / folder
    done = motet(fake, "submit", str(yaml), f"runs={runs}", "--dry-run")
    assert done.returncode == 0, done.stderr
    output = f"{runs}/r/slurm/output-%j.txt"
    quoted = f'"{output}"' if " " in output else output
    assert f"#SBATCH --output={quoted}\n" in done.stdout
    assert f"run={shlex.quote(str(runs / 'r'))}\n" in done.stdout


@pytest.mark.parametrize("folder", ["a\u202eb", "a%jb", "a$HOME", 'a"b', "a\u2028b", "a\\b"])
def test_other_signs_in_a_folder_are_refused(fake: FakeSlurm, yaml: Path, folder: str) -> None:
    done = motet(fake, "submit", str(yaml), f"runs={yaml.parent / folder}", "--dry-run")
    assert done.returncode == 2
    assert "runs: " in done.stderr
    assert "letters, digits, blanks" in done.stderr


def test_a_grid_is_a_run_and_a_job_of_each_combination(fake: FakeSlurm, yaml: Path) -> None:
    grid = ("--grid", "training.optimizer.lr=1e-3,3e-3", "--grid", "slurm.nodes=1,2")
    names = [f"r-lr{lr}-nodes{n}" for lr in ("1e-3", "3e-3") for n in (1, 2)]
    dry = motet(fake, "submit", str(yaml), *grid, "slurm.time=30", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert all(name in dry.stdout for name in names)
    assert "at most 3 node-hours" in dry.stdout
    assert not (yaml.parent / "runs").exists()

    bad = motet(fake, "submit", str(yaml), "--grid", "training.optimizer.lr=1e-3,fast")
    assert bad.returncode == 2
    assert "training.optimizer.lr" in bad.stderr
    assert not (yaml.parent / "runs").exists()

    done = motet(fake, "submit", str(yaml), *grid, "slurm.time=30")
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines()[:4]] == names
    runs = [yaml.parent / "runs" / name for name in names]
    assert all(len(jobs(run)) == 1 for run in runs)
    assert "#SBATCH --nodes=2\n" in (runs[1] / "slurm" / "job.sbatch").read_text()
    assert "lr: 0.003" in (runs[3] / "resolved.yaml").read_text()
    assert "#   training.optimizer.lr=3e-3" in (runs[3] / "run.yaml").read_text()
    listed = motet(fake, "status")
    assert all(name in listed.stdout.replace("\n", "") for name in names)

    again = motet(fake, "submit", str(yaml), *grid, "slurm.time=30")
    assert again.returncode == 2
    assert "exists" in again.stderr
    here = motet(fake, "train", str(yaml), *grid)
    assert here.returncode == 2
    assert "`motet train` trains one run" in here.stderr
