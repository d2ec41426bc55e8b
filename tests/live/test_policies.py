"""Live workers decide as the policy says that the deployment names: the same classes as in the simulator.

Engines are paced, so that who is served when is decided by the policies and not by this machine.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from control import costs
from control.client import members
from control.launcher import Deployment
from core.config import DEFAULT_COST, DeploymentConfig
from core.errors import SetupError
from protos.baton.v1 import common_pb2
from sim.fleet import resolve
from tests.engine.chain import Chain
from tests.live.asks import ENDS, case
from tests.live.cluster import Client, together, until

PACE = 10.0
SLOW = {"engine": "paced", "pace": PACE, "chunk_tokens": 512, "kv_memory": "8M", "max_steps": 4}
"""A full step of a prefill worker takes 0.1 s."""


@pytest.fixture(scope="module")
def reference(model):
    """The definition, with tokens and nothing else."""
    return Chain.of(model, 320, 8192, (0, *ENDS), 0.0)


@pytest.fixture(scope="module")
def ours(launch, model):
    """A worker of each phase, with our policy, which is the default."""
    live = launch("ours", model, **SLOW)
    assert live.config.policy == "baton"
    yield live
    live.stop()


def order(live, reference):
    """In which order three long prompts and a short one, which comes last, have their first tokens."""
    longs = {f"long {n}": case(3000 + n, 1, n, forever=True) for n in range(3)}
    cases = {**longs, "short": case(100, 1, 9, forever=True)}
    ended = []

    def queued(state, count):
        def there():
            return live.metric("prefill-0", "baton_requests", phase="prefill", state=state) >= count

        return asyncio.to_thread(until, there, f"{count} are {state}")

    async def send(client, name):
        reply = await client.generate(cases[name].request)
        ended.append(name)
        cases[name].check(reply, reference)

    async def run():
        async with Client(live.gateway) as client:
            going = [asyncio.create_task(send(client, "long 0"))]
            await queued("running", 1)
            for n in (1, 2):
                going.append(asyncio.create_task(send(client, f"long {n}")))
                await queued("queued", n)
            await asyncio.gather(*going, send(client, "short"))

    asyncio.run(run())
    return ended


def test_a_short_prompt_passes_long_ones_that_came_before_it(ours, reference):
    ended = order(ours, reference)
    assert ended.index("short") < ended.index("long 1"), "it waits for a chunk, not for whole prompts"
    assert [name for name in ended if name != "short"] == ["long 0", "long 1", "long 2"]


@pytest.mark.slow
def test_the_deployment_says_which_policy_and_first_come_first_served_is_another(launch, model, reference):
    live = launch("fcfs", model, **SLOW, policy="fcfs")
    assert order(live, reference) == ["long 0", "long 1", "long 2", "short"]
    live.stop()


@pytest.mark.parametrize(("gap_s", "most"), [(0.0, 6), (0.001, 1)], ids=["best effort", "promised"])
def test_a_batch_is_no_larger_than_promised_gaps_allow(ours, reference, gap_s, most):
    """No step is as short as 1 ms here: who was promised that decodes alone, and without promises all go together."""
    cases = [case(40 + n, 12, 30 + n, forever=True) for n in range(6)]
    for each in cases:
        each.request.slo.CopyFrom(common_pb2.Slo(gap_s=gap_s))
    seen = []

    async def run():
        async with Client(ours.gateway) as client:
            going = asyncio.create_task(together(*(client.generate(each.request) for each in cases)))
            while not going.done():
                seen.append(
                    await asyncio.to_thread(ours.metric, "decode-0", "baton_requests", phase="decode", state="running")
                )
                await asyncio.sleep(0.02)
            return await going

    for each, reply in zip(cases, asyncio.run(run()), strict=True):
        each.check(reply, reference)
    assert max(seen) == most


def test_what_steps_take_is_told_and_compared_with_what_was_predicted(ours, reference):
    each = case(600, 20, 77, forever=True)

    async def run():
        async with Client(ours.gateway) as client:
            return await client.generate(each.request)

    each.check(asyncio.run(run()), reference)
    model, _, _ = resolve(DEFAULT_COST, None, "tcp")
    want = model.at(PACE, PACE)
    for member in members(ours.deployment.coordinator):
        if member.role != "gateway":
            assert len(member.costs.decode) == 3 * len(want.decode)
            fixed = max(member.costs.decode[::3])
            assert fixed == pytest.approx(max(line[0] for line in want.decode), rel=0.5), "a paced engine's own"
    for worker, phase in (("prefill-0", "prefill"), ("decode-0", "decode")):
        assert ours.metric(worker, "baton_step_cost_ratio_count", phase=phase) > 0
        predicted_s = ours.metric(worker, "baton_step_predicted_seconds_total", phase=phase)
        assert 0 < predicted_s < 2 * ours.metric(worker, "baton_step_measured_seconds_total", phase=phase)
        assert ours.metric(worker, "baton_step_cost_samples", what="learned") > 0


def test_memory_is_promised_by_forecast_and_rows_that_outgrow_it_are_computed_again(launch, model, reference):
    """61 pages: two rows of 420 tokens. Sixty short answers later nobody is expected to be long, and all are."""
    live = launch("forecast", model, engine="paced", pace=0.3, kv_memory="256K", prefix_cache=False, hash_logits=True)
    short = [case(10 + n, 6, n, forever=True) for n in range(60)]
    long = [case(20 + n, 400, 200 + n, forever=True) for n in range(8)]
    seen = []

    def running():
        return live.metric("decode-0", "baton_requests", phase="decode", state="running")

    async def run():
        async with Client(live.gateway) as client:
            before = await together(*(client.generate(each.request) for each in short))
            going = asyncio.create_task(together(*(client.generate(each.request) for each in long)))
            while not going.done():
                seen.append(await asyncio.to_thread(running))
                await asyncio.sleep(0.02)
            return [*before, *await going]

    for each, reply in zip([*short, *long], asyncio.run(run()), strict=True):
        each.check(reply, reference)
        assert reply.hashes == reference.hashes(each.prompt, each.sampling)
        assert reply.last.attempts == 1, "nobody is failed for want of memory"
    assert max(seen) > 2, "no more than by their longest lengths"
    assert live.metric("decode-0", "baton_rows_retired", how="evicted") > 0
    assert live.metric("decode-0", "baton_recomputed_tokens") > 0
    live.stop()


def test_workers_of_a_kind_are_profiled_once_and_what_was_found_is_kept(launch, model):
    live = launch("profiled", model, profile_s=0.3, dtype="float32", engine="torch")

    def said(words):
        return [line["message"] for line in live.lines() if line["message"].startswith(words)]

    assert len(said("profiling steps for up to 0.3 s")) == 1
    assert len(said("steps: profiled")) == 1
    (found,) = said("steps: from")
    path = Path(found.removeprefix("steps: from ").partition(": ")[0])
    assert path.parent == costs.directory()
    assert "cost" in json.loads(path.read_text())
    live.stop()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("colocated-chunked", "got 2 prefill and decode workers, want mixed ones only"),
        ("best", "want one of baton, fcfs"),
    ],
)
def test_a_policy_that_cannot_run_live_is_refused_with_a_sentence(model, name, why):
    with pytest.raises(SetupError, match=why):
        Deployment(DeploymentConfig(str(model), policy=name), model, "m")
