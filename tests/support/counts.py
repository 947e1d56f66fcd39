"""Numbers that a test run shows at its end, beside pytest's own."""

import pytest

_LINES = pytest.StashKey[list[str]]()


def note(config: pytest.Config, line: str) -> None:
    """Show `line` at the end of the run."""
    config.stash.setdefault(_LINES, []).append(line)


def noted(config: pytest.Config) -> list[str]:
    """Return all lines."""
    return config.stash.get(_LINES, [])
