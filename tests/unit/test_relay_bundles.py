"""How the relay puts waiting messages together."""

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.bus import Address, Exchange
from events.codec import Limits, bundle_body
from events.relay import Bundle, Entry, bundled

CHARGE = Address(Exchange.COMMANDS, "charge.card")
PLACED = Address(Exchange.EVENTS, "order.placed")


def entry(
    number: int, address: Address = CHARGE, *, bundle: int = 64, body: bytes = b"{}", trace: str | None = None
) -> Entry:
    return Entry(UUID(int=number), address, bundle, body, trace, None)


def numbers(bundles: list[Bundle]) -> list[list[int]]:
    return [[each.id.int for each in bundle.entries] for bundle in bundles]


def test_messages_for_one_address_travel_together_in_order() -> None:
    entries = [entry(1), entry(2, PLACED), entry(3), entry(4, PLACED), entry(5)]
    assert numbers(bundled(entries, Limits(), share=1)) == [[1, 3, 5], [2, 4]]


def test_the_same_key_on_another_exchange_is_another_address() -> None:
    other = Address(Exchange.EVENTS, CHARGE.key)
    assert numbers(bundled([entry(1), entry(2, other)], Limits(), share=1)) == [[1], [2]]


def test_a_class_limits_its_own_bundles() -> None:
    entries = [entry(number, bundle=2) for number in range(5)]
    assert numbers(bundled(entries, Limits(), share=1)) == [[0, 1], [2, 3], [4]]


def test_slow_work_travels_alone() -> None:
    entries = [entry(number, bundle=1) for number in range(3)]
    assert numbers(bundled(entries, Limits(), share=1)) == [[0], [1], [2]]


def test_the_smallest_limit_in_a_bundle_counts() -> None:
    """Two deployments may disagree about one class."""
    entries = [entry(1, bundle=9), entry(2, bundle=9), entry(3, bundle=1), entry(4, bundle=9)]
    assert numbers(bundled(entries, Limits(), share=1)) == [[1, 2], [3], [4]]


@pytest.mark.parametrize(("share", "sizes"), [(1, [8]), (2, [4, 4]), (3, [3, 3, 2]), (100, [1] * 8)])
def test_a_bundle_leaves_a_share_to_other_consumers(share: int, sizes: list[int]) -> None:
    bundles = bundled([entry(number) for number in range(8)], Limits(), share=share)
    assert [len(bundle.entries) for bundle in bundles] == sizes


def test_one_message_is_one_bundle() -> None:
    [bundle] = bundled([entry(1, body=b'{"a":1}')], Limits(), share=2)
    assert bundle.outgoing().body == b'[{"a":1}]'
    assert bundle.outgoing().address == CHARGE


def test_nothing_makes_no_bundle() -> None:
    assert bundled([], Limits(), share=2) == []


def test_a_body_keeps_to_the_limit_that_receivers_check() -> None:
    body = b"x" * 30
    bundles = bundled([entry(number, body=body) for number in range(10)], Limits(body=100), share=1)
    assert [len(bundle.entries) for bundle in bundles] == [3, 3, 3, 1]
    assert all(len(bundle.outgoing().body) <= 100 for bundle in bundles)


def test_a_message_of_the_largest_size_travels_alone() -> None:
    entries = [entry(1), entry(2, body=b"x" * 98), entry(3)]
    assert numbers(bundled(entries, Limits(body=100), share=1)) == [[1], [2], [3]]


@given(
    st.lists(st.tuples(st.sampled_from([CHARGE, PLACED]), st.integers(1, 5), st.integers(1, 98)), max_size=40),
    st.integers(1, 4),
)
def test_every_message_is_in_one_bundle_in_order_and_within_all_limits(
    given_entries: list[tuple[Address, int, int]], share: int
) -> None:
    entries = [
        entry(number, address, bundle=most, body=b"x" * size)
        for number, (address, most, size) in enumerate(given_entries)
    ]
    bundles = bundled(entries, Limits(body=100), share=share)
    for address in (CHARGE, PLACED):
        mine = [bundle for bundle in bundles if bundle.entries[0].address == address]
        assert [each for bundle in mine for each in bundle.entries] == [
            each for each in entries if each.address == address
        ]
    for bundle in bundles:
        assert {each.address for each in bundle.entries} == {bundle.entries[0].address}
        assert len(bundle.entries) <= min(each.bundle for each in bundle.entries)
        assert len(bundle_body([each.body for each in bundle.entries])) <= 100


def test_a_bundle_of_one_trace_belongs_to_it() -> None:
    traces = [f"00-{'a' * 32}-{number:016x}-01" for number in range(2)]
    [bundle] = bundled([entry(number, trace=trace) for number, trace in enumerate(traces)], Limits(), share=1)
    outgoing = bundle.outgoing()
    assert outgoing.traceparent == traces[0]
    assert outgoing.links == ()


def test_a_bundle_of_several_traces_is_linked_to_each() -> None:
    traces = [f"00-{letter * 32}-{1:016x}-01" for letter in "ab"]
    entries = [entry(number, trace=trace) for number, trace in enumerate(traces)]
    [bundle] = bundled([*entries, entry(9)], Limits(), share=1)
    assert bundle.outgoing().links == tuple(traces)
