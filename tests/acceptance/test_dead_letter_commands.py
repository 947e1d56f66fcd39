"""Operators look at what was given up on, and replay it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.test_cli import coordinator
from tests.support.base import RabbitMQ, wait_until
from tests.support.processes import Process

pytestmark = pytest.mark.acceptance

APP = "tests.support.poison_app:app"
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
        wait_until(lambda: len(listed(environment)) == 2, "the letters")
        second, first = listed(environment)
        assert (first["consumer"], first["reason"], first["attempts"]) == ("work", "failed", 3)
        [group] = listed(environment, "--groups")
        assert (group["count"], group["error"], group["error_type"]) == (2, "ValueError: poison", "ValueError")
        assert group["fingerprint"] == first["fingerprint"]
        assert "ValueError: poison" in run("list")
        assert group["fingerprint"] in run("list", "--groups")
        shown = run("show", first["id"])
        assert "given up on by: work" in shown
        assert '"kind": "raises"' in shown
        assert "Traceback" in shown
        assert "after 2.0 s" in run("replay", "--fingerprint", group["fingerprint"], "--rate", "0.5", "--dry-run")
        assert len(listed(environment)) == 2, "a dry run does nothing"
        run("edit", first["id"], "--data", "-", "--why", "mended", given='{"number": 1, "kind": "good"}')
        assert "1 replayed, 0 not" in run("replay", first["id"], "--by", "ada", "--why", "mended")
        assert run("discard", "--handler", "work", "--why", "a test") == "1 discarded\n"
        wait_until(lambda: not _rows(environment), "the replay")
        assert listed(environment) == []
        [replayed] = listed(environment, "--status", "replayed")
        assert (replayed["id"], replayed["settled_by"], replayed["settled_why"]) == (first["id"], "ada", "mended")
        [discarded] = listed(environment, "--status", "discarded")
        assert discarded["id"] == second["id"]
        assert process.terminate() == 0


def _rows(environment: dict[str, str]) -> int:
    found = json.loads(coordinator(environment, "handlers", "list", "--json").stdout)["handlers"]
    return int(next(each["waiting"] for each in found if each["name"] == "work"))


def test_what_makes_no_sense_is_refused_in_one_line(pg_url: str) -> None:
    environment = {"COORDINATOR_BROKER_URL": "amqp://127.0.0.1", "COORDINATOR_DATABASE_URL": pg_url}
    assert coordinator(environment, "db", "upgrade").returncode == 0
    for arguments, says in (
        (("replay",), "name letters by their ids or by --handler, --reason and so on, or say --all"),
        (("replay", "--all", "--handler", "x"), "name letters by their ids"),
        (("list", "--status", "lost"), "--status takes dead, replayed, discarded or any"),
        (("show", ID.format(1)), "there is no dead letter"),
        (("edit", ID.format(1), "--data", "nosuch.json"), "there is no file nosuch.json"),
    ):
        refused = coordinator(environment, "dead-letters", *arguments)
        assert (refused.returncode, says in refused.stderr, refused.stderr.count("\n")) == (1, True, 1), refused.stderr
    assert "0 replayed, 0 not" in coordinator(environment, "dead-letters", "replay", "--all").stdout


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
        wait_until(lambda: bool(listed(environment)), "the letter")
        [letter] = listed(environment)
        assert (letter["consumer"], letter["reason"], letter["message_id"]) == ("work", "delivery_limit", ID.format(1))
        assert coordinator(environment, "dead-letters", "replay", "--all").returncode == 0
        wait_until(lambda: _rows(environment) == 0, "the replay")
        assert listed(environment) == []
        assert process.terminate() == 0
