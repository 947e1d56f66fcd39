"""Settings from the environment: `COORDINATOR_BROKER_URL` and so on. Validated at start; secrets never printed."""

import os
from pathlib import Path

from pydantic import DirectoryPath, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from events.codec import Limits
from events.errors import ConfigurationError

EMBEDDED = "embedded:"
_LAST_PORT = 65_535
_YEAR = 366 * 86_400.0


class Settings(BaseSettings):
    """Where the coordinator finds its servers, and its limits."""

    model_config = SettingsConfigDict(env_prefix="COORDINATOR_", extra="ignore", frozen=True, hide_input_in_errors=True)

    broker_url: SecretStr = Field(
        default=SecretStr(EMBEDDED), description="`amqp://user:password@host/vhost`, or `embedded:` for no broker"
    )
    database_url: SecretStr = Field(
        default=SecretStr("sqlite:///coordinator.db"),
        description="`postgresql://user:password@host/name` or `sqlite:///file`",
    )
    secrets: DirectoryPath | None = Field(
        default=None,
        description="a directory with files named like these variables, for what is not to stand in the environment;"
        " after a lost connection to the broker its URL is read there again",
    )
    namespace: str = Field(
        default="saga",
        pattern=r"^[a-z][a-z0-9_-]{0,39}$",
        description="prefix of all exchanges and queues; one for each deployment on a broker",
    )
    migrate: bool = Field(default=True, description="bring the database schema up to date at start")
    max_body: int = Field(default=256 * 1024, ge=1024, description="largest message in bytes")
    max_headers: int = Field(default=16 * 1024, ge=256, description="largest AMQP headers in bytes")
    wait: float = Field(default=60.0, ge=0, description="seconds to wait at start for servers that are not up yet")
    grace: float = Field(
        default=20.0, ge=0, le=_YEAR, description="seconds that running handlers get to end at shutdown"
    )
    max_stall: float = Field(
        default=60.0,
        ge=0,
        le=_YEAR,
        description="seconds that the event loop may stand still, or a handler that was cancelled go on, before the"
        " process exits; 0 for ever",
    )
    pool_size: int = Field(
        default=16,
        ge=5,
        le=100,
        description="connections to PostgreSQL of one process; handlers with a session hold all but 4 at most",
    )
    health: str = Field(
        default="",
        pattern=r"^([^\s:]*|\[[0-9a-fA-F:]+\]):\d{1,5}$|^$",
        description="host:port where `/live` and `/ready` are answered over HTTP; empty for nowhere",
    )
    log_level: str = Field(default="INFO", pattern=r"^(DEBUG|INFO|WARNING|ERROR)$", description="what is logged")
    log_format: str = Field(default="text", pattern=r"^(text|json)$", description="`json` for one object a line")

    @field_validator("broker_url")
    @classmethod
    def _known_broker(cls, value: SecretStr) -> SecretStr:
        if value.get_secret_value().startswith((EMBEDDED, "amqp://", "amqps://")):
            return value
        raise ValueError("write amqp://..., amqps://... or embedded:")

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, value: SecretStr) -> SecretStr:
        scheme = value.get_secret_value().partition(":")[0].partition("+")[0]
        if scheme not in ("postgresql", "sqlite"):
            raise ValueError("write postgresql://... or sqlite:///file")
        try:
            make_url(value.get_secret_value())
        except (ArgumentError, ValueError):
            raise ValueError("it cannot be read; write postgresql://user:password@host:5432/name") from None
        return value

    @field_validator("health")
    @classmethod
    def _possible_port(cls, value: str) -> str:
        if value and int(value.rpartition(":")[2]) > _LAST_PORT:
            raise ValueError(f"ports end at {_LAST_PORT}")
        return value

    def read_broker_url(self) -> str:
        """Return the broker's URL as it is now: the files in `secrets` may have changed.

        Raises:
            ConfigurationError: it is wrong there.
        """
        now = _load(self.secrets) if self.secrets else self
        return now.broker_url.get_secret_value()

    @property
    def embedded(self) -> bool:
        """Whether messages stay in the SQLite file."""
        return self.broker_url.get_secret_value().startswith(EMBEDDED)

    @property
    def limits(self) -> Limits:
        """The sizes that are checked before anything is parsed."""
        return Limits(self.max_body, self.max_headers)


def load_settings() -> Settings:
    """Return the settings of the environment, and of the directory that it names for secrets.

    Raises:
        ConfigurationError: one of them is wrong; the text names the variable, never its value.
    """
    secrets = Path(os.environ.get("COORDINATOR_SECRETS", ""))
    return _load(secrets if secrets.is_dir() else None)


def _load(secrets: Path | None) -> Settings:
    try:
        return Settings(_secrets_dir=secrets)
    except ValidationError as error:
        wrong = "; ".join(
            f"COORDINATOR_{str(each['loc'][0]).upper()}: {each['msg'].removeprefix('Value error, ')}"
            for each in error.errors(include_url=False, include_input=False)
        )
        raise ConfigurationError(wrong) from None
