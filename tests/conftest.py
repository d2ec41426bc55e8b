"""Laws that hold for every test: a skip must have a listed reason, and property tests are repeatable."""

from __future__ import annotations

import atexit
import fnmatch
import os
import shutil
import signal
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hypothesis
import pytest

SKIPS = Path(__file__).parent / "skips.txt"

# The same examples every time, and no time limit for one: machines that are busy elsewhere must not fail a test.
hypothesis.settings.register_profile("baton", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("baton")

# Whatever processes keep for their next start is kept for this run of tests alone.
os.environ["BATON_CACHE"] = tempfile.mkdtemp(prefix="baton-tests-cache-")
atexit.register(shutil.rmtree, os.environ["BATON_CACHE"], ignore_errors=True)

# Whoever is started in the background by a shell ignores interrupts, and so would all that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_skipped: dict[str, str] = {}


def allowed_reasons(text: str) -> list[str]:
    """The reasons in skips.txt, comments left out."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def unlisted(skipped: dict[str, str], allowed: Iterable[str]) -> list[str]:
    """The skipped tests, each with its reason, that no allowed reason covers."""
    patterns = list(allowed)
    return [
        f"{test}: {reason}"
        for test, reason in sorted(skipped.items())
        if not any(fnmatch.fnmatchcase(reason, pattern) for pattern in patterns)
    ]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")


def note(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        where = report.longrepr
        reason = where[2] if isinstance(where, tuple) else str(where)
        _skipped[report.nodeid] = reason.removeprefix("Skipped: ")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    note(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    note(report)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A process that ran tests for this one (`-n 2`) says what it skipped, whole files among it."""
    _skipped.update(getattr(node, "workeroutput", {}).get("skipped", {}))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["skipped"] = _skipped
    elif exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) and left_over():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if found := left_over():
        terminalreporter.section("skipped for a reason that tests/skips.txt does not list", red=True)
        for line in found:
            terminalreporter.line(line)


def left_over() -> list[str]:
    return unlisted(_skipped, allowed_reasons(SKIPS.read_text(encoding="utf-8")))
