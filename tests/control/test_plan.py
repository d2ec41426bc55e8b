"""`baton plan` as a person or a script meets it: tables, one JSON document, errors."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from control import cli, plan
from control.plan import Bar
from core.errors import SetupError
from scheduler.layout import Cell, Layout, Pool
from scheduler.plan import Evaluate

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--model", "llama-3.1-8b", "--gpus", "2", "--rate", "20", "--stages", "1", "--gpu-hour", "3.6", "--requests", "150",
    "--jobs", "1",
)  # fmt: skip
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "eos_token_id": 2, "hidden_act": "silu", "rope_theta": 500000.0,
}  # fmt: skip


def baton(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the verb, in this process."""
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", *words])
    said = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, said.out, said.err


def test_one_json_document_has_the_plan_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = baton(capsys, *SMALL, "-o", "json")
    assert code == 0, err
    found: Any = json.loads(out)
    assert found["layout"] == {
        "name": "1 mixed tp1", "family": "mixed", "devices": 1, "times": 1, "mixed": {"workers": 1, "tp": 1, "pp": 1},
    }  # fmt: skip
    assert found["disaggregate"] is False
    assert found["attained"] >= 0.9
    assert found["next_rate"] > 20
    assert [choice["question"] for choice in found["choices"]] == [
        "disaggregate?", "mixed workers", "prefill workers", "decode workers",
    ]  # fmt: skip
    assert found["cases"][0]["name"] == "rate +20 %"
    assert found["costs"][0]["output"] == pytest.approx(1e6 * 3.6 / 3600 / 20 / 211, rel=0.1)
    assert found["spent"]["cpu_s"] > 0


def test_tables_say_what_and_why_and_nothing_serves_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = baton(capsys, *SMALL)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "do not disaggregate: 1 mixed tp1, 1 device"
    assert any(line.startswith("1 mixed tp1") and "needs the fewest devices" in line for line in lines)
    assert "A MILLION OUTPUT TOKENS" in out
    assert lines[-1].endswith("on: another mixed worker, tp1")
    code, out, _ = baton(capsys, "--model", "llama-3.1-70b", "--gpus", "1", "--rate", "1")
    assert code == 1
    assert out.startswith("nothing serves these requests here, at any rate: weights of 141.1 GB")


def test_processes_side_by_side_plan_the_same() -> None:
    """Each as a process of its own: it forks, and this one has threads of gRPC that would not come along."""

    def planned(jobs: str) -> Any:
        command = [sys.executable, "-m", "control.cli", "plan", *SMALL, "--jobs", jobs, "-o", "json"]
        return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60).stdout)

    one, two = planned("1"), planned("2")
    one.pop("spent"), two.pop("spent")
    assert one == two


def test_a_model_is_known_or_a_directory(tmp_path: Path) -> None:
    assert plan.model("llama-3.1-8b")[1].layers == 32
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    name, sizes = plan.model(str(tmp_path))
    assert sizes == plan.model("llama-3.1-8b")[1]
    assert name == "llama-3.1-8b"
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 30}))
    assert plan.model(str(tmp_path)) == (f"config of {tmp_path.name}", replace(sizes, layers=30))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SetupError):
        plan.model(str(tmp_path))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--gpu", "v100"), "gpu: got 'v100', want one of a100, h100, h200"),
        (("--model", "gpt-9"), "model: got 'gpt-9', want a directory with a config.json"),
        (("--lane", "string"), "lane: got 'string'"),
        (("--share", "1.5"), "share: got 1.5"),
        (("--off", "1"), "off: got 1.0"),
        (("--policy", "colocated-chunked"), "policy: got 'colocated-chunked', want one for prefill and decode workers"),
        (("--mixed-policy", "baton"), "mixed-policy: got 'baton', want one for colocated workers"),
        (("--slo", "ttft=x"), "slo: got 'x'"),
        (("--trace", "nowhere.csv"), "trace: got 'nowhere.csv'"),
    ],
)
def test_wrong_flags_are_named(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str) -> None:
    code, _, err = baton(capsys, *SMALL, *words)
    assert code == 2
    assert f"baton: {says}" in err


def test_the_bar_moves_on_a_terminal_and_speaks_now_and_then_elsewhere() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    asked = [Evaluate(n, Layout(mixed=Pool(Cell(1, 1), n)), 1.0) for n in (1, 2)]
    screen, times = Terminal(), iter([0.0] * 9)
    bar = Bar(screen, lambda: next(times))
    bar.show("60/s: 3 evaluations", 1, asked)
    assert "[############            ] 60/s: 3 evaluations, 2 mixed tp1" in screen.getvalue()
    bar.end()
    log, clock = io.StringIO(), iter([0.0, 1.0, 11.0, 12.0])
    bar = Bar(log, lambda: next(clock))
    for done in (0, 1, 2):
        bar.show("60/s", done, asked)
    bar.end()
    assert log.getvalue().splitlines() == ["[############            ] 60/s, 2 mixed tp1"]
