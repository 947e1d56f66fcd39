"""Servers from programs installed on this machine: private, on free loopback ports, all data in one folder."""

import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from tests.support.base import MissingServerError, Postgres, RabbitMQ, free_port, wait_until
from tests.support.guardian import guardian, kill_tree

# The program itself, before the wrapper that packages put on the PATH: that one changes the user and the log's place.
RABBITMQ_PLACES = (
    "usr/lib/rabbitmq/bin/rabbitmq-server",
    "opt/homebrew/opt/rabbitmq/sbin/rabbitmq-server",
    "usr/local/opt/rabbitmq/sbin/rabbitmq-server",
)
POSTGRES_PLACES = (
    "usr/lib/postgresql/*/bin/postgres",
    "usr/pgsql-*/bin/postgres",
    "opt/homebrew/opt/postgresql@*/bin/postgres",
    "usr/local/opt/postgresql@*/bin/postgres",
)

# Erlang's default in packages is to sleep at once when idle. Each wake-up is dear on a virtual machine, and a start
# has two hundred thousand of them: waiting busily for a moment halves the time to start.
BUSY_WAIT = "+sbwt medium +sbwtdcpu medium +sbwtdio medium"


def find_program(name: str, places: tuple[str, ...]) -> Path | None:
    for place in places:
        found = sorted(Path("/").glob(place))
        if found:
            return found[-1]  # of several versions the newest
    on_path = shutil.which(name)
    return Path(on_path) if on_path else None


class Program:
    """A server program in the foreground, with a log, in a session of its own."""

    def __init__(
        self,
        arguments: list[str],
        *,
        log: Path,
        environment: dict[str, str],
        folder: Path,
        user: str | None = None,
    ) -> None:
        self._log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                cwd=folder,
                start_new_session=True,  # Ctrl-C is for pytest, which then ends the servers in good order
                user=user,
                group=user,
                extra_groups=None if user is None else [],
            )
        guardian().watch(self.pid, folder)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def check(self) -> None:
        """Raises with the end of the log if the program has ended."""
        if not self.running:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
            raise RuntimeError(f"{self._process.args!r} ended with {self._process.returncode}\n{tail}")

    def signal(self, number: signal.Signals, pid: int | None = None, seconds: float = 30) -> None:
        """Asks the program to end and waits for that; kills it if it does not."""
        with suppress(ProcessLookupError):
            os.kill(pid or self.pid, number)
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill9()
        else:
            guardian().forget(self.pid)

    def kill9(self) -> None:
        """Kills the program and all that it has started."""
        kill_tree(self.pid)
        self._process.wait()
        guardian().forget(self.pid)


class LocalRabbitMQ(RabbitMQ):
    """rabbitmq-server with its management plugin, and an epmd of its own.

    Without that, Erlang would leave a daemon behind that listens on every interface.
    """

    def __init__(self) -> None:
        program = find_program("rabbitmq-server", RABBITMQ_PLACES)
        epmd = shutil.which("epmd")
        if program is None or epmd is None:
            raise MissingServerError("the program rabbitmq-server is not installed")
        self.source = f"program {program}"
        self._program = program
        self._epmd_program = epmd
        self._epmd: Program | None = None
        self._server: Program | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="rabbitmq-"))
        self._port, self._management_port, self._epmd_port = free_port(), free_port(), free_port()
        self._environment = self._configure()

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self._port}/"

    @property
    def management_url(self) -> str:
        return f"http://127.0.0.1:{self._management_port}"

    @property
    def running(self) -> bool:
        return self._server is not None and self._server.running

    def start(self) -> None:
        if self.running:
            return
        self._start_epmd()
        log = self._folder / "console.log"
        server = Program([str(self._program)], log=log, environment=self._environment, folder=self._folder)
        self._server = server

        def ready() -> bool:
            server.check()
            return self.answers() and self.management_answers()

        wait_until(ready, "RabbitMQ")

    def stop(self) -> None:
        if self._server is not None and self._server.running:
            self._server.signal(signal.SIGTERM, pid=self._erlang_pid)

    def kill9(self) -> None:
        if self._server is not None:
            self._server.kill9()

    def close(self) -> None:
        self.kill9()
        if self._epmd is not None:
            self._epmd.kill9()
        shutil.rmtree(self._folder, ignore_errors=True)

    def control(self, *arguments: str) -> None:
        subprocess.run(
            [str(self._program.with_name("rabbitmqctl")), *arguments],
            check=True,
            capture_output=True,
            env=self._environment,
            cwd=self._folder,
        )

    def pause(self) -> None:
        os.kill(self._erlang_pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self._erlang_pid, signal.SIGCONT)

    @property
    def _erlang_pid(self) -> int:
        """The server itself: the program started here is a shell around it."""
        return int((self._folder / "pid").read_text())

    def _start_epmd(self) -> None:
        if self._epmd is not None and self._epmd.running:
            return
        arguments = [self._epmd_program, "-address", "127.0.0.1", "-port", str(self._epmd_port)]
        log = self._folder / "epmd.log"
        self._epmd = Program(arguments, log=log, environment=self._environment, folder=self._folder)

    def _configure(self) -> dict[str, str]:
        folder = self._folder
        home = folder / "home"
        home.mkdir()
        (folder / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self._port}\n"
            "management.tcp.ip = 127.0.0.1\n"
            f"management.tcp.port = {self._management_port}\n"
            "log.console = true\n"
            "log.file = false\n"
            "disk_free_limit.absolute = 50MB\n"
            "vm_memory_high_watermark.absolute = 512MB\n"
        )
        (folder / "plugins").write_text("[rabbitmq_management].\n")
        (folder / "env.conf").write_text("")
        # Every file has its variable, so that nothing of the machine's own broker is read or written.
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "LANG": "C.UTF-8",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_NODENAME": "test@localhost",
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_CONFIG_FILES": str(folder / "conf.d"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "env.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"-kernel inet_dist_use_interface {{127,0,0,1}} {BUSY_WAIT}",
        }


class LocalPostgres(Postgres):
    """postgres with a data folder of its own. It refuses root, so root runs it as the package's user."""

    def __init__(self, *, durable: bool = True) -> None:
        program = find_program("postgres", POSTGRES_PLACES)
        if program is None:
            raise MissingServerError("the program postgres is not installed")
        self.source = f"program {program}"
        self._program = program
        self._durable = durable
        self._user = "postgres" if os.geteuid() == 0 else None
        self._port = free_port()
        self._folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        self._environment = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
        self._server: Program | None = None

    @property
    def url(self) -> str:
        return f"postgresql+asyncpg://test@127.0.0.1:{self._port}/postgres"

    @property
    def running(self) -> bool:
        return self._server is not None and self._server.running

    def start(self) -> None:
        if self.running:
            return
        if not (self._folder / "data").exists():
            self._make_data()
        arguments = [str(self._program), "-D", str(self._folder / "data"), "-p", str(self._port)]
        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self._folder),
            "fsync": "on" if self._durable else "off",
            "max_connections": "200",
            # In the data folder and not in the machine's shared memory, where a killed server would leave it.
            "dynamic_shared_memory_type": "mmap",
        }
        for name, value in settings.items():
            arguments += ["-c", f"{name}={value}"]
        server = Program(
            arguments,
            log=self._folder / "server.log",
            environment=self._environment,
            folder=self._folder,
            user=self._user,
        )
        self._server = server

        def ready() -> bool:
            server.check()
            return self.answers()

        wait_until(ready, "PostgreSQL")

    def stop(self) -> None:
        if self._server is not None and self._server.running:
            self._server.signal(signal.SIGINT)  # "fast": sessions are ended, the data is written

    def kill9(self) -> None:
        if self._server is not None:
            self._server.kill9()

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _make_data(self) -> None:
        if self._user is not None:
            shutil.chown(self._folder, self._user, self._user)
        options = ["--username=test", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
        subprocess.run(
            [str(self._program.with_name("initdb")), "-D", str(self._folder / "data"), *options],
            check=True,
            capture_output=True,
            env=self._environment,
            cwd=self._folder,
            user=self._user,
            group=self._user,
            extra_groups=None if self._user is None else [],
        )
