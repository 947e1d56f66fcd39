"""A collector for OpenTelemetry traces inside the test: OTLP over gRPC and over HTTP, on free loopback ports."""

import gzip
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self

import grpc  # type: ignore[import-untyped]  # grpcio ships no types
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service
from opentelemetry.proto.common.v1.common_pb2 import KeyValue


@dataclass(frozen=True)
class Span:
    """A span as it came over the wire; ids in hexadecimal, as in `traceparent`."""

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    service: str
    kind: int
    start: int
    attributes: dict[str, Any]
    links: tuple[tuple[str, str], ...]
    failed: bool


class Node(NamedTuple):
    """A span with the spans below it, in the order of their start: compares with plain tuples and lists."""

    service: str
    name: str
    children: list["Node"]


class OtlpSink(service.TraceServiceServicer):
    """Takes all spans of all services that export to it, and checks that they make whole trees.

    It blocks: in a coroutine call `wait` through `asyncio.to_thread` where the exporting code runs in the same loop.
    """

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._arrived = threading.Condition()
        self._threads = ThreadPoolExecutor(2)
        self._grpc = grpc.server(self._threads)
        service.add_TraceServiceServicer_to_server(self, self._grpc)  # type: ignore[no-untyped-call]  # generated code
        self._grpc_port = self._grpc.add_insecure_port("127.0.0.1:0")
        self._grpc.start()
        self._http = _HttpServer(self._add)
        self._http_thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05})
        self._http_thread.start()

    @property
    def grpc_endpoint(self) -> str:
        return f"http://127.0.0.1:{self._grpc_port}"

    @property
    def http_endpoint(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    @property
    def spans(self) -> list[Span]:
        with self._arrived:
            return list(self._spans)

    def wait(self, enough: Callable[[list[Span]], bool], seconds: float = 10) -> list[Span]:
        """Returns all spans as soon as they are enough."""
        with self._arrived:
            if not self._arrived.wait_for(lambda: enough(self._spans), seconds):
                raise TimeoutError(f"after {seconds:.0f} s there were {[span.name for span in self._spans]}")
            return list(self._spans)

    def tree(self, trace_id: str) -> Node:
        """The one tree of a trace.

        Raises:
            AssertionError: There is no root, more than one, or a span whose parent never came.
        """
        spans = sorted((span for span in self.spans if span.trace_id == trace_id), key=lambda span: span.start)
        known = {span.span_id for span in spans}
        roots = [span for span in spans if span.parent_id is None]
        orphans = [span.name for span in spans if span.parent_id is not None and span.parent_id not in known]
        assert len(roots) == 1, f"roots: {[root.name for root in roots]}"
        assert not orphans, f"spans whose parent never came: {orphans}"

        def node(span: Span) -> Node:
            below = [node(child) for child in spans if child.parent_id == span.span_id]
            return Node(span.service, span.name, below)

        return node(roots[0])

    def close(self) -> None:
        self._grpc.stop(None).wait()
        self._threads.shutdown()
        self._http.shutdown()
        self._http_thread.join()
        self._http.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def Export(  # noqa: N802  # the name is the protocol's
        self, request: messages.ExportTraceServiceRequest, _context: grpc.ServicerContext
    ) -> messages.ExportTraceServiceResponse:
        self._add(request)
        return messages.ExportTraceServiceResponse()

    def _add(self, request: messages.ExportTraceServiceRequest) -> None:
        with self._arrived:
            self._spans += _spans(request)
            self._arrived.notify_all()


class _HttpServer(ThreadingHTTPServer):
    def __init__(self, add: Callable[[messages.ExportTraceServiceRequest], None]) -> None:
        super().__init__(("127.0.0.1", 0), _HttpHandler)
        self.add = add


class _HttpHandler(BaseHTTPRequestHandler):
    server: _HttpServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.path == "/v1/traces":  # metrics and logs are welcome, and dropped
            self.server.add(messages.ExportTraceServiceRequest.FromString(body))
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # the name is the library's
        """Says nothing."""


def _spans(request: messages.ExportTraceServiceRequest) -> list[Span]:
    return [
        Span(
            trace_id=span.trace_id.hex(),
            span_id=span.span_id.hex(),
            parent_id=span.parent_span_id.hex() or None,
            name=span.name,
            service=_attributes(resource.resource.attributes).get("service.name", ""),
            kind=span.kind,
            start=span.start_time_unix_nano,
            attributes=_attributes(span.attributes),
            links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
            failed=span.status.code == span.status.STATUS_CODE_ERROR,
        )
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "string_value") for pair in pairs}
