from __future__ import annotations

import os
from pathlib import Path

import pytest

from motet.core.jobs import JobState
from motet.slurm.client import MOST_IDS, Client
from motet.slurm.errors import SlurmError, SlurmUnreachable
from tests.slurm.fake import FakeSlurm

WIDTHS = (40, 24, 12, 24, 24, 64, 96, 1024, 256)


def queue_line(*values: str) -> str:
    return "".join(v.ljust(w) for v, w in zip(values, WIDTHS, strict=True)) + "\n"


@pytest.fixture
def fake(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path / "bin")


@pytest.fixture
def client(fake: FakeSlurm) -> Client:
    return Client(fake.environment())


def test_a_submitted_script_has_an_id(fake: FakeSlurm, client: Client, tmp_path: Path) -> None:
    assert client.submit(tmp_path / "job.sbatch", ["--dependency=singleton"]) == "4711"
    fake.answer("sbatch", "4712;cluster\n")
    assert client.submit(tmp_path / "job.sbatch") == "4712"
    arguments = fake.asked("sbatch")[0]["arguments"]
    assert arguments == ["--parsable", "--dependency=singleton", str(tmp_path / "job.sbatch")]


def test_a_refusal_is_told_in_slurms_words(fake: FakeSlurm, client: Client, tmp_path: Path) -> None:
    fake.answer("sbatch", error="sbatch: error: invalid partition specified: x\n", code=1)
    with pytest.raises(SlurmError, match=r"sbatch says: .*invalid partition") as caught:
        client.submit(tmp_path / "job.sbatch")
    assert not isinstance(caught.value, SlurmUnreachable)
    fake.answer("sbatch", "hello\n")
    with pytest.raises(SlurmError, match="no job id"):
        client.submit(tmp_path / "job.sbatch")


def test_a_controller_that_is_down_is_no_refusal(fake: FakeSlurm, client: Client) -> None:
    down = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n"
    fake.answer("squeue", error=down, code=1)
    with pytest.raises(SlurmUnreachable, match="Unable to contact"):
        client.queue(["1"])


def test_a_command_that_hangs_is_given_up(
    fake: FakeSlurm, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("motet.slurm.client.READ_TIMEOUT_S", 0.3)
    fake.answer("squeue", wait_s=30)
    with pytest.raises(SlurmUnreachable, match=r"no answer in 0\.3 s"):
        client.queue()


def test_one_call_asks_for_all_jobs_and_joins_components(fake: FakeSlurm, client: Client) -> None:
    lines = [
        ("7+0", "RUNNING", "0", "2026-01-02T03:04:05", "N/A", "a", "None", "n[1-2]", "h|x"),
        ("7+1", "RUNNING", "0", "2026-01-02T03:04:05", "N/A", "b", "None", "m1", "h|x"),
        ("8_3", "PENDING", "2", "N/A", "N/A", "a", "Resources", "", "arr"),
        ("99", "RUNNING", "0", "N/A", "N/A", "a", "None", "n3", "not asked for"),
    ]
    fake.answer("squeue", "".join(queue_line(*line) for line in lines))
    found = client.queue(["7", "8_3", "12"])
    assert len(fake.asked("squeue")) == 1
    assert set(found) == {"7", "8_3"}
    assert found["7"].nodes == "n[1-2],m1"
    assert found["7"].partition == "a,b"
    assert found["7"].name == "h|x"
    assert found["7"].start == "2026-01-02T03:04:05"
    assert (found["7"].reason, found["7"].end) == ("", "")
    assert (found["8_3"].word, found["8_3"].reason) == ("PENDING", "Resources")
    assert found["8_3"].state is JobState.PENDING
    assert found["8_3"].why == "waits until enough nodes are free (Resources)"
    assert found["8_3"].restarts == 2
    assert set(client.queue()) == {"7", "8_3", "99"}


def test_many_ids_are_asked_for_as_those_of_the_user(fake: FakeSlurm, client: Client) -> None:
    client.queue([str(i) for i in range(MOST_IDS + 1)])
    (note,) = fake.asked("squeue")
    assert f"--user={os.getuid()}" in note["arguments"]
    assert not [a for a in note["arguments"] if a.startswith("--jobs")]


def test_a_job_that_slurm_forgot_is_absent(fake: FakeSlurm, client: Client) -> None:
    forgotten = "slurm_load_jobs error: Invalid job id specified\n"
    fake.answer("squeue", error=forgotten, code=1)
    assert client.queue(["5"]) == {}
    fake.answer("sacct", error="Slurm accounting storage is disabled\n", code=1)
    assert client.history(["5"]) == {}


def test_the_accounting_tells_of_ended_jobs(fake: FakeSlurm, client: Client) -> None:
    fake.answer("sacct", "5|CANCELLED by 0|2026-01-01T00:00:00|Unknown|gpu|None assigned|a|b\n")
    job = client.history(["5"])["5"]
    assert (job.word, job.name, job.nodes, job.end) == ("CANCELLED", "a|b", "", "")
    assert (job.state, job.why) == (JobState.CANCELLED, "it was cancelled")


def test_without_accounting_commands_there_is_no_history(tmp_path: Path) -> None:
    fake = FakeSlurm(tmp_path / "bin", ("sbatch", "squeue"))
    environment = {**fake.environment(), "PATH": str(fake.folder)}
    assert Client(environment).history(["5"]) == {}
    assert Client(environment).available()
    assert not Client({"PATH": str(tmp_path)}).available()
    with pytest.raises(SlurmUnreachable, match="not on the PATH"):
        Client({"PATH": str(tmp_path)}).queue()


def test_variables_that_change_slurms_answers_are_not_passed_on(fake: FakeSlurm) -> None:
    foreign = {"SQUEUE_FORMAT": "%j", "SBATCH_EXPORT": "ALL", "SLURM_TIME_FORMAT": "relative"}
    client = Client(fake.environment(SLURM_CONF="/etc/mine", LC_ALL="de_DE", **foreign))
    client.queue()
    (note,) = fake.asked("squeue")
    assert not foreign.keys() & note["environment"].keys()
    assert note["environment"]["SLURM_CONF"] == "/etc/mine"
    assert note["environment"]["LC_ALL"] == "C"


def test_jobs_are_cancelled_signalled_requeued_and_released(
    fake: FakeSlurm, client: Client
) -> None:
    client.cancel(["1", "2_3"])
    client.cancel(["1"], signal="USR1")
    client.cancel([])
    client.requeue("1")
    client.release("2_3")
    assert [(n["command"], n["arguments"]) for n in fake.asked()] == [
        ("scancel", ["1", "2_3"]),
        ("scancel", ["--signal=USR1", "1"]),
        ("scontrol", ["requeue", "1"]),
        ("scontrol", ["update", "JobId=2_3", "StartTime=now"]),
    ]


@pytest.mark.parametrize("job_id", ["", "1 2", "-M", "1;id", "1_", "x", "1\n"])
def test_what_is_no_job_id_reaches_no_command(fake: FakeSlurm, client: Client, job_id: str) -> None:
    for ask in (client.requeue, client.release, lambda i: client.cancel([i])):
        with pytest.raises(SlurmError, match="no job id"):
            ask(job_id)
    assert fake.asked() == []


def test_the_script_of_a_test_goes_through_standard_input(fake: FakeSlurm, client: Client) -> None:
    assert client.test_only("#!/bin/bash\n") == "Job 9 to start at 2030-01-01T00:00:00"
    assert fake.asked("sbatch")[0]["stdin"] == "#!/bin/bash\n"
    assert client.version() == (22, 5)
