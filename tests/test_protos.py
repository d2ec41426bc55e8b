"""The committed stubs are what the .proto files give, and the protocol breaks neither its rules nor its peers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from deploy import protos

PLAIN = 'syntax = "proto3";\n\npackage baton.v1;\n\nmessage Ping {\n  int64 at = 1;\n}\n'


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with one committed .proto file and its stubs."""
    shutil.copy(protos.ROOT / "buf.yaml", tmp_path)
    folder = tmp_path / "protos" / "baton" / "v1"
    folder.mkdir(parents=True)
    (folder / "ping.proto").write_text(PLAIN)
    protos.generate(tmp_path, tmp_path)
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    for step in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *step], check=True, capture_output=True)
    return tmp_path


def change(tree: Path, old: str, new: str) -> None:
    path = tree / "protos" / "baton" / "v1" / "ping.proto"
    path.write_text(path.read_text().replace(old, new))


def test_the_stubs_are_up_to_date() -> None:
    assert protos.sources()
    assert protos.stale() == []


def test_the_rules_hold() -> None:
    protos.lint()


def test_no_peer_of_the_last_commit_breaks() -> None:
    protos.breaking()


def test_stale_missing_and_left_over_stubs_are_noticed(tree: Path) -> None:
    assert protos.stale(tree) == []
    change(tree, "at = 1", "when = 1")
    (tree / "protos" / "baton" / "v1" / "gone_pb2.py").touch()
    (tree / "protos" / "baton" / "v1" / "ping_pb2_grpc.py").unlink()
    names = ["gone_pb2.py", "ping_pb2.py", "ping_pb2.pyi", "ping_pb2_grpc.py"]
    assert protos.stale(tree) == [f"protos/baton/v1/{name}" for name in names]


def test_a_broken_rule_is_noticed(tree: Path) -> None:
    change(tree, "message Ping", "message ping")
    with pytest.raises(subprocess.CalledProcessError) as raised:
        protos.lint(tree)
    assert "should be PascalCase" in raised.value.output


def test_a_broken_peer_is_noticed(tree: Path) -> None:
    assert protos.breaking(tree)
    change(tree, "}", "  string note = 2;\n}")
    assert protos.breaking(tree)
    change(tree, "at = 1", "at = 3")
    with pytest.raises(subprocess.CalledProcessError) as raised:
        protos.breaking(tree)
    assert "ping.proto" in raised.value.output


def test_without_a_committed_protocol_there_is_no_peer(tmp_path: Path) -> None:
    assert protos.breaking(tmp_path) is False
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True, capture_output=True)
    assert protos.breaking(tmp_path) is False


def test_a_generator_that_fails_says_why(tree: Path) -> None:
    change(tree, "int64 at", "unknown at")
    with pytest.raises(subprocess.CalledProcessError) as raised:
        protos.generate(tree, tree)
    assert "unknown" in raised.value.output
