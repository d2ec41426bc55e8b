"""Settings: what is wrong is named, what is right comes back as it was."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.config import (
    CoordinatorConfig,
    DeploymentConfig,
    GatewayConfig,
    WorkerConfig,
    build,
    from_json,
    nbytes,
    to_json,
    weights,
)
from core.errors import SetupError
from core.worker import Role
from tests.cast import QUICK

GATEWAY = {"name": "g", "coordinator": "h:1", "model": "m", "served_name": "s"}


def test_fields_are_taken_and_the_rest_keep_their_defaults():
    config = build(GatewayConfig, {**GATEWAY, "timeout_s": 5, "check": True}, "gateway")
    assert config == GatewayConfig("g", "h:1", "m", "s", timeout_s=5.0, check=True)
    assert isinstance(config.timeout_s, float)


def test_an_unknown_setting_is_named_with_those_that_exist():
    with pytest.raises(SetupError, match="flags: got unknown setting 'wokers', want one of check, chunk_tokens, "):
        build(DeploymentConfig, {"model": "m", "wokers": 3}, "flags")


def test_a_missing_setting_is_named():
    with pytest.raises(SetupError, match="flags: served_name is missing"):
        build(GatewayConfig, {name: GATEWAY[name] for name in ("name", "coordinator", "model")}, "flags")


@pytest.mark.parametrize(
    ("field", "value", "want"),
    [
        ("timeout_s", "5", "float"),
        ("timeout_s", True, "float"),
        ("check", 1, "bool"),
        ("listen", 5, "str"),
        ("name", None, "str"),
    ],
)
def test_a_mistyped_setting_is_named_with_what_was_wanted(field, value, want):
    with pytest.raises(SetupError, match=f"x: {field}: got {value!r}, want {want}"):
        build(GatewayConfig, {**GATEWAY, field: value}, "x")


@pytest.mark.parametrize("value", [True, 1.5, "3"])
def test_a_count_is_a_whole_number(value):
    with pytest.raises(SetupError, match="prefill: got"):
        build(DeploymentConfig, {"model": "m", "prefill": value}, "x")


def test_a_role_is_taken_by_its_name():
    values = {"name": "w", "coordinator": "h:1", "model": "m", "served_name": "s"}
    assert build(WorkerConfig, {**values, "role": "mixed"}, "x").role is Role.MIXED
    with pytest.raises(SetupError, match="role: got 'both', want Role"):
        build(WorkerConfig, {**values, "role": "both"}, "x")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prefill": -1}, "prefill: got -1"),
        ({"prefill": 0}, "workers: got 0 prefill, 1 decode, 0 mixed"),
        ({"decode": 0}, "workers: got 1 prefill, 0 decode, 0 mixed"),
        ({"gateways": 0}, "gateways: got 0"),
        ({"max_steps": 0}, "max_steps: got 0"),
        ({"migrate_below_steps": 193}, "migrate_below_steps: got 193, want in 0..192"),
        ({"migrate_below_steps": -1}, "migrate_below_steps: got -1"),
        ({"port": 65536}, "port: got 65536"),
        ({"transport": "tcp"}, "transport: got 'tcp'"),
        ({"dtype": "int8"}, "dtype: got 'int8'"),
        ({"engine": "steam"}, "engine: got 'steam', want torch or paced"),
        ({"pace": -1.0}, "pace: got -1.0"),
        ({"stop_rate": 1.5}, "stop_rate: got 1.5"),
        ({"page_tokens": 48}, "page_tokens: got 48"),
        ({"prefill_page_tokens": 48}, "prefill_page_tokens: got 48, want a divisor of 256, or 0 for page_tokens"),
        ({"prefill_page_tokens": -1}, "prefill_page_tokens: got -1"),
        ({"kv_memory": "plenty"}, "kv_memory: got 'plenty'"),
        ({"kv_memory": "0"}, "kv_memory: got '0'"),
        ({"host_memory": "some"}, "host_memory: got 'some'"),
        ({"host_memory": "-1"}, "host_memory: got '-1'"),
        ({"deadline_s": -1.0}, "deadline_s: got -1.0"),
        ({"tenants": "a=2,a=3"}, "tenants: got 'a=3'"),
    ],
)
def test_a_deployment_that_cannot_work_says_why(values, message):
    with pytest.raises(SetupError, match=message):
        build(DeploymentConfig, {"model": "m", **values}, "x")


def test_a_mixed_worker_alone_is_enough():
    assert DeploymentConfig("m", prefill=0, decode=0, mixed=1).workers == 1


@pytest.mark.parametrize(
    "config",
    [
        WorkerConfig("w", Role.DECODE, "h:1", "m", "s", exact=True, kv_memory=2**33),
        GatewayConfig("g", "h:1", "m", "s", gap_s=0.25),
        CoordinatorConfig(lease_s=2.0),
    ],
)
def test_settings_survive_the_way_to_their_process(config):
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("1048576", 2**20),
        ("64K", 64 * 2**10),
        ("64k", 64 * 2**10),
        ("256M", 256 * 2**20),
        ("256MiB", 256 * 2**20),
        ("256MB", 256 * 2**20),
        ("1.5G", 3 * 2**29),
        (" 2 T ", 2 * 2**40),
    ],
)
def test_bytes_are_read_with_their_unit(text, want):
    assert nbytes(text) == want


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("", ()),
        (" ", ()),
        ("a=2", (("a", 2.0),)),
        (" a=2, b=0.5", (("a", 2.0), ("b", 0.5))),
        ("x=y=3", (("x=y", 3.0),)),
    ],
)
def test_weights_of_tenants_are_read(text, want):
    assert weights(text) == want


@pytest.mark.parametrize("text", ["a", "a=", "=2", "a=0", "a=-1", "a=inf", "a=nan", "a=2,,b=1", "a=2,a=3"])
def test_weights_that_mean_nothing_are_refused(text):
    with pytest.raises(SetupError, match="tenants: got"):
        weights(text)


@pytest.mark.parametrize("text", ["", "G", "0", "-1M", "64Q", "inf", "1e999", "nan", "ten", "0.5"])
def test_bytes_that_mean_nothing_are_refused(text):
    with pytest.raises(SetupError, match="kv_memory: got"):
        nbytes(text)


@QUICK
@given(st.text())
def test_any_text_gives_bytes_or_a_setup_error(text):
    try:
        assert nbytes(text) >= 1
    except SetupError:
        pass
