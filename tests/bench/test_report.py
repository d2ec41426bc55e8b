"""The report that every benchmark prints: ratios above 1 mean better, one JSON line comes last."""

from __future__ import annotations

import json

from bench.report import Row, emit, machine, median


def test_ratio_above_one_means_better():
    assert Row("x", 20.0, 10.0, "peer", "tokens/s").ratio == 2
    assert Row("x", 20.0, 10.0, "peer", "ms", higher_is_better=False).ratio == 0.5
    assert Row("x", 20.0, None, "", "ms").ratio is None
    assert Row("x", 20.0, 0.0, "peer", "ms").ratio is None


def test_the_last_line_is_the_report(tmp_path, capsys):
    rows = [Row("a", 1.23456, 2.0, "them", "GB/s"), Row("b", 3.0, None, "", "s", higher_is_better=False)]
    emit("thing", rows, tmp_path / "report.json")
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads((tmp_path / "report.json").read_text())
    assert printed["bench"] == "thing"
    assert printed["rows"][0] == {
        "case": "a", "ours": 1.235, "peer": 2.0, "peer_name": "them", "unit": "GB/s", "higher_is_better": True,
        "ratio": 0.6173,
    }  # fmt: skip
    assert printed["rows"][1]["ratio"] is None
    assert set(machine()) >= {"cpu", "cores", "memory_gib", "load_average", "python", "versions"}


def test_median():
    assert median([3, 1, 2]) == 2
    assert median([4, 1, 2, 3]) == 2
