"""Finds a model's directory: a path, or a Hugging Face id in the standard local cache.

The cache's layout is Hugging Face's own (``models--ORG--NAME/refs/REVISION`` names a directory in ``snapshots``), read
here without its library: a start from the cache must neither import nor ask anything.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from core.errors import ModelError

# One or two parts of letters, digits, '-', '_' and '.', optionally at a branch, tag or commit.
HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)


def resolve_model(spec: str, download: bool) -> Path:
    """The directory of the model `spec`, a path or a hub id (``org/name``, ``org/name@revision``).

    With `download`, a hub id that is not in the local cache is fetched into it. A directory that exists goes before a
    hub id of the same spelling. ModelError, naming what was looked for, if nothing is found.
    """
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        return path.resolve()
    named = HUB_ID.fullmatch(spec)
    if spec and path.exists():
        raise ModelError(f"model: got {spec!r}, a file, wanted a directory or a hub id")
    if named is None:
        raise ModelError(f"model: got {spec!r}, which is neither a directory that exists nor a hub id (org/name)")
    name, revision = named["id"], named["revision"] or "main"
    cached = find_cached(cache_folder(), name, revision)
    if cached is not None:
        return cached
    if download:
        return fetch(name, revision)
    raise ModelError(
        f"model: {spec!r} is neither a directory here nor in the local cache {cache_folder()}; allow downloading it, "
        "or give the path of a directory"
    )


def model_name(spec: str) -> str:
    """The name to serve a model under by default: a hub id as it is, of a path its last part."""
    if not Path(spec).expanduser().is_dir() and (named := HUB_ID.fullmatch(spec)):
        return named["id"]
    return Path(spec).expanduser().resolve().name


def cache_folder() -> Path:
    """Where Hugging Face's tools keep models on this machine, by the variables that they heed."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or str(Path(cache, "huggingface"))
    return Path(home, "hub").expanduser()


def find_cached(cache: Path, name: str, revision: str) -> Path | None:
    """The snapshot of a model in the cache, None if that revision is not there."""
    folder = cache / f"models--{name.replace('/', '--')}"
    try:
        commit = (folder / "refs" / revision).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        commit = revision
    snapshot = folder / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def fetch(name: str, revision: str) -> Path:
    """Downloads what serving needs of a model into the local cache; ModelError if it cannot be had."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelError("download: wanted the package huggingface_hub, which is not installed") from error
    # Weights in other formats than safetensors are never read.
    wanted = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:  # network, HTTP, authorization and disk errors share no ancestor
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"model: downloading {name!r} at {revision!r} failed: {why}") from error
