"""Clients that leave at any moment: nothing of theirs stays behind."""

from __future__ import annotations

import random
import threading
import time

import grpc

from protos.baton.v1 import inference_pb2
from tests.system.cluster import Cluster, Reference, request, said


def test_100_clients_that_leave_at_random_leave_empty_arenas(exact: Cluster, reference: Reference):
    draw = random.Random(21)
    ends: list[str] = []

    def client(number: int, prompt: list[int], after_s: float, by_abort: bool) -> None:
        asked = request(prompt, max_tokens=400, ignore_eos=True, request_id=f"leaver-{number}")
        call = exact.stub(number % 2).Generate(asked, timeout=60)
        timer = threading.Timer(after_s, leave, (call, number, by_abort))
        timer.start()
        try:
            for response in call:
                if response.HasField("end"):
                    ends.append(response.end.finish_reason)
        except grpc.RpcError as error:
            ends.append(error.code().name)
        timer.cancel()

    def leave(call, number: int, by_abort: bool) -> None:
        if by_abort:
            exact.stub(number % 2).Abort(inference_pb2.AbortRequest(request_id=f"leaver-{number}"))
        else:
            call.cancel()

    threads = []
    for number in range(100):
        prompt = [draw.randrange(3, 512) for _ in range(draw.choice([3, 70, 300, 900]))]
        args = (number, prompt, draw.choice([0.0, 0.01, 0.05, 0.2, 0.5]) * draw.random(), draw.random() < 0.3)
        threads.append(threading.Thread(target=client, args=args))
        threads[-1].start()
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert len(ends) == 100
    assert set(ends) <= {"CANCELLED", "abort", "length", "RESOURCE_EXHAUSTED"}
    assert {"CANCELLED", "abort"} <= set(ends)
    exact.assert_empty()
    asked = request([3, 4, 5], max_tokens=10)
    assert exact.ask(asked).tokens == said(reference.play(asked))
