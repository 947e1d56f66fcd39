"""Three RabbitMQ nodes on this machine that are one broker: each with its own ports and data, and one Erlang cookie."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.local import LocalRabbitMQ

NODES = 3


class ClusterNode(LocalRabbitMQ):
    """A node of a cluster.

    Args:
        number: its place, from 0.
        first: the node that the others join; its epmd knows all of them.
    """

    def __init__(self, number: int, first: "ClusterNode | None" = None) -> None:
        super().__init__()
        self.name = f"node{number}@localhost"
        self._environment["RABBITMQ_NODENAME"] = self.name
        self._first = first
        if first is not None:
            self._environment["ERL_EPMD_PORT"] = first._environment["ERL_EPMD_PORT"]
        cookie = Path(self._environment["HOME"]) / ".erlang.cookie"
        cookie.write_text("ONECOOKIEFORALLNODES")
        cookie.chmod(0o400)

    def join(self) -> None:
        """Become one broker with the first node."""
        if self._first is not None:
            self.control("stop_app")
            self.control("join_cluster", self._first.name)
            self.control("start_app")

    def _start_epmd(self) -> None:
        if self._first is None:
            super()._start_epmd()


class Cluster:
    """The nodes; `nodes[0]` has to outlive the others."""

    def __init__(self) -> None:
        first = ClusterNode(0)
        self.nodes = [first, *(ClusterNode(number, first) for number in range(1, NODES))]

    def start(self) -> None:
        """Start all nodes and make them one broker."""
        self.nodes[0].start()
        with ThreadPoolExecutor() as pool:
            list(pool.map(ClusterNode.start, self.nodes[1:]))
        for node in self.nodes[1:]:
            node.join()

    def close(self) -> None:
        """End all nodes and remove their data."""
        for node in reversed(self.nodes):
            node.close()
