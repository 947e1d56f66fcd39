"""`python -m benchmarks`: prints a table and writes bench.json."""

import argparse
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks import runs
from benchmarks.report import Report
from coordinator import process
from tests.support import servers


def main() -> None:
    """Measure; servers come from TEST_AMQP_URL and TEST_PG_URL, Docker, or this machine's programs."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=main.__doc__)
    parser.add_argument("--sagas", type=int, default=5000, help="sagas of a throughput run (default 5000)")
    parser.add_argument("--lone", type=int, default=300, help="sagas of a latency run (default 300)")
    parser.add_argument("--only", choices=["embedded", "servers"], help="leave the other setup out")
    parser.add_argument("--json", type=Path, default=Path("bench.json"), help="where to write the numbers")
    options = parser.parse_args()
    process.log_to_stderr("WARNING", "text")
    report, console = Report(), Console()
    if options.only != "servers":
        with tempfile.TemporaryDirectory() as folder:
            console.print("embedded ...")
            report.throughput.append(process.run(runs.throughput_embedded(Path(folder), options.sagas)))
            report.latency.append(process.run(runs.latency_embedded(Path(folder), options.lone)))
    if options.only != "embedded":
        with servers.provided() as given:
            amqp_url, pg_url = given.amqp_url, given.pg_url
            console.print("RabbitMQ + PostgreSQL ...")
            report.throughput.append(process.run(runs.throughput_servers(amqp_url, pg_url, options.sagas)))
            report.latency.append(process.run(runs.latency_servers(amqp_url, pg_url, options.lone)))
    report.show(console)
    report.write(options.json)
    console.print(f"written to {options.json}")


main()
