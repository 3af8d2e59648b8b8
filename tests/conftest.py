"""With MOTET_REQUIRE_ALL=1 (as `.ci/run` sets it) a test that skips for want of a package fails
instead.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# No test of what is right depends on how busy the machine is.
settings.register_profile("motet", deadline=None)
settings.load_profile("motet")

# Workers share the cores, and threads that wait for each other there do so spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")

HARDWARE = ("cuda", "gpu", "accelerator")
# What a search of a corpus found is kept between runs: not in the home of who runs the tests. What
# libraries compile or collect once for all is kept where it always is.
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(_CACHE / "torch_extensions"))
os.environ.setdefault("MPLCONFIGDIR", str(_CACHE / "matplotlib"))
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="motet-cache-")


def pytest_configure(config):  # type: ignore[no-untyped-def]
    """Tests that were killed while an extension compiled left a lock: all that use it would wait
    for it until they are given up, which takes longer than the rest of the suite.
    """
    if hasattr(config, "workerinput"):
        return
    from motet.launcher.runs import extension_locks

    for lock in Path(os.environ["TORCH_EXTENSIONS_DIR"]).glob("**/lock"):
        if not extension_locks.is_held(lock):
            lock.unlink(missing_ok=True)


def pytest_runtest_setup(item):  # type: ignore[no-untyped-def]
    """Versions that let go of groups in silence would give each worker a testbed of its own."""
    grouping = getattr(item.config.option, "loadgroup", False)
    if grouping and item.get_closest_marker("xdist_group") and "@" not in item.nodeid:
        pytest.fail(
            f"pytest {pytest.__version__} and this pytest-xdist do not keep the tests of an "
            "xdist_group on one worker; pyproject.toml names the versions that do",
            pytrace=False,
        )


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):  # type: ignore[no-untyped-def]
    outcome = yield
    report = outcome.get_result()
    reason = (
        str(report.longrepr[2]) if report.skipped and isinstance(report.longrepr, tuple) else ""
    )
    allowed = hasattr(report, "wasxfail") or any(word in reason.lower() for word in HARDWARE)
    if report.skipped and os.environ.get("MOTET_REQUIRE_ALL") == "1" and not allowed:
        report.outcome = "failed"
        report.longrepr = f"skipped although MOTET_REQUIRE_ALL=1: {reason}"
