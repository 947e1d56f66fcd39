"""A saga is one trace: from the publishing process, over the coordinator and the handlers, to the last compensation."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from uuid import UUID

import pytest

from events.ids import TimeOrderedIds
from tests.support.base import wait_until
from tests.support.otlp import Node, OtlpSink, Span
from tests.support.processes import Process, run

pytestmark = pytest.mark.acceptance

APP = "tests.support.ledger_app:app"


@pytest.fixture(params=["grpc", "http/protobuf"])
def environment(request: pytest.FixtureRequest, amqp_url: str, pg_url: str, otlp: OtlpSink) -> dict[str, str]:
    endpoint = otlp.grpc_endpoint if request.param == "grpc" else otlp.http_endpoint
    return {
        "COORDINATOR_BROKER_URL": amqp_url,
        "COORDINATOR_DATABASE_URL": pg_url,
        "LEDGER_URL": pg_url,
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": request.param,
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }


# Fresh processes: OpenTelemetry reads some of its variables as it is imported.
@pytest.fixture
def running(environment: dict[str, str], tmp_path: Path) -> Iterator[dict[str, str]]:
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                Process(tmp_path / f"{part}.log", "run", APP, "--only", part, environment=environment, fresh=True)
            )
            for part in ("coordinator", "handlers")
        ]
        wait_until(lambda: all("is running" in process.log for process in processes), "the processes")
        yield environment


def place(environment: dict[str, str], folder: Path, numbers: list[int]) -> list[UUID]:
    """Publish orders with the command line, as any other service would be traced."""
    ids = [TimeOrderedIds().new() for _ in numbers]
    lines = [
        {
            "specversion": "1.0",
            "id": str(order),
            "source": "/shop",
            "type": "order.placed",
            "data": {"order_id": str(order), "number": number},
        }
        for order, number in zip(ids, numbers, strict=True)
    ]
    file = folder / "orders.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    run("publish", str(file), environment=environment, fresh=True)
    return ids


def shape(node: Node, depth: int = 0) -> list[str]:
    return [
        f"{'  ' * depth}{node.service}: {node.name}",
        *(line for child in node.children for line in shape(child, depth + 1)),
    ]


def finished(spans: list[Span], sagas: int) -> bool:
    """Whether the last span of each saga has come: the delivery of its announcement has no consumer, so the publish."""
    return sum(span.name.startswith("saga order: ") and " undo " in span.name for span in spans) >= 2 * sagas


def test_a_compensated_saga_is_one_tree_over_all_processes(
    running: dict[str, str], otlp: OtlpSink, tmp_path: Path
) -> None:
    """One root in the publishing process; every step's command, handler and reply below the saga's own span."""
    place(running, tmp_path, [5])
    spans = otlp.wait(lambda spans: finished(spans, 1) and settled(spans), 30)
    (trace_id,) = {span.trace_id for span in spans if span.name == "create order.placed"}
    tree = otlp.tree(trace_id)
    lines = shape(tree)
    assert lines[0] == "publish: create order.placed"
    text = "\n".join(lines)
    for step in ("reserve", "charge", "ship", "refund", "release"):
        assert f"ledger-handlers: process {step}" in text, text
    saga = next(line for line in lines if line.strip() == "ledger-coordinator: saga order")
    depth = len(saga) - len(saga.lstrip())
    decisions = [line for line in lines if "ledger-coordinator: saga order: " in line]
    assert len(decisions) == 5
    assert all(len(line) - len(line.lstrip()) == depth + 2 for line in decisions), text
    for transport in ("saga.commands,reserve send", "saga.commands receive", "saga.replies,coordinator.ledger send"):
        assert any(line.endswith(transport) for line in lines), text


def settled(spans: list[Span]) -> bool:
    """Whether no span waits for a parent that has not been exported yet."""
    known = {span.span_id for span in spans}
    return all(span.parent_id is None or span.parent_id in known for span in spans)


def test_under_load_every_saga_keeps_a_tree_of_its_own(running: dict[str, str], otlp: OtlpSink, tmp_path: Path) -> None:
    """Bundles of many traces are traces of their own, linked; they never tie two sagas together."""
    place(running, tmp_path, [5] * 60)
    spans = otlp.wait(lambda spans: finished(spans, 60) and settled(spans), 60)
    traces = {span.trace_id for span in spans if span.name == "create order.placed"}
    assert len(traces) == 60
    for trace_id in traces:
        names = shape(otlp.tree(trace_id))
        assert sum("saga order: " in name for name in names) == 5, names
