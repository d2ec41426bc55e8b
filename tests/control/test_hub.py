"""A model is found by path or in the local cache, and what is not found is said."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from control.hub import cache_folder, model_name, resolve_model
from core.errors import ModelError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "hub" / "models--org--tiny-1.5"
    (folder / "snapshots" / "abc123").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc123")
    (folder / "refs" / "gone").write_text("fff")
    return folder


def test_a_directory_is_taken_as_it_is(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert resolve_model("mine", download=False) == tmp_path / "mine"
    assert resolve_model(str(tmp_path / "mine"), download=True) == tmp_path / "mine"
    (tmp_path / "org" / "tiny-1.5").mkdir(parents=True)
    assert resolve_model("org/tiny-1.5", download=False) == tmp_path / "org" / "tiny-1.5"


def test_a_hub_id_is_found_in_the_cache(cache: Path) -> None:
    wanted = cache / "snapshots" / "abc123"
    for spec in ("org/tiny-1.5", "org/tiny-1.5@main", "org/tiny-1.5@abc123"):
        assert resolve_model(spec, download=False) == wanted
        assert resolve_model(spec, download=True) == wanted


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("org/other", "nor in the local cache"),
        ("org/tiny-1.5@gone", "nor in the local cache"),
        ("org/tiny-1.5@v2", "nor in the local cache"),
        ("./nowhere", "neither a directory that exists nor a hub id"),
        ("nowhere", "neither a directory that exists nor a hub id"),
        ("", "neither a directory that exists nor a hub id"),
        ("\0", "neither a directory that exists nor a hub id"),
        ("a/b/c", "neither a directory that exists nor a hub id"),
        ("org/../../etc", "neither a directory that exists nor a hub id"),
        ("file", "a file, wanted a directory"),
    ],
)
def test_what_is_not_found_is_said(cache: Path, tmp_path: Path, spec: str, why: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="model: .*" + why) as raised:
        resolve_model(spec, download=False)
    assert raised.value.exit_code == 5


def test_a_download_is_asked_for_only_when_allowed_and_missing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def snapshot_download(name: str, revision: str, allow_patterns: list[str]) -> str:
        assert "*.safetensors" in allow_patterns
        asked.append((name, revision))
        if name == "org/broken":
            raise OSError("401: who are you?\nmore")
        return str(cache)

    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert resolve_model("org/other@v2", download=True) == cache
    assert asked == [("org/other", "v2")]
    with pytest.raises(ModelError, match=r"'org/broken' at 'main' failed: 401: who are you\?$"):
        resolve_model("org/broken", download=True)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError, match="huggingface_hub, which is not installed"):
        resolve_model("org/other", download=True)


def test_the_cache_is_where_the_usual_variables_say(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HOME")
    assert cache_folder() == Path("~/.cache/huggingface/hub").expanduser()
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/huggingface/hub")
    monkeypatch.setenv("HF_HOME", "/h")
    assert cache_folder() == Path("/h/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "/c")
    assert cache_folder() == Path("/c")


def test_the_served_name(cache: Path, tmp_path: Path) -> None:
    assert model_name("org/tiny-1.5") == "org/tiny-1.5"
    assert model_name("org/tiny-1.5@v2") == "org/tiny-1.5"
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert model_name("models/mine") == model_name(f"{tmp_path}/models/mine/") == "mine"
