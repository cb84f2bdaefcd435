"""Tracing: what took how long, as OpenTelemetry spans, sent by OTLP over HTTP. What was asked or answered is not in them."""

import time
from collections.abc import Mapping

from hiddenlake import __version__
from hiddenlake.cache.errors import BadInputError

# In which what was not sent yet may still go out when a process ends, or an address takes nothing.
_SEND_SECONDS = 5.0


class Tracer:
    """Of one process. Spans leave in the background, some at a time; where nobody takes them they are dropped.

    address : such as http://localhost:4318.  command : `serve` or `worker`.

    Raises BadInputError where OpenTelemetry is not installed.
    """

    def __init__(self, address: str, command: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise BadInputError(
                "traces need OpenTelemetry, which is not installed: pip install 'hiddenlake[otel]'"
            ) from error
        resource = Resource.create({"service.name": f"hiddenlake-{command}", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(f"{address.rstrip('/')}/v1/traces", timeout=_SEND_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("hiddenlake", __version__)

    def record(
        self,
        name: str,
        seconds: float,
        attributes: Mapping[str, str | int | float],
        *,
        headers: Mapping[bytes, bytes] | None = None,
        failed: bool = False,
    ) -> None:
        """A span that ends now, after so long.

        headers : of the request that it answers, whose `traceparent` it belongs to.
        """
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        end = time.time_ns()
        told = {name: value.decode("latin-1") for name in ("traceparent", "tracestate")
                if (value := (headers or {}).get(name.encode()))}  # fmt: skip
        span = self._tracer.start_span(
            name,
            TraceContextTextMapPropagator().extract(told),
            SpanKind.INTERNAL if headers is None else SpanKind.SERVER,
            dict(attributes),
            start_time=end - int(seconds * 1e9),
        )
        if failed:
            span.set_status(StatusCode.ERROR)
        span.end(end)

    def close(self) -> None:
        """What was not sent yet is sent, or given up."""
        self._provider.shutdown()
