"""How far the simulator is from theory, from a peer's simulator, and from measured engines.

    python -m bench.fidelity [--quick] [--json FILE] [--write]

Theory: mean waits of M/D/1 and M/G/1. The peer: DistServe's simulator on a shared request list, every placement of its
table (`--quick`: the rates beside each knee). Measured: four vLLM timelines, the cost model fitted on requests 0 to 149
and checked on 150 to 299 (`--quick`: with the fit that is kept; `--write` keeps the new one in tests/sim/data/).
The peer and the timelines need the public tables (BATON_TRACES). docs/fidelity.md says what the figures mean.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

from bench.report import Row, emit, parser, progress
from sim import traces
from tests.sim import peer, reality, test_queueing
from tests.sim.peer import Answer, Placement
from tests.sim.reality import FITTED_ON, MEASURES, SETUPS, STATISTICS, column

LLMSERVINGSIM = {"ttft": (-4.0, 1.3, -13.6, 0.6), "tpot": (-1.0, 0.8, -1.7, 0.2), "e2e": (-1.8, 1.0, -2.2, 0.5)}
"""Its published errors of means in percent, on all 300 requests and with profiles of the very devices."""
PUBLISHED = (
    "rtxpro6000_llama31_8b_tp1",
    "rtxpro6000_qwen3_32b_tp2",
    "rtxpro6000_qwen3_30b_a3b_dp2ep2",
    "rtx4090_llama31_8b_tp1",
)


def waits(quick: bool) -> Iterator[Row]:
    """The simulator's mean wait beside Pollaczek and Khinchine's."""
    for kind in ("M/D/1", "M/G/1 two"):
        for load in test_queueing.LOADS:
            count = (5_000 if quick else 15_000) if load < 0.7 else (10_000 if quick else 60_000)
            total = 0.0
            runs = [(seed, mirrored) for seed in ((1,) if quick else (1, 2)) for mirrored in (False, True)]
            for seed, mirrored in runs:
                arriving = test_queueing.customers(kind, load, seed, count, mirrored=mirrored)
                total += math.fsum(test_queueing.waits(arriving, "prefill"))
            mean_s = total / (len(runs) * count)
            wanted_s = test_queueing.expected_s(kind, load)
            progress(f"{kind} at {load}: {mean_s:.5f} s, want {wanted_s:.5f} s")
            yield Row(f"mean wait, {kind} at load {load}", mean_s, wanted_s, "Pollaczek-Khinchine", "s", False)


def beside_knee(answers: list[Answer]) -> list[Answer]:
    """The two rates between which 90 % are passed, or the middle one."""
    ordered = sorted(answers, key=lambda each: each.rate)
    for low, high in itertools.pairwise(ordered):
        if low.both >= 90 > high.both:
            return [low, high]
    return [ordered[len(ordered) // 2]]


def placement_rows(folder: Path, placement: Placement, theirs: list[Answer], quick: bool) -> Iterator[Row]:
    """Worst differences of one placement, and its knee."""
    compared = beside_knee(theirs) if quick else theirs
    ours = [peer.run(folder, placement, each.rate)[0] for each in compared]
    pairs = list(zip(ours, compared, strict=True))
    worst = {
        "ttft": max(abs(a.ttft - b.ttft) for a, b in pairs),
        "tpot": max(abs(a.tpot - b.tpot) for a, b in pairs),
        "both": max(abs(a.both - b.both) for a, b in pairs),
    }
    progress(f"{placement.name}: worst differences {worst}")
    for share, points in worst.items():
        yield Row(f"{placement.name}: worst of {len(pairs)} rates, {share}", points, None, "", "percent points", False)
    yield Row(
        f"{placement.name}: 90 % of requests in time",
        peer.knee(ours), peer.knee(compared), "simdistserve", "requests/s/GPU",
    )  # fmt: skip


def timeline_rows(folder: Path, fitted: dict[str, reality.Fitted], fresh: bool) -> Iterator[Row]:
    """All errors of both halves of each timeline; fits first, if `fresh`."""
    for setup in SETUPS:
        arrivals, seen = reality.timeline(folder / setup.file)
        if fresh:
            progress(f"fitting {setup.name}, {reality.CALLS} simulations")
            fitted[setup.name] = reality.fit(setup, arrivals, seen)
            # As it is read back.
            fitted.update(reality.read(reality.document({setup.name: fitted[setup.name]})))
        ours = reality.replay(setup, fitted[setup.name], arrivals)
        progress(f"{setup.name}: {fitted[setup.name]}")
        halves = (("fitted", slice(0, FITTED_ON)), ("checked", slice(FITTED_ON, None)))
        for half, part in halves:
            for measure in MEASURES:
                a, b = column(ours[part], measure), column(seen[part], measure)
                for name, of in STATISTICS.items():
                    yield Row(f"{setup.name}, {half}: {measure} {name}", of(a), of(b), "vLLM 0.19", "s", False)
        for measure in MEASURES:
            a, b = column(ours, measure), column(seen, measure)
            error = 100 * (reality.mean(a) / reality.mean(b) - 1)
            other = LLMSERVINGSIM[measure][PUBLISHED.index(setup.name)]
            yield Row(
                f"{setup.name}: error of the mean {measure}, all requests",
                abs(error), abs(other), "LLMServingSim", "percent", False,
            )  # fmt: skip


def main() -> None:
    flags = parser("fidelity", "How far the simulator is from theory, a peer and measurements.")
    flags.add_argument("--write", action="store_true", help="fit, and keep what was fitted for the tests")
    options = flags.parse_args()
    rows = list(waits(options.quick))
    folder = traces.folder()
    if (folder / peer.ANSWERS).is_file():
        for placement, theirs in peer.answers(folder).items():
            rows += placement_rows(folder, placement, theirs, options.quick)
        fresh = options.write or not options.quick
        fitted = {} if fresh else reality.kept()
        rows += timeline_rows(folder, fitted, fresh)
        if options.write:
            reality.FITTED.parent.mkdir(exist_ok=True)
            reality.FITTED.write_text(json.dumps(reality.document(fitted), indent=1) + "\n", encoding="utf-8")
    else:
        progress(f"{folder}: no public tables there (BATON_TRACES); only theory was compared")
    emit("fidelity", rows, options.json)


if __name__ == "__main__":
    main()
