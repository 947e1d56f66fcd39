"""Makes `events.jsonl`: `python -m coordinator.demo.generate`. The same file each time."""

import json
from collections.abc import Iterator
from typing import Any
from uuid import UUID

from coordinator.demo.run import EVENTS

_EPOCH_MS = 1_790_000_000_000

_FIRST = ("Ada", "Ben", "Chloe", "Dov", "Elif", "Finn", "Gita", "Hugo", "Ines", "Jon", "Kira", "Luis", "Mia", "Noor")
_LAST = ("Berg", "Costa", "Diaz", "Eriksen", "Fofana", "Garcia", "Haas", "Ito", "Jansen")
# What is special about the sign-up of this number: see `coordinator/demo/services.py` for what comes of it.
_SIGN_UPS: dict[int, dict[str, str]] = {
    3: {"user_name": "root"},
    6: {"domain": "nowhere.example"},
    7: {"domain": "busy.example"},
    9: {"domain": "unwanted.example"},
    12: {"full_name": "Spam Bot"},
    13: {"domain": "moody.example"},
    15: {"domain": "flaky.example"},
    16: {"full_name": "Flaky Fiona"},
    18: {"domain": "broken.example"},
    21: {"user_name": "admin"},
    24: {"full_name": "Spam Factory"},
    27: {"full_name": "Broken Bob"},
}
_ORDERS: dict[int, dict[str, Any]] = {
    4: {"sku": "unicorn"},
    8: {"card": "declined"},
    12: {"address": "1 Nowhere Lane"},
    16: {"card": "flaky"},
    20: {"card": "broken"},
    24: {"card": "vanishing"},
    28: {"address": "7 Flood Plain"},
    30: {"address": "3 Fog Hill"},
    32: {"sku": "lamp", "quantity": 9000},
    36: {"card": "declined"},
    40: {"address": "2 Nowhere Lane"},
    44: {"card": "vanishing"},
}
SIGN_UPS, ORDERS = 30, 48


def _id(kind: int, number: int) -> str:
    """Return a UUID version 7 that is the same at each run."""
    return str(UUID(int=(_EPOCH_MS + number) << 80 | 0x7 << 76 | kind << 64 | 0x2 << 62 | number))


def _event(kind: int, number: int, name: str, version: int, data: dict[str, Any]) -> dict[str, Any]:
    return {
        "specversion": "1.0",
        "id": _id(kind, number),
        "source": "/web-shop",
        "type": name,
        "dataschema": f"urn:schema:{name}:{version}",
        "data": data,
    }


def _sign_up(number: int) -> dict[str, Any]:
    special = _SIGN_UPS.get(number, {})
    first, last = _FIRST[number % len(_FIRST)], _LAST[number % len(_LAST)]
    data = {
        "user_id": _id(2, number),
        "user_name": special.get("user_name", f"{first.lower()}{number}"),
        "email": f"{first.lower()}{number}@{special.get('domain', 'example.com')}",
    }
    if number % 5 == 0:  # an older service still speaks version 1
        return _event(1, number, "user.registered", 1, {**data, "first_name": first, "last_name": last})
    return _event(1, number, "user.registered", 2, {**data, "full_name": special.get("full_name", f"{first} {last}")})


def _order(number: int) -> dict[str, Any]:
    special = _ORDERS.get(number, {})
    data = {
        "order_id": _id(4, number),
        "customer": f"{_FIRST[number % len(_FIRST)]} {_LAST[number % len(_LAST)]}",
        "sku": special.get("sku", ("lamp", "chair", "table")[number % 3]),
        "quantity": special.get("quantity", 1 + number % 4),
        "total": {"minor": 1990 + 100 * number, "currency": "EUR"},
        "card": special.get("card", "good"),
        "address": special.get("address", f"{number} High Street"),
    }
    return _event(3, number, "order.placed", 1, data)


def make_events() -> Iterator[dict[str, Any]]:
    """Yield sign-ups and orders in turn."""
    for number in range(1, ORDERS + 1):
        if number <= SIGN_UPS:
            yield _sign_up(number)
        yield _order(number)


if __name__ == "__main__":
    EVENTS.write_text("".join(json.dumps(event) + "\n" for event in make_events()))
