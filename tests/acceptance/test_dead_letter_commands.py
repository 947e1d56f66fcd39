"""Operators look at what was given up on, and replay it."""

import json
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest

from tests.acceptance.test_cli import coordinator
from tests.support.base import RabbitMQ, wait_until
from tests.support.processes import Process

pytestmark = pytest.mark.acceptance

APP = "tests.support.poison_app:app"
EDIT = ("--data", "-", "--app", APP, "--why", "a typo")
ID = "01a20000-0000-7000-8000-00000000000{}"


def work(number: int, kind: str) -> str:
    data = {"number": number, "kind": kind}
    return json.dumps({"specversion": "1.0", "id": ID.format(number), "source": "/t", "type": "work", "data": data})


def listed(environment: dict[str, str], *options: str) -> list[dict[str, Any]]:
    done = coordinator(environment, "dead-letters", "list", "--json", *options)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = next(iter(json.loads(done.stdout).values()))
    return found


def test_letters_are_listed_shown_edited_replayed_and_discarded(amqp_url: str, pg_url: str, tmp_path: Path) -> None:
    environment = {"COORDINATOR_BROKER_URL": amqp_url, "COORDINATOR_DATABASE_URL": pg_url}

    def run(*arguments: str, given: str = "") -> str:
        done = coordinator(environment, "dead-letters", *arguments, given=given)
        assert done.returncode == 0, done.stderr
        return done.stdout

    with Process(tmp_path / "log", "run", APP, environment=environment) as process:
        wait_until(lambda: "is running" in process.log, "the application")
        lines = "\n".join([work(1, "raises"), work(2, "raises"), work(3, "nonsense"), work(4, "good")])
        assert coordinator(environment, "publish", "-", "--app", APP, given=lines).returncode == 1, "one is nonsense"
        wait_until(lambda: _count(pg_url, "dead_letter") == 2, "the letters")
        second, first = listed(environment)
        assert (first["consumer"], first["reason"], first["attempts"]) == ("work", "failed", 3)
        [group] = listed(environment, "--groups")
        assert (group["count"], group["error"], group["error_type"]) == (2, "ValueError: poison", "ValueError")
        assert group["fingerprint"] == first["fingerprint"]
        shown = run("show", first["id"])
        assert "given up on by: work" in shown
        assert '"kind": "raises"' in shown
        assert "Traceback" in shown
        assert "after 2.0 s" in run("replay", "--fingerprint", group["fingerprint"], "--rate", "0.5", "--dry-run")
        assert _count(pg_url, "retry") == 0, "a dry run does nothing"
        for data, says in (
            ('{"number": 1, "kind": "better"}', "work could not take that: Work: kind: Input should be"),
            ('{"number": 1, "number": 2, "kind": "good"}', "'number' stands twice"),
        ):
            refused = coordinator(environment, "dead-letters", "edit", first["id"], *EDIT, given=data)
            assert (refused.returncode, says in refused.stderr) == (1, True), refused.stderr
        edited = run("edit", first["id"], *EDIT, given='{"number": 1, "kind": "good"}')
        assert "edited body, which a replay takes" in edited
        assert "1 replayed, 0 not" in run("replay", first["id"], "--by", "ada", "--why", "mended")
        again = coordinator(environment, "dead-letters", "replay", first["id"], "--why", "twice")
        assert (again.returncode, "it is replayed, by ada; only what is dead" in again.stdout) == (1, True)
        assert run("discard", "--handler", "work", "--why", "a test") == "1 discarded\n"
        wait_until(lambda: _count(pg_url, "retry") == 0, "the replay")
        [replayed] = listed(environment, "--status", "replayed")
        assert (replayed["id"], replayed["settled_by"], replayed["settled_why"]) == (first["id"], "ada", "mended")
        shown = json.loads(run("show", first["id"], "--json"))
        assert [(each["act"], each["why"]) for each in shown["changes"]] == [
            ("edited", "a typo"),
            ("replayed", "mended"),
        ]
        assert json.loads(shown["body"])["data"]["kind"] == "raises", "the original is kept"
        assert json.loads(shown["edited_body"])["data"]["kind"] == "good"
        [discarded] = listed(environment, "--status", "discarded")
        assert discarded["id"] == second["id"]
        assert run("purge", "--older-than", "1", "--dry-run") == "0 would be deleted\n"
        assert run("purge", "--older-than", "0") == "2 deleted\n"
        assert listed(environment, "--status", "any") == []
        assert process.terminate() == 0


def _count(pg_url: str, table: str) -> int:
    with psycopg.connect(pg_url.replace("postgresql+asyncpg", "postgresql")) as connection:
        [(count,)] = connection.execute(f"SELECT count(*) FROM {table}".encode()).fetchall()
    return int(count)


def test_what_makes_no_sense_is_refused_in_one_line(pg_url: str) -> None:
    environment = {"COORDINATOR_BROKER_URL": "amqp://127.0.0.1", "COORDINATOR_DATABASE_URL": pg_url}
    assert coordinator(environment, "db", "upgrade").returncode == 0
    for arguments, says in (
        (("replay",), "name letters by their ids or by --handler, --reason and so on, or say --all"),
        (("replay", "--all", "--handler", "x"), "name letters by their ids"),
        (("list", "--status", "lost"), "--status takes dead, replayed, discarded or any"),
        (("show", ID.format(1)), "there is no dead letter"),
        (("show", "nonsense"), "'nonsense' is no id of a dead letter"),
        (("edit", ID.format(1), *EDIT[2:], "--data", "nosuch.json"), "there is no file nosuch.json"),
        (("edit", ID.format(1), *EDIT[2:]), "say what is new"),
        (("replay", "--all"), "say who does this, and why (--why)"),
        (("discard", "--all", "--why", " "), "say who does this, and why (--why)"),
        (("list", "--since", "2026-01-02", "--until", "2026-01-01"), "no letter died both at"),
    ):
        refused = coordinator(environment, "dead-letters", *arguments)
        assert (refused.returncode, says in refused.stderr, refused.stderr.count("\n")) == (1, True, 1), refused.stderr
    done = coordinator(environment, "dead-letters", "replay", "--all", "--why", "a test").stdout
    assert done == "there is no such dead letter\n0 replayed, 0 not\n"
    done = coordinator(environment, "dead-letters", "replay", "--all", "--dry-run", "--json").stdout
    assert json.loads(done) == {"letters": [], "replayed": 0, "refused": 0, "dry_run": True}


def test_a_replay_that_is_killed_has_done_what_it_has_said_and_is_gone_on_with(pg_url: str, tmp_path: Path) -> None:
    environment = {"COORDINATOR_BROKER_URL": "amqp://127.0.0.1", "COORDINATOR_DATABASE_URL": pg_url}
    assert coordinator(environment, "db", "upgrade").returncode == 0
    count, dsn = 3000, pg_url.replace("postgresql+asyncpg", "postgresql")

    def ask(statement: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(dsn) as connection:
            return connection.execute(statement.encode()).fetchall()

    with psycopg.connect(dsn) as connection, connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO dead_letter (id, consumer, reason, detail, body, headers, message_id, attempts, dead_at,"
            " fingerprint, status) VALUES (%s, 'work', 'failed', 'x', %s, '{}', %s, 1, now(), 'f', 'dead')",
            [
                (UUID(int=n), work(n, "good").replace(ID.format(n), str(UUID(int=n))).encode(), str(n))
                for n in range(1, count + 1)
            ],
        )
    arguments = ("dead-letters", "replay", "--all", "--app", APP, "--why", "mended")
    with Process(tmp_path / "log", *arguments, environment=environment) as process:
        wait_until(lambda: " at once" in process.log, "the first letters")
        process.kill9()
    said = process.log.count(" at once")
    waiting = _count(pg_url, "retry")
    assert ask("SELECT count(*) FROM dead_letter WHERE status = 'replayed'") == [(waiting,)]
    assert said <= waiting
    done = coordinator(environment, *arguments)
    assert f"{count - waiting} replayed, 0 not" in done.stdout, done.stderr
    assert ask("SELECT count(*), count(DISTINCT dead_letter_id) FROM retry") == [(count, count)]
    assert ask("SELECT count(*), count(DISTINCT dead_letter_id) FROM dead_letter_change") == [(count, count)]


def test_what_rabbitmq_gives_up_on_arrives_with_its_handler(
    private_amqp_url: str, pg_url: str, private_rabbitmq: RabbitMQ, tmp_path: Path
) -> None:
    """A message that came back too often is moved by RabbitMQ; it is kept like all others, and can be replayed."""
    environment = {"COORDINATOR_BROKER_URL": private_amqp_url, "COORDINATOR_DATABASE_URL": pg_url}
    with Process(tmp_path / "log", "run", APP, environment=environment) as process:
        wait_until(lambda: "is running" in process.log, "the application")
        assert process.terminate() == 0
    assert coordinator(environment, "publish", "-", "--app", APP, given=work(1, "good")).returncode == 0
    vhost = private_amqp_url.rpartition("/")[2]
    get = {"count": 1, "ackmode": "reject_requeue_true", "encoding": "auto"}
    for _ in range(21):  # the delivery limit, and once more
        private_rabbitmq.manage("POST", f"queues/{vhost}/saga.handler.work/get", get)
    with Process(tmp_path / "log", "run", APP, environment=environment) as process:
        wait_until(lambda: _count(pg_url, "dead_letter") == 1, "the letter")
        [letter] = listed(environment)
        assert (letter["consumer"], letter["reason"], letter["message_id"]) == ("work", "delivery_limit", ID.format(1))
        assert coordinator(environment, "dead-letters", "replay", "--all", "--why", "mended").returncode == 0
        wait_until(lambda: _count(pg_url, "retry") == 0, "the replay")
        assert listed(environment) == []
        assert process.terminate() == 0
