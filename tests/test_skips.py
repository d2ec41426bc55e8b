"""The law on skipped tests holds, and can be broken."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SKIPS, allowed_reasons, unlisted


def test_a_listed_reason_is_allowed_and_any_other_is_not() -> None:
    allowed = allowed_reasons("# why\nneeds an NVIDIA GPU\n\nwheel missing: *\n")
    assert allowed == ["needs an NVIDIA GPU", "wheel missing: *"]
    skipped = {"a": "needs an NVIDIA GPU", "b": "wheel missing: smg", "c": "too hard", "d": ""}
    assert unlisted(skipped, allowed) == ["c: too hard", "d: "]


def test_every_listed_reason_is_explained() -> None:
    lines = SKIPS.read_text(encoding="utf-8").splitlines()
    for above, line in itertools.pairwise(lines):
        assert not line or line.startswith("#") or above.startswith("#"), f"say above it why {line!r} is acceptable"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("import pytest\n\ndef test_one():\n    pytest.skip('no reason at all')\n", 1),
        ("import pytest\n\npytest.importorskip('no_such_module')\n", 1),
        ("import pytest\n\n@pytest.mark.skip(reason='needs an NVIDIA GPU')\ndef test_one(): ...\n", 0),
        ("def test_one(): ...\n", 0),
    ],
)
@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["here", "elsewhere"])
def test_a_run_with_an_unlisted_skip_fails(tmp_path: Path, body: str, code: int, options: tuple[str, ...]) -> None:
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "__init__.py").touch()
    for name in ("conftest.py", "skips.txt"):
        (folder / name).write_bytes((SKIPS.parent / name).read_bytes())
    (folder / "test_it.py").write_text(body)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(folder)]
    command += options
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout
