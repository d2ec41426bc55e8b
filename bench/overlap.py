"""How much of a prompt's transfer is hidden behind its prefill, over a lane that is just as fast as the prefill.

One prefill and one decode worker on the paced engine, which occupies no core while it "computes": so what overlaps here
overlaps on machines whose engine is not the CPU. A prompt of eight chunks is measured first over the plain lane, which
says how long its prefill takes; then workers start again with a lane that brings its bytes in that same time. Hidden is
what of the transfer's time does not come after the prefill's end: ``1 - (prefill's end to Taken) / (bytes / lane)``. At
best the last chunk's part is left over: 7 of 8 are hidden.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping
from pathlib import Path

from bench.report import Row, emit, median, parser, progress
from control.client import generate
from control.launcher import Deployment
from control.up import wait_ready
from core.config import DeploymentConfig
from protos.baton.v1 import inference_pb2
from tests.checkpoints import make_llama
from tests.transfer.faults import LANE

CHUNK_TOKENS = 512
CHUNKS = 8
PACE = 6.0
"""Times an H200's seconds: a chunk takes about a tenth of one, so that this machine's own delays hardly count."""
HIDDEN = 0.7


def measure(model: Path, probes: int, env: Mapping[str, str]) -> list[tuple[float, float, int]]:
    """(prefill seconds, seconds from its end to Taken, bytes) of each probe."""
    config = DeploymentConfig(
        model=str(model),
        port=0,
        kv_memory="16M",
        chunk_tokens=CHUNK_TOKENS,
        engine="paced",
        pace=PACE,
        prefix_cache=False,
    )
    draw = random.Random(0)
    found = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        Deployment(
            config, model, "bench", log_path=Path(scratch) / "log", env=env, worker_entry="tests.live.faulty"
        ) as cluster,
    ):
        wait_ready(cluster)
        for _ in range(probes):
            request = inference_pb2.GenerateRequest(max_tokens=3, ignore_eos=True)
            request.token_ids.ids.extend(draw.randrange(10, 300) for _ in range(CHUNKS * CHUNK_TOKENS))
            (end,) = (one.end for one in generate(cluster.gateways[0], request) if one.HasField("end"))
            stages = {stage.name: stage for stage in end.stages}
            seconds = stages["prefill"].seconds, stages["handing_off"].seconds
            found.append((*seconds, int(stages["pull"].detail["nbytes"])))
            progress(f"  prefill {seconds[0] * 1e3:.0f} ms, its end to Taken {seconds[1] * 1e3:.1f} ms")
    return found


def main() -> None:
    """Measure over the plain lane, then over one that is as slow as the prefill."""
    args = parser("overlap", "what of a transfer is hidden behind the prefill").parse_args()
    probes = 5 if args.quick else 20
    with tempfile.TemporaryDirectory() as scratch:
        model = make_llama(
            Path(scratch) / "shape", layers=2, hidden=64, intermediate=64, heads=2, kv_heads=2,
            vocab=320, context=8192, dtype="bfloat16", tokenizer=True,
        )  # fmt: skip
        progress("the lane as it is")
        plain = measure(model, probes, {})
        prefill_s, nbytes = median([each[0] for each in plain]), plain[0][2]
        progress(f"a lane of {nbytes / prefill_s / 1e6:.2f} MB/s")
        slow = measure(model, probes, {LANE: str(nbytes / prefill_s)})
    hidden = [1 - after_s / prefill_s for _, after_s, _ in slow]
    found = [
        Row("hidden share of the transfer, p50", median(hidden), HIDDEN, "promised", "share"),
        Row("hidden share of the transfer, least", min(hidden), None, "", "share"),
        Row("prefill of eight chunks", prefill_s * 1e3, None, "", "ms"),
        Row("prefill's end to Taken, plain lane", median([each[1] for each in plain]) * 1e3, None, "", "ms", False),
        Row("prefill's end to Taken, slow lane", median([each[1] for each in slow]) * 1e3, None, "", "ms", False),
        Row("bytes a request", nbytes / 1e6, None, "", "MB"),
    ]
    emit("overlap", found, args.json)


if __name__ == "__main__":
    main()
