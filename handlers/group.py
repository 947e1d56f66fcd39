"""The handlers of one process: they share what waits to be tried again, breakers, and an operator's settings."""

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Any

from events.database import is_transient
from events.registry import Registry
from events.service import Supervisor, is_cancelled
from handlers.breaker import Circuit, Phase, Signal
from handlers.definition import Handler
from handlers.operations import Operations, Presence, effective
from handlers.retries import LEASE
from handlers.runner import HandlerRunner
from handlers.tools import Tools

logger = logging.getLogger(__name__)

_LOOK_EVERY = 0.4
_SAMPLE_FOR = 1.0  # so long a message from the queue is waited for before one that waits is asked again
_FOLLOW_EVERY = 1.0
_RENEW_EVERY = LEASE / 3


class HandlerGroup:
    """Runs handlers until stopped.

    Args:
        handlers: what runs here.
        registry: reads their messages.
        source: who speaks, in what they send; the handler's name is added.
        tools: what they share.
    """

    def __init__(self, handlers: Sequence[Handler], *, registry: Registry, source: str, tools: Tools) -> None:
        self._tools = tools
        self._retries = tools.retries
        self._clock = tools.clock
        self.circuits: dict[str, Circuit] = {}
        self.runners = {
            handler.name: HandlerRunner(
                handler,
                registry=registry,
                source=f"{source}/{handler.name}",
                tools=tools,
                circuit=self._circuit_of(handler),
            )
            for handler in handlers
        }
        self._operations = Operations(tools.engine, ids=tools.ids)
        self._presence = Presence(tools.ids.new(), socket.gethostname(), os.getpid())
        self._supervisor = Supervisor(tools.clock)
        self._to_look = asyncio.Event()
        self._special = asyncio.Event()
        self._suspects: set[str] = set()  # names of handlers with messages that must be tried alone
        self._held_until = self._retries.clock.now()  # until then at least are the leases of what runs here
        self._store_answers = True
        tools.look_again = self._to_look.set

    def _circuit_of(self, handler: Handler) -> Circuit | None:
        breaker = handler.breaker
        if breaker is None:
            return None
        return self.circuits.setdefault(breaker.name, Circuit(breaker, self._tools.clock))

    @property
    def failing(self) -> frozenset[str]:
        """The names of background tasks that have failed and wait to be started again."""
        return self._supervisor.failing.union(*(runner.failing for runner in self.runners.values()))

    @property
    def overdue(self) -> float:
        """For how many seconds a try has gone on that was cancelled; 0 if there is none."""
        return max((runner.execution.timeouts.overdue for runner in self.runners.values()), default=0)

    async def start(self) -> None:
        """Start to consume; the queues must have been declared."""
        await self._retries.clock.calibrate()
        if self._tools.engine.dialect.name == "sqlite":
            await self._retries.free(list(self.runners))
        await self._follow()
        for runner in self.runners.values():
            await runner.start()
        self._supervisor.start("handlers.look", self._look_loop)
        self._supervisor.start("handlers.wake", self._wake_loop)
        self._supervisor.start("handlers.special", self._special_loop)
        self._supervisor.start("handlers.renew", self._renew_loop)
        self._supervisor.start("handlers.follow", self._follow_loop)
        self._to_look.set()

    async def stop(self, grace: float) -> None:
        """Stop all handlers; see `HandlerRunner.stop`."""
        await asyncio.gather(*(runner.stop(grace) for runner in self.runners.values()), self._supervisor.stop())
        await self._tools.keys.close()
        try:
            await self._operations.leave(self._presence)
        except Exception as error:  # noqa: BLE001  # it must not keep the process from ending: the row ages
            logger.warning("the process is not signed off: %s", error, extra={"action": "handlers.not_signed_off"})

    # Messages that wait to be tried again

    async def _wake_loop(self) -> None:
        while True:
            await self._clock.sleep(_LOOK_EVERY)
            for circuit in self.circuits.values():
                circuit.tell(Signal.TICK)
            self._to_look.set()

    async def _look_loop(self) -> None:
        while True:
            await self._to_look.wait()
            self._to_look.clear()
            await self._patiently(self.look)

    async def look(self) -> None:
        """Take what is due for handlers that have room, and see what needs special care."""
        await self._tools.bus.until_writable()
        await self._retries.clock.calibrate_if_old()
        if self._retries.clock.now() >= self._held_until:  # else what runs here would look as if its process had died
            await self._renew()
        due = await self._retries.count_due()
        for name, runner in self.runners.items():
            usual, suspects = due.get(name, (0, 0))
            if usual and runner.room:
                rows = await self._retries.claim(name, runner.room, held=runner.parked)
                runner.take(rows)
                if len(rows) < usual and rows and runner.room:
                    self._to_look.set()
            if suspects and runner.flow.is_free:
                self._suspects.add(name)
        if self._suspects or any(runner.flow.wants_probe for runner in self.runners.values()):
            self._special.set()

    async def _special_loop(self) -> None:
        while True:
            await self._special.wait()
            self._special.clear()
            await self._patiently(self._probe_all)
            await self._patiently(self._try_suspects)

    async def _probe_all(self) -> None:
        """Let a single message find out whether a dependency is back, for each that is due to be asked."""
        for circuit in self.circuits.values():
            if circuit.wants_probe:
                await self._probe(circuit)

    async def _probe(self, circuit: Circuit) -> None:
        """Find a message that tries: another handler, and a queue or a waiting message, after each that failed."""
        turn = circuit.state.failed_probes
        sharing = [
            runner
            for runner in self.runners.values()
            if runner.flow.wants_probe and self._circuit_of(runner.handler) is circuit
        ]
        if turn % 2 and self._clock.monotonic() < circuit.state.until + _SAMPLE_FOR:
            for runner in sharing:
                runner.flow.sample()
            return
        first = turn // 2 % max(1, len(sharing))
        sharing = sharing[first:] + sharing[:first]
        for runner in sharing:
            for row in await self._retries.claim(runner.handler.name, 1, held=runner.parked, due_or_not=True):
                await runner.run_at_once(row)
                return
        for runner in sharing:
            if await self._try_suspect(runner):
                return
        for runner in sharing:
            runner.flow.sample()

    async def _try_suspects(self) -> None:
        """Try messages with which a process has ended, one at a time and quite alone."""
        names, self._suspects = self._suspects, set()
        for name in sorted(names):
            runner = self.runners[name]
            while runner.flow.is_free and await self._try_suspect(runner):
                pass

    async def _try_suspect(self, runner: HandlerRunner) -> bool:
        """Try a message quite alone; return False if there is none, or it cannot be tried now."""
        async with self._tools.isolation.alone():
            for row in await self._retries.claim(runner.handler.name, 1, held=runner.parked, suspects=True):
                return await runner.run_at_once(row)
        return False

    async def _renew_loop(self) -> None:
        while True:
            await self._clock.sleep(_RENEW_EVERY)
            await self._patiently(self._renew)

    async def _renew(self) -> None:
        """Hold what runs here for another lease."""
        until = self._retries.clock.now() + timedelta(seconds=LEASE)
        rows = [row for runner in self.runners.values() for row in runner.parked.values()]
        if rows:
            await self._retries.renew(rows)
        self._held_until = until

    # What an operator has set, and what he sees

    async def _follow_loop(self) -> None:
        while True:
            await self._clock.sleep(_FOLLOW_EVERY)
            await self._patiently(self._follow)

    async def _follow(self) -> None:
        now = self._retries.clock.now()
        settings, processes = await self._operations.follow(self._presence, self.states(), now)
        for name, runner in self.runners.items():
            handler = effective(runner.handler, settings.get(name))
            runner.flow.paused = handler.paused
            runner.slots.limit = handler.concurrency
            runner.pace.rate = handler.rate / max(1, processes.get(name, 1)) if handler.rate else None
            runner.execution.retry = handler.retry
        self._store_answers = True

    def states(self) -> dict[str, Any]:
        """Return how each handler is: what runs, whether it is paused, the phase of its breaker."""
        return {name: self._state(runner) for name, runner in self.runners.items()}

    def _state(self, runner: HandlerRunner) -> dict[str, Any]:
        circuit = self._circuit_of(runner.handler)
        state: dict[str, Any] = {"running": runner.slots.taken, "paused": runner.flow.paused}
        if circuit is not None:
            state["breaker"] = circuit.policy.name
            state["phase"] = circuit.state.phase.value
            if circuit.state.phase is not Phase.CLOSED:
                state["failures"] = circuit.state.failures
        return state

    async def _patiently(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do `work`; a database that is away is no failure of ours, and is asked again later."""
        try:
            await work()
        except Exception as error:
            if is_cancelled() or not is_transient(error):
                raise
            if self._store_answers:
                logger.warning("handlers wait for the database: %s", error, extra={"action": "handlers.database_away"})
            self._store_answers = False
