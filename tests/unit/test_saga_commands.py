"""What operators write wrongly is refused before any server is asked."""

import pytest
from typer.testing import CliRunner

from coordinator.cli import cli
from events.errors import ConfigurationError

APP = "examples.box_office:app"
MANY = ("--saga", "order", "--status", "running")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("sagas", "cancel", APP), "name one saga, or say with options such as --saga"),
        (("sagas", "cancel", APP, "k-1", *MANY), "name one saga, or say with options such as --saga"),
        (("sagas", "cancel", APP, "k-1", "k-2"), r"write \[SAGA\] after the application, not 'k-1 k-2'"),
        (("sagas", "retry", APP, "charge"), "name one saga, or say with options such as --saga"),
        (("sagas", "retry", APP), r"write \[SAGA\] STEP after the application"),
        (("sagas", "cancel", APP, *MANY, "--revision", "1"), "--revision is of one saga"),
        (("sagas", "cancel", APP, "k-1", "--dry-run"), "--rate and --dry-run are for many sagas"),
        (("sagas", "cancel", APP, "k-1", "--rate", "1"), "--rate and --dry-run are for many sagas"),
        (("sagas", "cancel", APP, "k-1", "--data", '{"x": 1}'), "--data is for `resolve`; cancel takes none"),
        (("sagas", "resolve", APP, "k-1", "pay", "perhaps"), "a step has succeeded, declined, failed, undone"),
        (("sagas", "resolve", APP, "k-1", "pay", "failed", "--data", "[]"), "--data takes a JSON object"),
        (("sagas", "resolve", APP, "k-1", "pay", "failed", "--data", "{"), "--data is no JSON"),
        (("sagas", "resolve", APP, "k-1", "pay", "failed", "--data", "[" * 100_000), "--data is no JSON: recursion"),
        (("sagas", "resolve", APP, "k-1", "pay", "failed", "--data", '{"x": NaN}'), "--data is no JSON"),
        (("sagas", "resolve", APP, "k-1", "pay", "failed", "--data", r'{"x": "\ud800"}'), "--data is no JSON"),
        (("sagas", "move-deadline", APP, "k-1", "pay", "9999-12-31T23:59-14:00"), "after the year 9999 in UTC"),
        (("sagas", "move-deadline", APP, "k-1", "pay", "soon"), "'soon' is no time; write 2026-12-24T12:00"),
        (("timers", "move", APP), r"write \[SAGA\] TIME after the application"),
        (("timers", "cancel", APP), "name one saga, or say with options such as --saga"),
        (("timers", "cancel", APP, "k-1", "--step", "pay", "--saga", "order"), "name one saga, or say with options"),
    ],
)
def test_what_can_only_be_a_mistake_is_refused(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        CliRunner().invoke(cli, [*arguments, "--why", "a test", "--by", "ada"], catch_exceptions=False)
