"""Groups as flags and files say them."""

from __future__ import annotations

import json

import pytest

from core.config import DeploymentConfig, GatewayConfig, build, from_json, to_json
from core.errors import SetupError
from core.group import Group

CHAT = Group("chat", prefill=2, decode=1, ttft_s=0.4)


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("chat: 2 prefill, 1 decode, ttft_s=0.4", CHAT),
        ("chat:2 prefill,1 decode,ttft_s = 0.4", CHAT),
        ("x-1.b: 1 mixed", Group("x-1.b", mixed=1)),
        ("a: 1 prefill, 1 decode, 2 mixed, gap_s=.05", Group("a", 1, 1, 2, gap_s=0.05)),
    ],
)
def test_a_flag_says_a_group(text, group):
    assert Group.parse(text) == group


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("chat", "group: got 'chat', want NAME: COUNT prefill"),
        (": 1 mixed", "group: got ': 1 mixed', want NAME"),
        ("a: 2 workers", "group: got '2 workers' in"),
        ("a: 1 mixed, 2 mixed", "group: got '2 mixed' in"),
        ("a: 1 mixed, ttft_s=soon", "group: got 'ttft_s=soon' in"),
        ("a: 1 mixed, gap_s=nan", "group 'a': gap_s: got nan, want a finite time"),
        ("a: 1 prefill", "group 'a': got 1 prefill, 0 decode, 0 mixed; want a prefill and a decode worker"),
        ("a b: 1 mixed", "group 'a b': name: got 'a b', want up to 63 letters"),
        ("-a: 1 mixed", "group '-a': name: got '-a'"),
    ],
)
def test_a_flag_that_says_none_is_refused_with_what_it_got(text, why):
    with pytest.raises(SetupError) as raised:
        Group.parse(text)
    assert str(raised.value).startswith(why)


@pytest.mark.parametrize(
    ("fields", "bounds"),
    [
        ({"prefill": 2, "decode": 3}, (1, 4)),
        ({"prefill": 2, "decode": 3, "least_prefill": 2, "most_prefill": 3}, (2, 3)),
        ({"prefill": 2, "decode": 3, "most_prefill": 9}, (1, 4)),
    ],
)
def test_the_ratio_stays_within_bounds_and_never_takes_all(fields, bounds):
    assert Group("a", **fields).prefills == bounds


def test_pools_must_be_within_their_own_bounds():
    with pytest.raises(SetupError, match="group 'a': prefill: got 3, want 1 to 2, its own bounds"):
        Group("a", prefill=3, decode=1, most_prefill=2)
    with pytest.raises(SetupError, match="group 'a': least_prefill: got -1, want at least 0"):
        Group("a", mixed=1, least_prefill=-1)


def test_a_file_has_a_table_a_group_and_other_settings_are_refused():
    table = {"name": "chat", "prefill": 2, "decode": 1, "ttft_s": 0.4}
    config = build(DeploymentConfig, {"model": "m", "group": [table]}, "x.toml")
    assert config.groups == (Group("", 1, 1), CHAT)
    assert config.workers == 5
    with pytest.raises(SetupError, match=r"x\.toml: group: got unknown setting 'rows', want one of decode, gap_s"):
        build(DeploymentConfig, {"model": "m", "group": [{"name": "a", "rows": 3}]}, "x.toml")
    for wrong in ("chat", [1], {"name": "a"}):
        with pytest.raises(SetupError, match=r"x.toml: group: got .*, want \[\[group\]\] tables"):
            build(DeploymentConfig, {"model": "m", "group": wrong}, "x.toml")


def test_without_workers_for_requests_that_name_no_group_there_must_be_groups():
    config = DeploymentConfig("m", prefill=0, decode=0, group=(CHAT,))
    assert config.groups == (CHAT,)
    assert config.workers == 3
    with pytest.raises(SetupError, match="want a prefill and a decode worker"):
        DeploymentConfig("m", prefill=0, decode=0)
    with pytest.raises(SetupError, match="want a prefill and a decode worker"):
        DeploymentConfig("m", prefill=1, decode=0, group=(CHAT,))


@pytest.mark.parametrize(("groups", "why"), [((CHAT, CHAT), "'chat' 2 times"), ((Group(mixed=1),), "'' 1 times")])
def test_each_name_is_there_once_and_is_one(groups, why):
    with pytest.raises(SetupError, match=f"group: got the name {why}, want a name once"):
        DeploymentConfig("m", group=groups)


def test_a_gateway_is_told_of_the_groups():
    config = GatewayConfig("gateway-0", "here:1", "m", "m", group=(Group("", 1, 1), CHAT))
    assert json.loads(to_json(config))["group"][1]["name"] == "chat"
    assert from_json(to_json(config)) == config
