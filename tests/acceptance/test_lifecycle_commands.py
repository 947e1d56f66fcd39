"""Documents are approved with the command line, beside the process of their application."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.acceptance.test_cli import coordinator
from tests.support.base import wait_until
from tests.support.processes import Process

pytestmark = pytest.mark.acceptance

APP = "coordinator.catalog:app"
PLAN = '{"document_id": "d-1", "author": "ann", "title": "Plan", "digest": "abc"}'
ANN = ("--by", "ann", "--role", "author")
BOB = ("--by", "bob", "--role", "approver")


@pytest.fixture
def running(amqp_url: str, pg_url: str, tmp_path: Path) -> Iterator[dict[str, str]]:
    environment = {"COORDINATOR_BROKER_URL": amqp_url, "COORDINATOR_DATABASE_URL": pg_url}
    with Process(tmp_path / "log", "run", APP, environment=environment) as process:
        wait_until(lambda: "is running" in process.log, "the process")
        yield environment


def said(environment: dict[str, str], *arguments: str) -> str:
    """What a command prints that must succeed."""
    done = coordinator(environment, "lifecycles", *arguments)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def act(environment: dict[str, str], transition: str, *more: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(said(environment, "act", APP, "document", "d-1", transition, *more, "--json"))
    return found


def test_a_document_from_draft_to_approval_with_a_delegate_and_its_audit_trail(running: dict[str, str]) -> None:
    assert "Plan" in said(running, "create", APP, "document", "--data", PLAN, *ANN)
    submitted = act(running, "submit", *ANN, "--revision", "1")
    assert (submitted["state"], submitted["revision"]) == ("pending_approval", 2)
    assert "d-1" in said(running, "waiting", APP, "--role", "approver")
    assert "d-1" not in said(running, "waiting", APP, "--role", "author")
    approve = ("act", APP, "document", "d-1", "approve")
    for arguments, refusal in (
        ((*approve, "--by", "ann", "--role", "approver"), "it takes somebody else than author"),
        ((*approve, *BOB, "--revision", "1"), "it is at revision 2, not 1"),
        (("act", APP, "document", "d-1", "reject", *BOB), "reject needs a comment"),
        (("show", "document", "d-9"), "there is no document with the key 'd-9'"),
        (("create", APP, "document", "--data", "{}", *ANN), "this is no document: document_id: Field required"),
        (("create", APP, "document", "--data", "x", *ANN), "--data is no JSON"),
        (("create", APP, "document", "--data", "[]", *ANN), "--data takes a JSON object"),
    ):
        refused = coordinator(running, "lifecycles", *arguments)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refusal in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
    delegate = ("delegate", APP, "bob", "dan", "approver", "--until", "2100-01-01", "--why", "on holiday", *BOB)
    [made] = json.loads(said(running, *delegate, "--json"))["delegations"]
    approved = act(running, "approve", "--by", "dan", "--for", "bob", "--comment", "well done")
    assert approved["state"] == "approved"
    assert approved["history"][-1]["delegation_id"] == made["id"]
    said(running, "revoke", APP, made["id"], *BOB)
    assert "on holiday" in said(running, "delegations", "--user", "dan")
    shown = said(running, "show", "document", "d-1")
    assert "dan for bob" in shown
    assert "well done" in shown
    [entry] = json.loads(said(running, "audit", "document", "d-1", "--user", "bob", "--json"))["entries"]
    assert (entry["actor"], entry["acting_for"], entry["transition"], entry["key"]) == ("dan", "bob", "approve", "d-1")
    assert "approve" in said(running, "audit", "--since", "2020-01-01", "--until", "2100-01-01")
    [listed] = json.loads(said(running, "list", "document", "--state", "approved", "--json"))["entities"]
    assert (listed["key"], listed["data"]["title"]) == ("d-1", "Plan")
    assert said(running, "verify", "document") == "1 as their audit trail says, 0 not\n"
    with psycopg.connect(running["COORDINATOR_DATABASE_URL"].replace("+asyncpg", "")) as connection:
        connection.execute("UPDATE lifecycle_history SET actor = 'eve' WHERE transition = 'approve'")
    tampered = coordinator(running, "lifecycles", "verify")
    assert tampered.returncode == 1
    assert "document d-1: entry 3 is not as it was written" in tampered.stdout
    chart = said(running, "chart", APP, "document", "--of", "d-1").splitlines()
    assert "    class approved here" in chart
    assert "    class pending_approval been" in chart
    assert "    class rejected been" not in chart
    assert said(running, "chart", APP, "document").startswith("stateDiagram-v2\n    [*] --> draft: create")
