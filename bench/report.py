"""How every benchmark reports: the machine, its rows, and one JSON line last.

``ratio`` is made here so that above 1 always means that we are better, whichever way the unit counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One case: our figure beside a peer's, in `unit`. A `peer` of None is a figure without a comparison."""

    case: str
    ours: float
    peer: float | None
    peer_name: str
    unit: str
    higher_is_better: bool = True

    @property
    def ratio(self) -> float | None:
        """Ours against the peer's, above 1 if ours is better; None without a peer or where one side is zero."""
        if self.peer is None or self.ours == 0 or self.peer == 0:
            return None
        return self.ours / self.peer if self.higher_is_better else self.peer / self.ours

    def document(self) -> dict[str, Any]:
        """The row as it appears in the JSON line."""
        ratio = self.ratio
        return {
            "case": self.case,
            "ours": _short(self.ours),
            "peer": None if self.peer is None else _short(self.peer),
            "peer_name": self.peer_name,
            "unit": self.unit,
            "higher_is_better": self.higher_is_better,
            "ratio": None if ratio is None else _short(ratio),
        }


def _short(value: float) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{value:.4g}")


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What the figures were taken on: CPU, cores, memory, load, versions and the thread settings in force."""
    versions = {}
    for name in ("torch", "numpy", "grpcio", "pyzmq", "nixl-cu13", "transformers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
        "environment": {
            name: os.environ[name]
            for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
            if name in os.environ
        },
    }


def emit(name: str, rows: Iterable[Row], json_path: str | Path | None = None) -> dict[str, Any]:
    """Print the report as the last line of stdout, write it to `json_path` too if given, and return it."""
    document = {"bench": name, "machine": machine(), "rows": [row.document() for row in rows]}
    line = json.dumps(document)
    if json_path is not None:
        Path(json_path).write_text(json.dumps(document, indent=1) + "\n")
    print(line, flush=True)
    return document


def progress(message: str) -> None:
    """Say on stderr how far the benchmark is; stdout stays the report's."""
    print(message, file=sys.stderr, flush=True)


def parser(name: str, promise: str) -> argparse.ArgumentParser:
    """The flags that every benchmark takes: ``--quick`` (under a minute) and ``--json FILE``."""
    flags = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=promise)
    flags.add_argument("--quick", action="store_true", help="a smaller run, under a minute")
    flags.add_argument("--json", metavar="FILE", help="also write the report to FILE")
    return flags


def median(values: Sequence[float]) -> float:
    """The middle of `values` (the lower of the two where their number is even)."""
    return sorted(values)[(len(values) - 1) // 2]
