"""What a process shows on /metrics. Counters and histograms are fed as things happen, gauges are read at scrape."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from core.errors import SetupError

SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    30.0,
    60.0,
)
"""Bucket bounds in seconds, after the OpenTelemetry GenAI conventions with a longer tail."""

RATIOS = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)
"""Bucket bounds of measured over predicted."""

SCRAPE_S = 5.0
"""A scrape fails if the loop does not answer within this time."""

Gauges = Iterable[tuple[str, str, dict[str, str], float]]
"""(name without prefix, help, labels, value)."""


class _Scraped(Collector):
    """Reads gauges on the loop's thread, which alone touches policies and ledger; scrapes come on another."""

    def __init__(self, read: Callable[[], Gauges]) -> None:
        self._read = read
        self._loop = asyncio.get_running_loop()

    async def _snapshot(self) -> list[tuple[str, str, dict[str, str], float]]:
        return list(self._read())

    def collect(self) -> Iterable[Metric]:
        families: dict[str, GaugeMetricFamily] = {}
        gauges = asyncio.run_coroutine_threadsafe(self._snapshot(), self._loop).result(SCRAPE_S)
        for name, text, labels, value in gauges:
            family = families.get(name)
            if family is None:
                family = families[name] = GaugeMetricFamily(f"baton_{name}", text, labels=list(labels))
            family.add_metric(list(labels.values()), value)
        return families.values()


class Metrics:
    """One process's registry and its HTTP endpoint."""

    def __init__(self, read: Callable[[], Gauges]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Scraped(read))
        self._server: WSGIServer | None = None
        self._thread: Thread | None = None

    def histogram(
        self, name: str, text: str, labels: tuple[str, ...] = (), buckets: tuple[float, ...] = SECONDS
    ) -> Histogram:
        """A histogram named baton_NAME, of seconds unless its buckets are others."""
        return Histogram(f"baton_{name}", text, labels, buckets=buckets, registry=self.registry)

    def counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        """A counter named baton_NAME."""
        return Counter(f"baton_{name}", text, labels, registry=self.registry)

    def serve(self, host: str, port: int = 0) -> str:
        """Answer GET /metrics on `host`; returns host:port."""
        try:
            self._server, self._thread = start_http_server(port, host, self.registry)
        except OSError as error:
            raise SetupError(
                f"metrics address: cannot listen on {host}:{port}: {error.strerror}", exit_code=4
            ) from error
        return f"{host}:{self._server.server_port}"

    def close(self) -> None:
        """Stop answering."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
