"""Metrics: what is counted, for Prometheus. No label ever holds what a client wrote, but for the names of routes."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One server's."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
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
