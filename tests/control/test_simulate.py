"""`baton simulate` as a person or a script meets it: table, one JSON document, files, errors, and what it loads."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from control import cli
from control.simulate import Plan, Progress, command, rates, slo
from core.errors import SetupError
from core.request import Slo
from scheduler.policies import POLICIES
from scheduler.ratio_events import Bounds

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--requests", "40", "--trace", "lmsys", "--rate", "10", "--policy", "fcfs")
OWN = """
from dataclasses import replace
from scheduler.policies import policy
POLICY = replace(policy("fcfs"), name="mine", about="the same under another name")
"""


def baton(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the verb, in this process."""
    with pytest.raises(SystemExit) as end:
        cli.main(["simulate", *words])
    said = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, said.out, said.err


def as_json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    code, out, err = baton(capsys, *words, "-o", "json")
    assert code == 0, err
    return json.loads(out)


def test_a_table_has_a_line_a_policy(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    own = tmp_path / "mine.py"
    own.write_text(OWN)
    code, out, _ = baton(capsys, *SMALL, "--policy", str(own), "--compare", "fcfs,fcfs")
    assert code == 0
    head, mine, fcfs = out.splitlines()
    assert head.split()[:3] == ["POLICY", "REQUESTS", "GOOD"]
    assert mine.split()[:2] == ["mine", "40"]
    assert fcfs.split()[:2] == ["fcfs", "40"]
    assert mine.split()[1:-1] == fcfs.split()[1:-1]


def test_json_is_one_document_with_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, *SMALL, "--seeds", "2", "--slo", "ttft=0.4", "--gateways", "2")
    [run] = found["runs"]
    assert run["requests"] == 80
    assert run["done"] == 80
    assert run["rate_per_s"] == pytest.approx(10.0)
    assert [one["seed"] for one in run["seeds"]] == [1, 2]
    assert run["devices"] == 4
    assert found["wall"].keys() == {"fcfs"}
    assert found["settings"]["gap goal (s)"] == "none"
    assert found["command"] == command(
        cli.parser().parse_args(["simulate", *SMALL, "--seeds", "2", "--slo", "ttft=0.4", "--gateways", "2"])
    )


def test_the_command_gives_the_same_again(capsys: pytest.CaptureFixture[str]) -> None:
    first = as_json(capsys, *SMALL, "--seed", "0", "--cv", "0", "--scenario", "load-step")
    words = shlex.split(first["command"])
    assert words[:2] == ["baton", "simulate"]
    again = as_json(capsys, *words[2:])
    first.pop("wall")
    again.pop("wall")
    assert first == again


def test_out_holds_the_same_bytes_each_time(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names = {"requests.csv", "timeline.csv", "summary.json", "report.html"}
    words = (*SMALL, "--rates", "5,20", "--workers", "1 prefill, 1 decode tp2", "--kv-tokens", "20000")
    code, out, err = baton(capsys, *words, "--out", str(tmp_path / "a" / "b"))
    assert code == 0
    assert "5 requests/s" in out
    assert "report.html" in err
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == names
    # Another process, another hash seed, another folder.
    done = subprocess.run(
        [sys.executable, "-m", "control.cli", "simulate", *words, "--out", str(tmp_path / "c")],
        cwd=ROOT, env={"PYTHONHASHSEED": "77", "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in names:
        assert (tmp_path / "a" / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes(), name
    assert len((tmp_path / "c" / "requests.csv").read_text().splitlines()) == 41
    summary = json.loads((tmp_path / "c" / "summary.json").read_text())
    assert summary["command"].startswith("baton simulate --trace lmsys --workers '1 prefill, 1 decode tp2'")
    assert "wall" not in summary


def test_goodput_is_searched_and_needs_enough_requests(capsys: pytest.CaptureFixture[str]) -> None:
    # A goal that a prompt alone misses or meets: few runs decide.
    words = ("--trace", "lmsys", "--requests", "60", "--slo", "ttft=0.00001", "--goodput", "--policy", "fcfs")
    found = as_json(capsys, *words, "--warm", "0.001")
    assert found["runs"] == []
    assert found["goodput"]["fcfs"]["rate"]["mean"] == 0
    assert len(found["goodput"]["fcfs"]["trials"]) == 11
    code, _, err = baton(capsys, *words)
    assert code == 2
    assert "got 60 to judge" in err
    assert "want at least 1000" in err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--policy", "best"], "policy: got 'best', want one of "),
        (["--compare", "fcfs,best"], "policy: got 'best'"),
        (["--policy", "nowhere.py"], "want a Python file that is there"),
        (["--cost", "b200-llama"], "cost: got 'b200-llama'"),
        (["--workers", "3 prefills"], "workers: got '3 prefills'"),
        (["--workers", "1 prefill", "--kv-tokens", "3"], "want a page at least"),
        (["--lane", "pigeon"], "lane: got 'pigeon'"),
        (["--trace", "no-such-trace"], "trace: got 'no-such-trace', want a file"),
        (["--trace", "agent"], "rate: got none, want sessions a second"),
        (["--trace", "lmsys", "--window", "0:5"], "window: got (0.0, 5.0), want none, because lmsys is no file"),
        (["--scenario", "doom"], "scenario: got 'doom', want one of drain, drift-and-burst"),
        (["--scenario", "missing.toml"], "missing.toml"),
        (["--workers", "1 prefill, 1 decode", "--scenario", "worker-loss"], "scenario: worker: got 'prefill-1'"),
        (["--slo", "latency=3"], "slo: got 'latency=3'"),
        (["--slo", "ttft=fast"], "slo: got 'fast'"),
        (["--rates", "1,x"], "rates: got 'x'"),
        (["--rates", "1,inf"], "rates: got 'inf'"),
        (["--window", "9:3"], "window: got '9:3'"),
        (["--share", "1.5"], "share: got 1.5"),
        (["--rate", "0"], "--rate: got '0', want a finite number above 0"),
        (["--requests", "0"], "--requests: got '0', want an integer of at least 1"),
        (["--page-tokens", "x"], "--page-tokens: got 'x'"),
        (["--trace", "chat", "--page-tokens", "48", "--rate", "1"], "want a divisor of the trace's block"),
        (["--out", "/dev/null/x"], "out: "),
    ],
)
def test_every_error_is_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = baton(capsys, *words)
    assert code == 2, err
    assert sentence in err
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("x = 1", "POLICY: got None"), ("POLICY = 'fcfs'", "got 'fcfs'"), ("1 / 0", "ZeroDivisionError")],
)
def test_a_file_without_a_policy_is_refused(
    text: str, sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    code, _, err = baton(capsys, "--policy", str(path))
    assert code == 2
    assert sentence in err


def test_recorded_files_are_cut_scaled_and_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    timed = tmp_path / "timed.csv"
    rows = "\n".join(f"{second * 10**9},{100 + second},8" for second in range(30))
    timed.write_text(f"arrival_time_ns,input_toks,output_toks\n{rows}\n")
    assert as_json(capsys, "--policy", "fcfs", "--trace", str(timed))["runs"][0]["rate_per_s"] == pytest.approx(1.0)
    part = as_json(capsys, "--policy", "fcfs", "--trace", str(timed), "--window", "5:15", "--rate", "4")["runs"][0]
    assert part["requests"] == 10
    assert part["rate_per_s"] == pytest.approx(4.0)
    first = as_json(capsys, "--policy", "fcfs", "--trace", str(timed), "--requests", "12")["runs"][0]
    assert first["prompt_tokens"] == sum(range(100, 112))
    drawn = as_json(capsys, "--policy", "fcfs", "--trace", str(timed), "--cv", "1", "--requests", "50", "--rate", "4")[
        "runs"
    ][0]
    assert drawn["requests"] == 50
    code, _, err = baton(capsys, "--trace", str(timed), "--requests", "31")
    assert code == 2
    assert "at most the 30 that there are" in err
    untimed = tmp_path / "lengths.csv"
    untimed.write_text("num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n20,10,30,2.0\n40,10,50,4.0\n")
    code, _, err = baton(capsys, "--trace", str(untimed))
    assert code == 2
    assert "rate: got none" in err
    assert (
        as_json(capsys, "--policy", "fcfs", "--trace", str(untimed), "--rate", "2", "--requests", "9")["runs"][0][
            "requests"
        ]
        == 9
    )
    turns = as_json(capsys, "--policy", "fcfs", "--trace", str(untimed), "--rate", "2", "--think", "3")
    assert turns["unit"] == "sessions"
    assert turns["runs"][0]["seconds"] > 3


def test_the_documentation_can_be_pasted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = (ROOT / "docs" / "simulator.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)
    commands = [line for kind, block in blocks if not kind for line in block.splitlines()]
    assert len(commands) >= 5
    for line in (*commands, (ROOT / "README.md").read_text(encoding="utf-8").partition(".venv/bin/baton simulate")[2]):
        words = shlex.split(line.partition("\n")[0])
        Plan(cli.parser().parse_args(["simulate", *words[2 if words[0] == "baton" else 0 :]]))
    own, from_python = [block for kind, block in blocks if kind == "python"]
    (tmp_path / "mine.py").write_text(own)
    found = as_json(capsys, *SMALL, "--policy", str(tmp_path / "mine.py"))
    assert found["runs"][0]["policy"] == "longest"
    assert found["runs"][0]["done"] == 40
    exec(from_python.replace("count=500", "count=20"), {})
    assert 0 <= float(capsys.readouterr().out.split()[0]) <= 1


def test_values_of_flags() -> None:
    assert slo("ttft=0.4,gap=0.05") == Slo(0.4, 0.05)
    assert slo("gap=1") == Slo(0.0, 1.0)
    assert slo("") == Slo()
    assert rates("9,4,100,2,4,0.5") == [0.5, 2.0, 4.0, 9.0, 100.0]
    with pytest.raises(SetupError):
        rates("")


def test_progress_is_a_bar_on_a_terminal_and_a_line_now_and_then_elsewhere() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    clock = [0.0]
    for stream in (Terminal(), io.StringIO()):
        progress = Progress(stream, lambda: clock[0])
        progress.begin("fcfs, seed 1", 640)
        for _ in range(640):
            clock[0] += 0.05
            progress.tick(None)  # type: ignore[arg-type]
        progress.say("one rate is done")
        progress.end()
        said = stream.getvalue()
        assert "one rate is done\n" in said
        if stream.isatty():
            assert said.count("\r[") == 10
            assert "640/640 fcfs, seed 1, 20 requests/s" in said
            assert said.endswith("\r")
        else:
            assert [line.partition(":")[2].strip() for line in said.splitlines()] == [
                "256/640, 20 requests/s",
                "512/640, 20 requests/s",
                "",
            ]
            assert "\r" not in said


def test_help_lists_the_policies_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom control.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'grpc', 'numpy', 'google', 'prometheus_client', 'tokenizers'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "assert ('sim' in sys.modules) == (sys.argv[1] == 'simulate')\n"
    )
    for words in (["simulate", "--help"], ["simulate", *SMALL], ["--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=ROOT, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        if words == ["simulate", "--help"]:
            for name, found in POLICIES.items():
                assert name in done.stdout
                assert found.about in done.stdout


def test_an_adaptive_ratio_is_explained_decision_by_decision(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words: tuple[str, ...] = (
        "--trace",
        "lmsys",
        "--requests",
        "400",
        "--rate",
        "8",
        "--workers",
        "3 prefill, 1 decode",
    )
    words += ("--cost", "h200-qwen2.5-32b", "--ratio", "adaptive", "--out", str(tmp_path))
    [run] = as_json(capsys, *words)["runs"]
    assert run["decisions"]
    for each in run["decisions"]:
        assert each["words"].startswith("decision ")
        assert each["ratio"] in each["words"]
    assert "--ratio adaptive" in (tmp_path / "report.html").read_text()
    assert "command.RatioController.Decided" in (tmp_path / "timeline.csv").read_text()
    code, _, err = baton(capsys, *SMALL, "--ratio", "adaptive", "--goodput")
    assert code != 0
    assert "want a run at one rate" in err


def test_an_adaptive_ratio_stays_within_a_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """It asks for the workers that it may have, and for no more."""
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"bounds": asdict(Bounds(least_workers=2, most_workers=3))}))
    words: tuple[str, ...] = (
        "--trace",
        "lmsys",
        "--requests",
        "3000",
        "--rate",
        "60",
        "--workers",
        "1 prefill, 1 decode",
    )
    words += ("--slo", "ttft=1,gap=0.05", "--cost", "h200-qwen2.5-32b", "--ratio", "adaptive", "--plan", str(plan))
    [run] = as_json(capsys, *words)["runs"]
    acts = [each["words"] for each in run["decisions"]]
    assert sum("add" in each.partition(":")[2].partition(",")[0] for each in acts), acts
    assert max(sum(map(int, each["ratio"].split("+"))) for each in run["decisions"]) == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"bounds": null}', "no workers that can change their role"),
        ('{"bounds": {"least_workers": 9, "most_workers": 3}}', "is no plan"),
        ('{"bounds": {"workers": 3}}', "is no plan"),
        ("[]", "is no plan"),
        (None, "is no plan"),
    ],
)
def test_what_is_no_plan_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str | None, said: str
) -> None:
    plan = tmp_path / "plan.json"
    if text is not None:
        plan.write_text(text)
    code, _, err = baton(capsys, *SMALL, "--ratio", "adaptive", "--plan", str(plan))
    assert code != 0
    assert said in err


def test_a_plan_bounds_no_ratio_that_stays_as_it_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = baton(capsys, *SMALL, "--plan", str(tmp_path))
    assert code != 0
    assert "want --ratio adaptive" in err
