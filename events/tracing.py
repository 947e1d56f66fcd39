"""Trace contexts as the two strings that envelopes carry (W3C Trace Context), and back.

All spans of this project come from here. Without an SDK set up they cost next to nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context, attach, detach, get_current
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.span import TraceState

_tracer = trace.get_tracer("saga_coordinator")
_HEX_VERSION_LENGTH = 55
ROOT = Context()


def span_context(traceparent: str, tracestate: str | None = None) -> SpanContext:
    """Return the remote span that `traceparent` names."""
    return SpanContext(
        trace_id=int(traceparent[3:35], 16),
        span_id=int(traceparent[36:52], 16),
        is_remote=True,
        trace_flags=TraceFlags(int(traceparent[53:55], 16)),
        trace_state=TraceState.from_header([tracestate]) if tracestate else TraceState(),
    )


def context_of(traceparent: str | None, tracestate: str | None = None) -> Context:
    """Return the OpenTelemetry context whose current span is `traceparent`; an empty one for None."""
    if traceparent is None or len(traceparent) != _HEX_VERSION_LENGTH:
        return ROOT
    return trace.set_span_in_context(NonRecordingSpan(span_context(traceparent, tracestate)), ROOT)


def traceparent_of(span: Span) -> str | None:
    """Return the W3C form of `span`, None when nothing is traced."""
    if span is trace.INVALID_SPAN:
        return None
    context = span.get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def current_span() -> Span:
    """Return the span that is current here; an invalid one when nothing is traced."""
    return trace.get_current_span()


def current_traceparent() -> str | None:
    """Return the W3C form of the current span, None when nothing is traced."""
    return traceparent_of(trace.get_current_span())


def tracestate_of(span: Span) -> str | None:
    """Return the vendor part of the trace context of `span`, None when there is none."""
    if span is trace.INVALID_SPAN:
        return None
    return span.get_span_context().trace_state.to_header() or None


@contextmanager
def in_context(context: Context) -> Iterator[None]:
    """Make `context` the current one for the block."""
    token = attach(context)
    try:
        yield
    finally:
        detach(token)


class _Off:
    """The span of a process that traces nothing: two cheap calls instead of a generator and a tracer."""

    def __enter__(self) -> Span:
        return trace.INVALID_SPAN

    def __exit__(self, *_: object) -> None:
        """Nothing was begun."""


_off = _Off()


def is_on() -> bool:
    """Say whether an OpenTelemetry SDK is set up in this process."""
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


def span(
    name: str,
    *,
    parent: Context,
    kind: SpanKind = SpanKind.INTERNAL,
    links: Sequence[str] = (),
    attributes: Mapping[str, Any] | None = None,
) -> AbstractContextManager[Span]:
    """Run the block in a span below `parent`; an exception is recorded and marks it as an error."""
    if not is_on():
        return _off
    return _tracer.start_as_current_span(
        name,
        context=parent,
        kind=kind,
        links=[Link(span_context(link)) for link in links],
        attributes=attributes,
    )


@dataclass(frozen=True, slots=True)
class Created:
    """The trace context that a message carries from its birth."""

    traceparent: str | None
    tracestate: str | None


@contextmanager
def created(message_type: str) -> Iterator[Created]:
    """Run the block in a span for a message coming into being, below the caller's own span if there is one."""
    with span(f"create {message_type}", parent=get_current(), kind=SpanKind.PRODUCER) as current:
        yield Created(traceparent_of(current), tracestate_of(current))


def parent_and_links(
    traceparent: str | None, tracestate: str | None, transport: str | None
) -> tuple[Context, tuple[str, ...]]:
    """Return where the span that treats a message belongs.

    Below the delivery where that is part of the message's own trace; a bundle of several traces is a trace of
    its own, and each message's span then stays below its sender and is linked to the delivery.
    """
    if transport is None:
        return context_of(traceparent, tracestate), ()
    if traceparent is None or traceparent[3:35] == transport[3:35]:
        return context_of(transport, tracestate), ()
    return context_of(traceparent, tracestate), (transport,)


def mark_failed(current: Span, description: str) -> None:
    """Mark a span whose work ended badly without an exception leaving it."""
    current.set_status(Status(StatusCode.ERROR, description))
