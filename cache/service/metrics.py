"""Metrics: what is counted, for Prometheus. No label ever holds what a client wrote, but for the names of routes."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hiddenlake.cache.service.work import Work

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One server's."""

    def __init__(self, work: Work) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Queue(work))
        own = {"registry": self.registry, "namespace": "hiddenlake"}
        self.requests = Counter(
            "requests", "Requests, by route, method and status.", ["route", "method", "status"], **own
        )
        self.seconds = Histogram(
            "request_seconds", "Until the last byte was handed on, by route.", ["route"], buckets=_SECONDS, **own
        )
        self.in_progress = Gauge("requests_in_progress", "Requests that are being answered.", **own)
        self.sent = Counter("sent_bytes", "Bytes of answers.", **own)
        self.read_seconds = Histogram(
            "read_seconds", "Reading and checking one block of activations.", buckets=_SECONDS, **own
        )
        self.read_bytes = Counter("read_bytes", "Activations that were read, in bytes.", **own)
        self.hits = Counter("resolve_hits", "Answers that were asked for and were there.", **own)
        self.misses = Counter("resolve_misses", "Answers that were asked for and were not there.", **own)
        self.evictions = Counter("evictions", "Captures that were removed to keep within the quota.", **own)
        self.logins = Counter("refused_keys", "Requests without a key that counts.", **own)


class _Queue(Collector):
    """What the queue and the workers say of themselves, which are other processes: asked for when somebody looks."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def describe(self) -> Iterator[Metric]:
        """Nothing, so that no database is asked at the start."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        counts, workers = self._work.counts(), self._work.workers()
        depth = GaugeMetricFamily("hiddenlake_queue", "Answers in the queue, by state.", labels=["state"])
        for state in ("pending", "leased", "failed"):
            depth.add_metric([state], counts.get(state, 0))
        yield depth
        yield GaugeMetricFamily(
            "hiddenlake_queue_bytes", "Activations that wait to be computed.", self._work.waiting_bytes()
        )
        yield GaugeMetricFamily(
            "hiddenlake_queue_oldest_seconds", "How long the oldest answer has waited.", self._work.oldest_wait()
        )
        yield GaugeMetricFamily("hiddenlake_workers", "Workers that run.", len(workers))
        totals = self._work.totals()
        for name, help in (
            ("answers", "Answers that were computed."),
            ("tokens", "Tokens that were computed for them."),
            ("bytes", "Activations that were stored of them."),
            ("wait_seconds", "Seconds that they waited for a worker, all together."),
        ):
            family = CounterMetricFamily(f"hiddenlake_computed_{name}", help)
            family.add_metric([], totals.get(name, 0.0))
            yield family
        for name, fact, help in (
            ("ring_used", "ring", "Share of a worker's ring that is in use."),
            ("worker_answers", "holds", "Answers that a worker is at work on."),
            ("worker_silent_seconds", "silent", "Since a worker's last sign of life."),
        ):
            gauge = GaugeMetricFamily(f"hiddenlake_{name}", help, labels=["worker"])
            for worker in workers:
                gauge.add_metric([worker["id"]], worker[fact])
            yield gauge
