"""What the stand-ins have done: one JSON object a line, on disk before anybody hears of it."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any


class Journal:
    """An append-only file of effects, each under its idempotency key.

    It survives `kill -9`: it is read again at the start, and a last line that was cut off is dropped, since
    nobody has been told of what it says.
    """

    def __init__(self, path: Path) -> None:
        self._effects: dict[str, dict[str, Any]] = {}
        self._attempts: Counter[str] = Counter()
        kept = 0
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                self._take(json.loads(line))
                kept += len(line)
        self._file = path.open("ab")
        self._file.truncate(kept)

    def find(self, key: str) -> dict[str, Any] | None:
        """Return the effect under `key`."""
        return self._effects.get(key)

    def all(self, what: str) -> list[dict[str, Any]]:
        """Return all effects of one kind."""
        return [effect for effect in self._effects.values() if effect["what"] == what]

    def attempts(self, key: str) -> int:
        """Return how often `key` has been tried, whatever came of it."""
        return self._attempts[key]

    def note_attempt(self, key: str) -> None:
        """Write down that somebody tried `key`."""
        self._append({"attempt": key})

    def record(self, key: str, what: str, **about: Any) -> dict[str, Any]:
        """Write an effect down; it is on disk when this returns."""
        self._append({"key": key, "what": what, **about})
        return self._effects[key]

    def counts(self) -> dict[str, int]:
        """Return how many effects there are of each kind."""
        return dict(sorted(Counter(effect["what"] for effect in self._effects.values()).items()))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._take(entry)

    def _take(self, entry: dict[str, Any]) -> None:
        if "attempt" in entry:
            self._attempts[entry["attempt"]] += 1
        else:
            self._effects[entry["key"]] = entry
