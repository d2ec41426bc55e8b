"""What UCX has read from the environment by the time that a worker's transport exists, as UCX itself says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from transfer import nixl

ROOT = Path(__file__).parents[2]
TRANSPORT = """
import ctypes, os
from control.worker import make_transport
from core.worker import Identity
from tests.transfer.peer import arena
transport = make_transport("nixl", Identity("one", 1))
transport.register(arena(8, 4096), 4096)
print(transport.metadata() != b"", flush=True)
ctypes.CDLL(None).fflush(None)  # UCX writes its log through a buffered C stream
os._exit(0)
"""


@pytest.mark.skipif(nixl.available() is not None, reason=f"needs NIXL: {nixl.available()}")
def test_a_workers_ucx_never_waits_for_a_connection(tmp_path):
    """It would wait on the transfer thread: a peer whose link is cut stops all lanes, for two minutes."""
    log = tmp_path / "ucx"
    env = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
    done = subprocess.run(
        [sys.executable, "-c", TRANSPORT],
        env={**env, "UCX_LOG_LEVEL": "info", "UCX_LOG_FILE": str(log)},
        capture_output=True,
        cwd=ROOT,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    (said,) = re.findall(r"UCX_\* env variables: (.*)", log.read_text())
    assert "UCX_TCP_CONN_NB=y" in said.split()
