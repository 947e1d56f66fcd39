"""What a run measured: a table for people, JSON for programs."""

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Self

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Milliseconds:
    """A distribution of times, in milliseconds."""

    p50: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Self:
        cuts = quantiles(seconds, n=100)
        return cls(round(cuts[49] * 1000, 2), round(cuts[98] * 1000, 2))


@dataclass(frozen=True)
class Throughput:
    """Many sagas at once."""

    setup: str
    sagas: int
    sagas_per_second: float
    cpu_ms_per_saga: dict[str, float]
    loop_ns: float


@dataclass(frozen=True)
class Latency:
    """One saga at a time, beside the bare cost of its deliveries and commits in the same run."""

    setup: str
    sagas: int
    saga: Milliseconds
    delivery: Milliseconds | None
    commit: Milliseconds
    floor_ms: float
    times_floor: float
    loop_ns: float


def loop_ns() -> float:
    """Return the nanoseconds of one turn of an empty loop: how fast this machine is at the moment.

    Machines with neighbours differ threefold from hour to hour; numbers of two runs compare only beside this one.
    """
    turns = 2_000_000
    start = time.process_time_ns()
    for _ in range(turns):
        pass
    return round((time.process_time_ns() - start) / turns, 1)


@dataclass
class Report:
    """All numbers of a run."""

    machine: str = field(
        default_factory=lambda: f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    )
    throughput: list[Throughput] = field(default_factory=list)
    latency: list[Latency] = field(default_factory=list)

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self), indent=2) + "\n")

    def show(self, console: Console) -> None:
        console.print(self.machine, highlight=False)
        table = Table("three-step sagas", "sagas", "sagas/s", "Python CPU a saga", "loop", title="throughput")
        for each in self.throughput:
            cpu = ", ".join(f"{name} {value:.2f} ms" for name, value in each.cpu_ms_per_saga.items())
            total = sum(each.cpu_ms_per_saga.values())
            rate = f"{each.sagas_per_second:,.0f}"
            table.add_row(each.setup, f"{each.sagas:,}", rate, f"{cpu}; all {total:.2f} ms", f"{each.loop_ns} ns")
        console.print(table)
        table = Table(
            "a lone saga", "p50", "p99", "bare delivery", "bare commit", "floor", "p50 / floor", "loop", title="latency"
        )
        for one in self.latency:
            delivery = f"{one.delivery.p50:.2f} ms" if one.delivery else "-"
            table.add_row(
                one.setup,
                f"{one.saga.p50:.1f} ms",
                f"{one.saga.p99:.1f} ms",
                delivery,
                f"{one.commit.p50:.2f} ms",
                f"{one.floor_ms:.1f} ms",
                f"{one.times_floor:.2f}",
                f"{one.loop_ns} ns",
            )
        console.print(table)
