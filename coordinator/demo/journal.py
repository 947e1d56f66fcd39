"""What the stand-ins have done: one JSON object a line, on disk before anybody hears of it."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from events.errors import ConfigurationError, DatabaseInUseError
from events.sqlite import FileLock


class Journal:
    """An append-only file of effects, each under its idempotency key.

    It survives `kill -9`: it is read again at the start, and a last line that was cut off is dropped, since
    nobody has been told of what it says.

    Raises:
        ConfigurationError: another process writes to this file, or it is no journal.
    """

    def __init__(self, path: Path) -> None:
        self._effects: dict[str, dict[str, Any]] = {}
        self._by_subject: dict[tuple[str, str], dict[str, Any]] = {}
        self._attempts: Counter[str] = Counter()
        self._repeats: Counter[str] = Counter()
        self._lock = FileLock(str(path))
        # Before anything is read: what looks cut off may be a line that a running process is writing.
        try:
            self._lock.acquire()
        except DatabaseInUseError as error:
            raise ConfigurationError(
                f"a demonstration is running in {path.parent}; wait for it, or name another --directory"
            ) from error
        self._file = path.open("ab")
        try:
            self._file.truncate(self._read(path))
        except BaseException:
            self.close()
            raise

    @property
    def repeats(self) -> int:
        """How often somebody asked again for what had been done already."""
        return self._repeats.total()

    def find(self, key: str) -> dict[str, Any] | None:
        """Return the effect under `key`."""
        return self._effects.get(key)

    def find_of(self, what: str, of: str) -> dict[str, Any] | None:
        """Return the latest effect of one kind that concerns `of`."""
        return self._by_subject.get((what, of))

    def attempts(self, key: str) -> int:
        """Return how often `key` has been tried in vain."""
        return self._attempts[key]

    def note_attempt(self, key: str) -> None:
        """Write down that somebody tried `key` in vain."""
        self._append({"attempt": key})

    def once(self, key: str, what: str, *, of: str, **about: Any) -> dict[str, Any]:
        """Return the effect under `key`, on disk: a new one, or the one there is, and then write down the repeat."""
        if key in self._effects:
            self._append({"repeat": key})
        else:
            self._append({"key": key, "what": what, "of": of, **about})
        return self._effects[key]

    def counts(self) -> dict[str, int]:
        """Return how many effects there are of each kind."""
        return dict(sorted(Counter(effect["what"] for effect in self._effects.values()).items()))

    def close(self) -> None:
        """Close the file; doing so twice is fine."""
        self._file.close()
        self._lock.release()

    def _read(self, path: Path) -> int:
        """Take in all whole lines; return how many bytes they have."""
        whole = 0
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigurationError(f"line {number} of {path} is not ours; remove the file, or move it") from error
            whole += len(line)
        return whole

    def _append(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._take(entry)

    def _take(self, entry: dict[str, Any]) -> None:
        if "attempt" in entry:
            self._attempts[entry["attempt"]] += 1
        elif "repeat" in entry:
            self._repeats[entry["repeat"]] += 1
        else:
            self._by_subject[entry["what"], entry["of"]] = self._effects[entry["key"]] = entry
