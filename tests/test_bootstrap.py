"""The bootstrap decides rightly what to install, and says in one sentence what is missing."""

from __future__ import annotations

import ast
import importlib.util
import os
import platform
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy import bootstrap
from deploy.bootstrap import Pip, Screen, Stop, Wheel

TORCH = Wheel("torch", "2.13.0", "https://index.invalid/torch.whl", "aa", 900 << 20)
CPU = Wheel("torch", "2.13.0+cpu", "https://cpu.invalid/torch%2Bcpu.whl", "bb", 190 << 20)
CUBLAS = Wheel("nvidia-cublas", "13.4", "https://index.invalid/cublas.whl")
SOURCE = Path(bootstrap.__file__)


def test_any_python_since_3_6_can_read_the_file() -> None:
    ast.parse(SOURCE.read_text(encoding="utf-8"), feature_version=(3, 6))


def test_an_old_python_says_what_is_needed() -> None:
    """Runs the file's first statements the way Python 3.8 would, with no newer one on PATH."""
    head = SOURCE.read_text(encoding="utf-8").split("import argparse")[0]
    script = f"import sys\nsys.version_info = (3, 8, 10)\n{head}\nprint('came through')"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={"PATH": "/nonexistent"}, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("bootstrap: Python 3.11 or newer is needed, this is 3.8; ")
    assert "apt install python3.11" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_old_python_hands_over_to_a_newer_one(tmp_path: Path) -> None:
    newer = tmp_path / "python3.12"
    newer.write_text('#!/bin/sh\necho "newer $*"\n')
    newer.chmod(0o755)
    head = SOURCE.read_text(encoding="utf-8").split("import argparse")[0]
    script = f"import sys\nsys.version_info = (3, 8, 10)\nsys.argv = ['boot.py', '--extra', 'test']\n{head}"
    environment = {"PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "newer boot.py --extra test\n"


PROJECT = {
    "build-system": {"requires": ["setuptools"]},
    "project": {"dependencies": ["torch>=2"], "optional-dependencies": {"test": ["pytest"], "ucx": ["nixl"]}},
}


def test_what_is_wanted() -> None:
    assert bootstrap.wanted(PROJECT, []) == ["setuptools", "torch>=2"]
    assert bootstrap.wanted(PROJECT, ["test"]) == ["setuptools", "torch>=2", "pytest"]
    with pytest.raises(Stop, match=r"extra: got 'tset', wanted one of test, ucx\."):
        bootstrap.wanted(PROJECT, ["tset"])


def test_the_fingerprint_follows_what_is_installed_and_nothing_else() -> None:
    whole = {**PROJECT, "tool": {"setuptools": {"packages": ["core"]}, "ruff": {"line-length": 100}}}
    first = bootstrap.fingerprint(whole, "torch==2.13.0\n")
    assert first == bootstrap.fingerprint({**whole, "tool": {"setuptools": {"packages": ["core"]}}}, "torch==2.13.0\n")
    assert first != bootstrap.fingerprint(whole, "torch==2.14.0\n")
    assert first != bootstrap.fingerprint(
        {**whole, "tool": {"setuptools": {"packages": ["core", "sim"]}}}, "torch==2.13.0\n"
    )


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((bootstrap.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lines = (bootstrap.ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0] for line in lines if line and not line.startswith("#")}
    asked = bootstrap.wanted(project, list(project["project"]["optional-dependencies"]))
    names = {re.split(r"[<>=;!~\[ ]", line)[0].lower().replace("_", "-") for line in asked}
    assert names - pinned == set()
    assert "pip" in pinned


# ---------------------------------------------------------------- which torch


class Index(Pip):
    """A pip whose answers are given: by name of the index that it is sent to."""

    def __init__(self, plain: list[Wheel], cpu: list[Wheel] | None) -> None:
        self.plain, self.cpu = plain, cpu
        self.asked: list[tuple[str, ...]] = []

    def resolve(self, *arguments: str) -> list[Wheel]:
        self.asked.append(arguments)
        if "--index-url" in arguments:
            if self.cpu is None:
                raise Stop("the package index cannot be reached", code=1)
            return self.cpu
        return self.cpu or [] if any(" @ " in word for word in arguments) else self.plain


@pytest.mark.parametrize(
    ("plain", "cpu", "gpu", "wanted", "asked"),
    [
        ([CPU], [], False, [CPU], 1),
        ([CPU], [], True, [CPU], 1),
        ([TORCH, CUBLAS], [CPU], True, [TORCH, CUBLAS], 1),
        ([TORCH, CUBLAS], [CPU], False, [CPU], 3),
        ([TORCH, CUBLAS], None, False, [TORCH, CUBLAS], 2),
        ([], [], False, [], 1),
    ],
)
def test_which_torch_is_taken(
    monkeypatch: pytest.MonkeyPatch,
    plain: list[Wheel],
    cpu: list[Wheel] | None,
    gpu: bool,
    wanted: list[Wheel],
    asked: int,
) -> None:
    monkeypatch.setattr(bootstrap, "has_gpu", lambda: gpu)
    index = Index(plain, cpu)
    found = bootstrap.choose(index, ["numpy", "torch>=2.11"], Path("c.txt"), "https://cpu.invalid", Screen())
    assert found == wanted
    assert len(index.asked) == asked
    if asked == 3:
        assert index.asked[1][-1] == "torch>=2.11"
        assert index.asked[2][-1] == f"torch @ {CPU.url}#sha256=bb"


def test_what_is_said_about_the_download(tmp_path: Path) -> None:
    local = tmp_path / "local.whl"
    local.write_bytes(bytes(3 << 20))
    wheels = bootstrap.measure([Wheel("local", "1", local.as_uri())], None)
    assert wheels[0].nbytes == 3 << 20
    assert bootstrap.size_text([CPU, *wheels]) == "190 MiB to download and 3 MiB from local files"
    assert bootstrap.size_text([CPU, CUBLAS]) == "190 MiB to download, 1 of unknown size"
    assert bootstrap.size_text([CUBLAS]) == "of unknown size"
    assert bootstrap.torch_text("2.13.0+cpu", False, True).endswith("the GPU will not be used with it")


def test_a_size_that_nobody_tells_stays_unknown() -> None:
    wheel = Wheel("a", "1", "http://127.0.0.1:9/a.whl")
    assert bootstrap.measure([wheel, Wheel("b", "1", "file:///nowhere.whl")], None)[0].nbytes is None


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "the disk is full"),
        ("NewConnectionError(...)\nERROR: No matching distribution found for torch", "index cannot be reached"),
        ("ERROR: No matching distribution found for torch==9", "the package index offers no torch==9 for Python 3."),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE", "package is damaged"),
        ("something new", "pip failed"),
    ],
)
def test_pips_failures_are_one_sentence_and_its_last_lines(tmp_path: Path, text: str, sentence: str) -> None:
    pip = Pip(tmp_path / "bin" / "python")
    pip.tail.extend([f"line {n}" for n in range(20)] + text.splitlines())
    stop = pip.failure()
    first, *rest = str(stop).splitlines()
    assert sentence in first
    assert rest[-1] == f"    pip: {text.splitlines()[-1]}"
    assert len(rest) <= 8
    assert stop.code == 1


def stand_in(folder: Path, body: str) -> Path:
    """An interpreter that answers as pip does."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{body}\n")
    python.chmod(0o755)
    return python


def test_the_progress_of_an_install_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = (
        'echo "Collecting torch==2.13.0"\necho "Progress 1048576 of 199229440"\n'
        'echo "Processing /some/where/my_wheel-1.0-py3-none-any.whl"\necho "Installing collected packages: torch"'
    )
    pip = Pip(stand_in(tmp_path, body))
    pip.version = (26, 0)
    bootstrap.install(pip, [CPU, Wheel("my-wheel", "1.0", "file:///x")], Screen())
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "bootstrap: 1 of 2: torch (190 MiB)"
    assert said[-1] == "bootstrap: 2 of 2 fetched, unpacking"
    assert "Progress" not in "".join(pip.tail)


def test_too_little_disk_is_one_sentence() -> None:
    with pytest.raises(Stop, match=r"installing them needs about \d+ MiB below .*, \d+ MiB are free\."):
        bootstrap.check_space(1 << 60, "installing them")


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / ".venv"
    folder.mkdir()
    (folder / "precious").touch()
    with pytest.raises(Stop, match="is not a virtual environment: move it away"):
        bootstrap.make_venv(folder, Screen())
    assert (folder / "precious").exists()


def test_a_missing_venv_module_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Stop, match="apt install python3-venv"):
        bootstrap.make_venv(tmp_path / ".venv", Screen())


@pytest.mark.parametrize(
    ("system", "machine", "said"),
    [
        ("linux", "x86_64", None),
        ("linux", "aarch64", None),
        ("linux", "riscv64", "riscv64"),
        ("darwin", "arm64", "NIXL"),
    ],
)
def test_where_there_is_a_ucx_lane(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str, said: str | None
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    reason = bootstrap.ucx_missing_reason()
    assert reason is None if said is None else said in (reason or "")


def tree(folder: Path) -> Path:
    """A copy of what the bootstrap reads, whose environment was made already."""
    (folder / "deploy").mkdir(parents=True)
    for name in ("deploy/bootstrap.py", "pyproject.toml", "constraints.txt"):
        (folder / name).write_bytes((bootstrap.ROOT / name).read_bytes())
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "pyvenv.cfg").touch()
    (folder / ".venv" / "bin" / "python").symlink_to(sys.executable)
    load = (
        "import tomllib\nfrom deploy import bootstrap as b\n"
        "project = tomllib.loads((b.ROOT / 'pyproject.toml').read_text())\n"
        "print(b.fingerprint(project, (b.ROOT / 'constraints.txt').read_text()))"
    )
    key = subprocess.run([sys.executable, "-c", load], cwd=folder, capture_output=True, text=True, check=True).stdout
    stamp = f'{{"key": "{key.strip()}", "extras": ["test"]}}'
    (folder / ".venv" / "baton-stamp.json").write_text(stamp)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    folder = tree(tmp_path / "tree")

    def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(folder / "deploy" / "bootstrap.py"), *arguments]
        whole = {**os.environ, **environment}
        return subprocess.run(command, capture_output=True, text=True, env=whole, check=False)

    return call


def test_a_ready_environment_is_left_alone(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    for arguments in ([], ["--extra", "test"], ["--extra", "test", "--extra", "ucx"]):
        done = run(*arguments)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), "nothing is resolved, so nothing is said"


def test_an_unknown_extra_is_refused(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run("--extra", "tset")
    assert done.returncode == 2
    assert done.stderr.startswith("bootstrap: extra: got 'tset', wanted one of ")


def test_ctrl_c_leaves_with_130_and_one_line(tmp_path: Path) -> None:
    folder = tree(tmp_path / "tree")
    (folder / ".venv" / "baton-stamp.json").unlink()
    python = folder / ".venv" / "bin" / "python"
    python.unlink()
    # Answers as this interpreter, until pip is called, which then hangs.
    body = f'case "$2" in pip) echo started > "{tmp_path}/started"; exec sleep 60;; esac\nexec "{sys.executable}" "$@"'
    python.write_text(f"#!/bin/sh\n{body}\n")
    python.chmod(0o755)
    command = [sys.executable, str(folder / "deploy" / "bootstrap.py")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    until = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 130
    assert errors == "bootstrap: interrupted; the next run goes on from here.\n"
