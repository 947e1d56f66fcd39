"""Default settings of a new user, in the database."""

from sqlalchemy import delete, insert
from sqlalchemy.ext.asyncio import AsyncSession

from events.catalog.users import CreateDefaultSettings, RemoveSettings
from handlers.catalog.tables import user_setting
from handlers.context import Declined
from handlers.definition import handles

DEFAULTS = {"language": "en", "newsletter": "weekly", "theme": "system"}
RESERVED_NAMES = frozenset({"admin", "root", "support", "system"})


@handles(CreateDefaultSettings)
async def create_default_settings(command: CreateDefaultSettings, session: AsyncSession) -> None:
    """Write the defaults; decline a user name that nobody may have."""
    if command.user_name in RESERVED_NAMES:
        raise Declined(f"the user name {command.user_name} is reserved")
    rows = [{"user_id": command.user_id, "name": name, "value": value} for name, value in DEFAULTS.items()]
    await session.execute(insert(user_setting), rows)


@handles(RemoveSettings)
async def remove_settings(command: RemoveSettings, session: AsyncSession) -> None:
    """Delete the settings; there may be none."""
    await session.execute(delete(user_setting).where(user_setting.c.user_id == command.user_id))
