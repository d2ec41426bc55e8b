"""The `baton` command as a person or a script meets it: exit codes, JSON, what it loads, and one whole round."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "deploy" / "demo" / "model"


def baton(
    *words: str, state: Path, timeout_s: float = 60.0, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command in the project's root."""
    return subprocess.run(
        [sys.executable, "-m", "control.cli", "--state", str(state), *words],
        cwd=ROOT,
        text=True,
        input=stdin,
        capture_output=True,
        timeout=timeout_s,
        check=False,
    )


def test_help_loads_neither_torch_nor_grpc_nor_numpy():
    code = (
        "import sys\nfrom control.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'grpc', 'numpy', 'google', 'prometheus_client', 'tokenizers'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["nonsense"], 2, "invalid choice"),
        (["up"], 2, "model is missing"),
        (["up", "--model", "x", "--prefill", "0"], 2, "want a prefill and a decode worker"),
        (["up", "--model", "x", "--kv-memory", "lots"], 2, "kv_memory: got 'lots'"),
        (["up", "--model", "x", "--page-tokens", "7"], 2, "page_tokens: got 7"),
        (["up", "--model", "x", "--port", "70000"], 2, "port: got 70000"),
        (["up", "--model", "x", "--http", "70000"], 2, "http: got 70000"),
        (["up", "--model", "x", "--transport", "pigeon"], 2, "transport: got 'pigeon'"),
        (["up", "--config", "missing.toml"], 2, "missing.toml"),
        (["up", "--model", "/nowhere/at/all"], 5, "/nowhere/at/all"),
        (["up", "--model", str(ROOT / "docs")], 5, "config.json"),
        (["generate", "hello"], 3, "no deployment is running"),
        (["status"], 3, "no deployment is running"),
        (["down"], 3, "no deployment is running"),
        (["generate", "--gateway", "127.0.0.1:1", "hello"], 3, "nobody listens on 127.0.0.1:1"),
    ],
)
def test_every_failure_has_its_exit_code_and_one_sentence(words: list[str], code: int, sentence: str, tmp_path: Path):
    done = baton(*words, state=tmp_path)
    assert done.returncode == code, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_config_file_with_an_unknown_setting_is_refused_by_name(tmp_path: Path):
    path = tmp_path / "baton.toml"
    path.write_text(f'model = "{DEMO}"\nprefil = 2\n')
    done = baton("up", "--config", str(path), state=tmp_path)
    assert done.returncode == 2
    assert "unknown setting 'prefil'" in done.stderr


def test_doctor_says_what_fits_in_one_json_document(tmp_path: Path):
    done = baton("doctor", "--model", str(DEMO), "--kv-memory", "64M", "-o", "json", state=tmp_path)
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["ok"] else 1)
    topics = {finding["topic"] for finding in report["findings"]}
    assert {"version", "machine", "limit", "transport", "lane", "port", "memory"} <= topics
    fits = next(f for f in report["findings"] if f["name"] == "64 MiB of KV hold")
    assert "65,536 tokens" in fits["value"]


@pytest.mark.live
def test_a_port_in_use_is_one_sentence_and_leaves_nothing_running(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = baton("up", "--model", str(DEMO), "--port", str(port), "--kv-memory", "16M", state=tmp_path)
    assert done.returncode == 4
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert not (tmp_path / "deployment.json").exists()


@pytest.mark.live
def test_the_commands_that_the_demo_ends_with_all_work(tmp_path: Path):
    from control.demo import NEXT

    printed = [line.split("baton ", 1)[1] for line in NEXT.splitlines() if "bin/baton" in line]
    assert [line.split()[0] for line in printed] == ["doctor", "up", "status", "generate", "generate", "down"]
    assert "--prefill 2 --decode 2 --http 8000" in printed[1]
    curl = shlex.split(NEXT[NEXT.index("curl") : NEXT.index("]}'") + 3])
    assert curl[0] == "curl"
    assert NEXT.index("--http") < NEXT.index("curl") < NEXT.index("down")
    try:
        up = baton(
            "up", "--detach", "--model", str(DEMO), "--prefill", "2", "--decode", "2", "--port", "0",
            "--kv-memory", "32M", "--http", "0", "--profile-s", "0.2", "-o", "json", state=tmp_path, timeout_s=90.0,
        )  # fmt: skip
        assert up.returncode == 0, up.stderr
        word = json.loads(up.stdout)
        assert len(word["gateways"]) == 1
        assert f"{word['http']}/v1 (OpenAI API)" in up.stderr

        again = baton("up", "--model", str(DEMO), "--port", "0", state=tmp_path)
        assert again.returncode == 2
        assert "running already" in again.stderr

        answer = _curl([argument.replace("http://127.0.0.1:8000", word["http"]) for argument in curl])
        assert answer["choices"][0]["message"]["content"].startswith("textwrap.dedent removes any common leading")

        status = baton("status", "-o", "json", state=tmp_path)
        assert json.loads(status.stdout)["http"] == {"url": word["http"], "ready": True}
        members = json.loads(status.stdout)["members"]
        assert status.returncode == 0
        assert sorted(member["role"] for member in members) == ["decode", "decode", "gateway", "prefill", "prefill"]
        assert all(member["ready"] for member in members)
        decode = next(member for member in members if member["role"] == "decode")
        assert len(decode["lanes"]) == 2
        assert all(lane["gbytes_per_s"] > 0 for lane in decode["lanes"])
        table = baton("status", state=tmp_path).stdout
        assert "decode-0" in table
        assert word["http"] in table

        doctor = baton("doctor", "-o", "json", state=tmp_path)
        lanes = [f for f in json.loads(doctor.stdout)["findings"] if f["topic"] == "lane"]
        assert len(lanes) == 4
        assert all("GB/s" in lane["value"] for lane in lanes)

        said = baton("generate", "--chat", "--waterfall", "What does textwrap.dedent do?", state=tmp_path)
        assert said.returncode == 0, said.stderr
        assert said.stdout.startswith("textwrap.dedent removes any common leading")
        assert "pull" in said.stderr

        answer = baton("generate", "--max-tokens", "5", "--ignore-eos", "-o", "json", state=tmp_path, stdin="What is")
        document = json.loads(answer.stdout)
        assert len(document["token_ids"]) == 5
        assert document["end"]["finish_reason"] == "length"

        kill = NEXT[NEXT.index("(sleep") : NEXT.index("& \\")].replace("pgrep ", f"pgrep -P {_parents(word['pid'])} ")
        words = shlex.split(next(line for line in NEXT.splitlines() if "2000" in line).split("baton ", 1)[1])
        killing = subprocess.Popen(["bash", "-c", kill])
        said = baton(*words, state=tmp_path)
        assert killing.wait(10) == 0
        assert said.returncode == 0, said.stderr
        assert "1999 steps" in said.stderr or "attempt 2" in said.stderr
        until = time.monotonic() + 10
        while "decode-0 ended with exit code -9" not in (tmp_path / "up.log").read_text() and time.monotonic() < until:
            time.sleep(0.05)
        assert "decode-0 ended with exit code -9" in (tmp_path / "up.log").read_text()

        lost = next(pid for pid in _children(word["pid"]) if Path(f"/proc/{pid}/comm").read_text() == "prefill-1\n")
        os.kill(lost, signal.SIGKILL)
        again = baton("generate", "--chat", "What does textwrap.dedent do?", state=tmp_path)
        assert again.returncode == 0, again.stderr
        time.sleep(0.5)  # the launcher has said that prefill-1 ended, to nobody
        again = baton("generate", "--chat", "What does textwrap.dedent do?", state=tmp_path)
        assert again.returncode == 0, again.stderr

        wrong = baton("generate", "--model", "other", "hello", state=tmp_path)
        assert wrong.returncode == 1
        assert "NOT_FOUND" in wrong.stderr

        front = next(pid for pid in _children(word["pid"]) if "smg" in Path(f"/proc/{pid}/cmdline").read_text())
        os.kill(front, signal.SIGKILL)
        until = time.monotonic() + 10
        while "http ended with exit code -9" not in (tmp_path / "up.log").read_text() and time.monotonic() < until:
            time.sleep(0.05)
        assert "http ended with exit code -9" in (tmp_path / "up.log").read_text()
        status = baton("status", "-o", "json", state=tmp_path)
        assert status.returncode == 1
        assert json.loads(status.stdout)["http"] == {"url": word["http"], "ready": False}
    finally:
        down = baton("down", state=tmp_path)
    assert down.returncode == 0, down.stderr
    until = time.monotonic() + 10
    while Path(f"/proc/{word['pid']}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{word['pid']}").exists()
    assert baton("status", state=tmp_path).returncode == 3


@pytest.mark.live
def test_an_interrupted_demo_leaves_no_process(tmp_path: Path):
    demo = subprocess.Popen(
        [sys.executable, "-u", "-m", "control.demo"],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert demo.stdout is not None
    for line in demo.stdout:
        if "gateway-0 on" in line:
            break
    children = _children(demo.pid)
    assert len(children) >= 4
    demo.send_signal(signal.SIGINT)
    rest = demo.stdout.read()
    assert demo.wait(30) == 130
    assert "interrupted" in rest
    assert "Traceback" not in rest
    demo.stdout.close()
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


def _curl(words: list[str]) -> Any:
    """The JSON that `curl` would print, so that no test needs one."""
    assert words[1] == "-s"
    url, options = words[2], dict(zip(words[3::2], words[4::2], strict=True))
    assert options.keys() == {"-H", "-d"}
    name, _, value = options["-H"].partition(": ")
    request = urllib.request.Request(url, options["-d"].encode(), {name: value})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        return json.loads(answer.read())


def _parents(pid: int) -> str:
    """Itself, and those that it has processes forked by."""
    return ",".join(map(str, [pid, *_children(pid)]))


def _children(pid: int) -> list[int]:
    """Its own and theirs."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            if int(stat.rpartition(")")[2].split()[1]) == pid:
                found += [int(entry.name), *_children(int(entry.name))]
    return found
