"""No text of a run.yaml executes anything on its way into a batch job."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from motet.launcher import cli
from motet.slurm.testbed.bed import Testbed
from tests.slurm.fake import FakeSlurm
from tests.system.conftest import corpus as corpus
from tests.system.runs import write_yaml

TRAP = "/tmp/motet-injected"
SINGLE = (
    "partition",
    "account",
    "qos",
    "gpu_type",
    "memory",
    "time",
    "constraint",
    "reservation",
    "mail_user",
    "python",
)
LISTS = ("dependency", "modules", "container", "srun", "environment", "secrets")
FIELDS = [
    *(f"slurm.{name}" for name in (*SINGLE, *LISTS)),
    *(f"slurm.groups.{name}" for name in ("partition", "constraint", "memory", "gpu_type")),
    "name",
    "runs",
]
PAYLOADS = (
    f"$(touch {TRAP})",
    f"`touch {TRAP}`",
    f"x; touch {TRAP}",
    f"x\ntouch {TRAP}",
    f"x\n#SBATCH --wrap=touch {TRAP}",
    f"x\r\n#SBATCH --output={TRAP}",
    f"' ; touch {TRAP} ; '",
    f'" ; touch {TRAP} ; "',
    f"a && touch {TRAP}",
    f"a | tee {TRAP}",
    f"x > {TRAP}",
    f"--wrap=touch {TRAP}",
    f"A=$(touch {TRAP})",
    f"A=';touch {TRAP};'",
    "a" * 10_000,
    "gpu\x00",
    "gpu\x1b[2J",
    "gpu\u2028x",
    "ｇｐｕ",
    "gpu é",
    "${HOME}",
    "%j/../../x",
    "",
    " ",
)


@pytest.fixture(scope="module")
def yaml(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    edit = write_yaml(tmp_path_factory.mktemp("injection"), corpus, "r")
    return edit


@pytest.fixture
def no_trap() -> Iterator[None]:
    Path(TRAP).unlink(missing_ok=True)
    yield
    assert not Path(TRAP).exists()


def with_value(yaml: Path, field: str, value: str) -> Path:
    """The run.yaml with one text replaced; JSON is YAML, whatever the text holds."""
    shown = json.dumps(value)
    name = field.rpartition(".")[2]
    text = yaml.read_text()
    if not field.startswith("slurm."):
        kept = [line for line in text.splitlines() if not line.startswith(f"{field}:")]
        text = "\n".join([*kept, f"{field}: {shown}\n"])
    elif field.startswith("slurm.groups."):
        text += f"slurm: {{groups: [{{nodes: 1, {name}: {shown}}}]}}\n"
    else:
        text += f"slurm: {{{name}: {f'[{shown}]' if name in LISTS else shown}}}\n"
    path = yaml.with_name("fuzzed.yaml")
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return path


def submit(
    yaml: Path, field: str, value: str, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    code = cli.main(["submit", str(with_value(yaml, field, value)), "--dry-run"])
    out, err = capsys.readouterr()
    return code, out, err


def check(field: str, value: str, code: int, out: str, err: str) -> None:
    """Either a clear error that names the setting, or a script in which the text stands in one
    line, whole.
    """
    assert code in (0, 2)
    if code == 2:
        assert err.startswith("motet: ")
        assert all(line.isprintable() for line in err.splitlines())
        assert len(err) < 2000
        return
    assert not set(value) & set("\"'`$;\\<>{}\n\r\0"), value
    script = [line for line in out.splitlines() if not line.startswith("# ")]
    assert all(line.isprintable() for line in script)
    assert sum(line.startswith("#SBATCH --wrap") for line in script) == 0


@pytest.mark.parametrize("field", FIELDS)
def test_known_payloads_are_refused_with_the_reason(
    yaml: Path,
    field: str,
    no_trap: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake = FakeSlurm(tmp_path)
    monkeypatch.setenv("PATH", fake.environment()["PATH"])
    for value in PAYLOADS:
        code, out, err = submit(yaml, field, value, capsys)
        check(field, value, code, out, err)
        a_path = all(c.isalnum() or c in "._/+,:=@ -" for c in value) and value.strip() == value
        empty = not value.strip() or (field == "runs" and (value.isascii() or a_path))
        if not empty:
            assert code == 2, f"{field}={value!r} was accepted"
            assert field.partition(".groups")[0] in err or "not valid YAML" in err, err
    assert all(TRAP not in note["stdin"] for note in fake.asked())


_texts = st.one_of(
    st.text(max_size=40),
    st.text(alphabet="ab0-._/+,:=@%&|*()[]<>;$`'\"\\ \n\t#{}", max_size=30),
    st.builds(
        lambda a, b: a + b, st.text(alphabet="abc0:-", max_size=4), st.sampled_from(PAYLOADS)
    ),
)


@pytest.mark.xdist_group("testbed")
@settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(field=st.sampled_from(FIELDS), value=_texts)
def test_no_text_executes_anything_on_its_way_through_a_real_sbatch(
    testbed: Testbed,
    yaml: Path,
    no_trap: None,
    capsys: pytest.CaptureFixture[str],
    field: str,
    value: str,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, content in testbed.environment().items():
            patch.setenv(name, content)
        check(field, value, *submit(yaml, field, value, capsys))
