"""Forbids clocks, sleeping, randomness and fresh ids outside the modules that wrap them.

What reads a clock cannot be tested without waiting, and what draws at random cannot be repeated. So there is one port
for each, handed in by whoever builds the object. Run from the root of the project: python scripts/check_purity.py
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

PACKAGES = ("events", "handlers", "coordinator")

# The adapters, the only ones that may. A pattern as for PurePath.match.
ADAPTERS = ("events/clock.py", "events/ids.py", "coordinator/demo/*")

CLOCK = "use the Clock that is handed in (events.clock)"
IDS = "use the Ids that are handed in (events.ids)"
RANDOM = "use the Random that is handed in (events.ids)"

# A name forbids all that is below it, too.
FORBIDDEN = {
    "asyncio.sleep": CLOCK,
    "datetime.date.today": CLOCK,
    "datetime.datetime.now": CLOCK,
    "datetime.datetime.today": CLOCK,
    "datetime.datetime.utcnow": CLOCK,
    "os.urandom": RANDOM,
    "random": RANDOM,
    "secrets": RANDOM,
    "time.clock_gettime": CLOCK,
    "time.clock_gettime_ns": CLOCK,
    "time.gmtime": CLOCK,
    "time.localtime": CLOCK,
    "time.monotonic": CLOCK,
    "time.monotonic_ns": CLOCK,
    "time.perf_counter": CLOCK,
    "time.perf_counter_ns": CLOCK,
    "time.sleep": CLOCK,
    "time.time": CLOCK,
    "time.time_ns": CLOCK,
    "uuid.uuid1": IDS,
    "uuid.uuid4": IDS,
    "uuid.uuid6": IDS,
    "uuid.uuid7": IDS,
}


def check(source: str, path: str) -> Iterator[str]:
    """The findings in one module, as "file:line: what, and what to use instead"."""
    tree = ast.parse(source, path)
    imported = dict(_imports(tree))
    for node in ast.walk(tree):
        for name in _names(node, imported):
            for forbidden, port in FORBIDDEN.items():
                if name == forbidden or name.startswith(f"{forbidden}."):
                    yield f"{path}:{getattr(node, 'lineno', 0)}: {name}: {port}"


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """What each imported name stands for: `from datetime import datetime as d` gives d -> datetime.datetime."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.asname, alias.name) if alias.asname else (alias.name.partition(".")[0],) * 2
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _names(node: ast.AST, imported: dict[str, str]) -> Iterator[str]:
    """The full names that a node brings in or refers to."""
    match node:
        case ast.Import():
            yield from (alias.name for alias in node.names)
        case ast.ImportFrom(module=str(module), level=0):
            yield from (f"{module}.{alias.name}" for alias in node.names)
        case ast.Call(func=ast.Attribute(value=loop, attr="time")) if "loop" in ast.unparse(loop).rpartition(".")[2]:
            yield "time.monotonic"  # what an event loop's time() is
        case ast.Attribute():
            first, _, rest = ast.unparse(node).partition(".")
            if first in imported:
                yield f"{imported[first]}.{rest}"


def is_adapter(path: str) -> bool:
    return any(PurePosixPath(path).match(pattern) for pattern in ADAPTERS)


def main() -> int:
    """Checks all packages; the number of findings, 1 at most, is the exit status."""
    files = [path.as_posix() for package in PACKAGES for path in sorted(Path(package).rglob("*.py"))]
    findings = [found for file in files if not is_adapter(file) for found in check(Path(file).read_text("utf-8"), file)]
    for found in findings:
        print(found)
    if not files:
        print("no module found: run this from the root of the project")
    return int(bool(findings) or not files)


if __name__ == "__main__":
    sys.exit(main())
