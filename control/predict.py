"""`baton simulate --recording DIR`: what was measured in a deployment, beside what the simulator says of it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from control.simulate import aligned, find, names
from core.errors import LocalError, SetupError
from sim.deployment import Deployment, deployment
from sim.predicted import SHARES, Seen, measured, predicted

BESIDE = ("recording", "compare", "output", "state", "verb")
"""What may be said beside the recording, which says all else."""


def run(args: argparse.Namespace, defaults: argparse.Namespace, *, as_json: bool) -> int:
    """Simulate what was recorded, by its own policy and by those to compare with."""
    given = [name for name, value in vars(args).items() if name not in BESIDE and value != getattr(defaults, name)]
    if given:
        raise SetupError(f"{given[0]}: got {getattr(args, given[0])!r} with a recording, want nothing: it says that")
    path = Path(args.recording)
    try:
        recorded = deployment(path)
    except LocalError as error:
        raise SetupError(f"{path}: {error}") from None
    seen = measured(recorded.calls)
    said = {recorded.policy.name: predicted(recorded)}
    for name in names("", args.compare):
        if name not in said:
            other = find(name)
            config = recorded.policy.prefill_config
            sized = other.sized(
                chunk_tokens=config.chunk_tokens,
                max_rows=config.max_rows,
                max_steps=recorded.policy.decode_config.max_steps,
                suspends=config.preempt,
            )
            said[other.name] = predicted(recorded, sized)
    if as_json:
        document = {"recording": str(path), "assumed": assumed(recorded), "measured": figures(seen)}
        print(json.dumps({**document, "predicted": {name: figures(each) for name, each in said.items()}}))
        return 0
    print("\n".join(_head(path, recorded)))
    for name, each in said.items():
        print()
        print(table(seen, each, name))
    return 0


def assumed(recorded: Deployment) -> dict[str, Any]:
    """All that the simulation was told beside the requests, with units."""
    settings = recorded.settings
    return {
        "workers": {build.name: str(build.role) for build in recorded.builds},
        "policy": recorded.policy.name,
        "hop_s": settings.hop_s,
        "read_s": recorded.read_s,
        "terms": {name: dataclasses.asdict(each) for name, each in recorded.terms.items()},
        "faults": [
            {"kind": type(each).__name__.lower(), **dataclasses.asdict(each)} for each in recorded.scenario.faults
        ],
    }


def figures(seen: Seen) -> dict[str, Any]:
    """For JSON."""
    return dataclasses.asdict(seen) | {
        "ttft_s": {f"p{100 * share:g}": value for share, value in zip(SHARES, seen.ttft_s, strict=True)},
        "gap_s": {f"p{100 * share:g}": value for share, value in zip(SHARES, seen.gap_s, strict=True)},
    }


def differences(seen: Seen, said: Seen) -> list[tuple[str, float, float]]:
    """Every percentile by name: measured and predicted, in seconds."""
    pairs = (("TTFT", seen.ttft_s, said.ttft_s), ("gap", seen.gap_s, said.gap_s))
    return [
        (f"{name} p{100 * share:g}", ours, theirs)
        for name, all_ours, all_theirs in pairs
        for share, ours, theirs in zip(SHARES, all_ours, all_theirs, strict=True)
    ]


def table(seen: Seen, said: Seen, name: str) -> str:
    """Measured, predicted, and by how much the prediction is off."""
    rows: list[tuple[str, ...]] = [(name.upper(), "MEASURED", "PREDICTED", "DIFFERENCE")]
    for what, ours, theirs in differences(seen, said):
        off = f"{100 * (theirs / ours - 1):+.1f} %" if ours else ""
        rows.append((what, f"{1e3 * ours:.2f} ms", f"{1e3 * theirs:.2f} ms", off))
    for what in ("requests", "served", "rejected", "failed", "again", "tokens"):
        count, other = getattr(seen, what), getattr(said, what)
        label = "placed again" if what == "again" else what
        rows.append((label, f"{count:,}", f"{other:,}", f"{other - count:+,}" if other != count else ""))
    return aligned(rows)


def _head(path: Path, recorded: Deployment) -> Sequence[str]:
    settings, work = recorded.settings, recorded.workload
    roles = [str(build.role) for build in recorded.builds]
    fleet = ", ".join(f"{roles.count(role)} {role}" for role in dict.fromkeys(roles))
    terms = recorded.terms.values()
    ratios = [each for term in terms for each in (term.prefill, term.decode)]
    turn_ms, pause_ms = (
        1e3 * max(values) for values in zip(*((each.turn_s, each.pause_s) for each in terms), strict=True)
    )
    hop_ms, read_ms = 1e3 * settings.hop_s, 1e3 * recorded.read_s
    return [
        f"{path}: {len(work):,} requests in {work.span_s:.1f} s; {fleet}; policy {recorded.policy.name}",
        f"steps take {min(ratios):.3f} to {max(ratios):.3f} of what workers learned; beside them a message takes "
        f"{hop_ms:.2f} ms, a read {read_ms:.2f} ms, an order at most {turn_ms:.2f} ms and {pause_ms:.2f} ms a step",
        *(
            f"{type(each).__name__.lower()} {getattr(each, 'worker', '')} at {each.at_s:.1f} s"
            for each in recorded.scenario.faults
        ),
    ]
