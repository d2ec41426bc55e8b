"""A gateway's requests die with it, and nobody else's."""

from __future__ import annotations

import signal
import threading
import time

import grpc

from control.up import wait_ready
from tests.system.cluster import EMPTY_S, Cluster, Reference, request, said


def test_a_killed_gateway_takes_only_its_own_requests_with_it(exact: Cluster, reference: Reference):
    doomed = [request([60 + i, 9, 9], max_tokens=1900, ignore_eos=True) for i in range(8)]
    safe = [request([80 + i, 9, 9], max_tokens=300, ignore_eos=True) for i in range(8)]
    replies: dict[int, list] = {}
    started = threading.Barrier(3)

    def run(gateway: int, made: list) -> None:
        started.wait()
        replies[gateway] = exact.ask_all(made, gateway)

    threads = [threading.Thread(target=run, args=args) for args in ((1, doomed), (0, safe))]
    for thread in threads:
        thread.start()
    started.wait()
    time.sleep(0.5)
    exact.deployment.kill("gateway-1", signal.SIGKILL)
    killed_at = time.monotonic()
    for thread in threads:
        thread.join()
    assert all(reply.code is grpc.StatusCode.UNAVAILABLE for reply in replies[1])
    assert [reply.tokens for reply in replies[0]] == [said(reference.play(asked)) for asked in safe]
    exact.assert_empty(within_s=max(0.1, EMPTY_S - (time.monotonic() - killed_at)))
    exact.deployment.restart("gateway-1")
    wait_ready(exact.deployment)
    asked = request([3, 4, 5], max_tokens=10)
    assert exact.ask(asked, gateway=1).tokens == said(reference.play(asked))
