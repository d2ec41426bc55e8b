"""Forty seconds of what `make chaos` does for as long as it is told to."""

from __future__ import annotations

import pytest

from bench.chaos import run


@pytest.mark.slow
def test_nobody_fails_while_processes_die_stand_still_and_drain_and_reads_fail(tmp_path):
    report = run("paced", 40.0, 1, tmp_path, peace_s=6.0)
    failed = [f"{each.reply.code}: {each.reply.details}" for each in report.chaos if each.fate == "failed"]
    assert not failed
    assert not report.wrong
    assert not report.held
    assert not report.errors
    assert report.count("good") > 0.9 * len(report.chaos)
    assert report.share(report.chaos, "rejected") <= report.share(report.calm, "rejected") + 2
    assert not report.strange(), "whose gateway was killed ends with it, and not otherwise"
    assert report.doomed
    assert {deed.partition(" ")[2] for deed in report.did if not deed.startswith("rule")} == {
        "prefill",
        "decode",
        "coordinator",
        "gateway",
    }
    assert sum(count for deed, count in report.did.items() if deed.startswith("rule")) >= 5
