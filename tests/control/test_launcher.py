"""What the launcher decides before a child starts."""

from __future__ import annotations

import signal

import pytest

from control import launcher
from core.config import DeploymentConfig, GatewayConfig, WorkerConfig, from_json, to_json
from core.errors import SetupError
from core.worker import Role


@pytest.mark.parametrize(
    ("cores", "workers", "asked", "threads"),
    [(2, (1, 1), 0, 1), (2, (2, 1), 0, 1), (16, (2, 2), 0, 4), (16, (2, 2), 3, 3)],
)
def test_engines_share_the_cores(monkeypatch, cores, workers, asked, threads):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    config = DeploymentConfig(model="m", prefill=workers[0], decode=workers[1], threads=asked)
    assert launcher.engine_threads(config) == threads


def test_a_child_waits_passively_with_the_threads_it_was_given():
    environment = launcher.environment(3)
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "3"
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment["GOMP_SPINCOUNT"] == "0"
    assert environment["UCX_LOG_LEVEL"]
    assert environment["NIXL_LOG_LEVEL"]


def test_zeromq_is_never_chosen_silently(monkeypatch):
    from transfer import nixl

    assert launcher.pick_transport("zeromq") == ("zeromq", "asked for")
    monkeypatch.setattr(nixl, "available", lambda: None)
    assert launcher.pick_transport("auto") == ("nixl", "")
    monkeypatch.setattr(nixl, "available", lambda: "no wheel")
    monkeypatch.setattr("platform.system", lambda: "Linux")
    for wanted in ("auto", "nixl"):
        with pytest.raises(SetupError, match="no wheel") as refused:
            launcher.pick_transport(wanted)
        assert refused.value.exit_code == 7
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert launcher.pick_transport("auto") == ("zeromq", "no wheel")


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        (0, False),
        (-signal.SIGKILL, False),
        (-signal.SIGTERM, False),
        (-signal.SIGINT, False),
        (-signal.SIGHUP, False),
        (-signal.SIGSEGV, True),
        (-signal.SIGABRT, True),
        (-signal.SIGBUS, True),
        (-signal.SIGFPE, True),
        (-signal.SIGILL, True),
        (1, True),
        (70, True),
    ],
)
def test_who_ends_by_itself_has_crashed_and_who_is_ended_has_not(code, fault):
    assert launcher.crashed(code) == fault


@pytest.mark.parametrize(
    "config",
    [
        WorkerConfig("prefill-0", Role.PREFILL, "127.0.0.1:1", "/m", "m", exact=True, kv_memory=5),
        GatewayConfig("gateway-0", "127.0.0.1:1", "/m", "m", ttft_s=0.5),
    ],
)
def test_settings_reach_a_child_unchanged(config):
    assert from_json(to_json(config)) == config


def test_children_ask_for_huge_pages_unless_an_operator_has_tuned_their_allocator(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert launcher.environment(1)["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    assert launcher.environment(1)["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=0"
