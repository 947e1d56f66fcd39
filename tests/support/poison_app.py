"""An application some of whose messages are poison: they raise, hang, or kill their process."""

import asyncio
import os
import signal
from enum import StrEnum

from sqlalchemy import Column, Integer, MetaData, Table
from sqlalchemy.ext.asyncio import AsyncSession

from coordinator import App
from events import Command
from handlers import Retry, handles

tables = MetaData()
handled = Table("poison_handled", tables, Column("id", Integer, primary_key=True), Column("number", Integer))


class Kind(StrEnum):
    GOOD = "good"
    RAISES = "raises"
    HANGS = "hangs"
    KILLS = "kills"


class Work(Command):
    number: int
    kind: Kind


@handles(Work, timeout=1, retry=Retry(attempts=3, quick=1, first=0.5, most=1))
async def work(command: Work, session: AsyncSession) -> None:
    match command.kind:
        case Kind.RAISES:
            raise ValueError("poison")
        case Kind.HANGS:
            await asyncio.Event().wait()
        case Kind.KILLS:
            os.kill(os.getpid(), signal.SIGKILL)
    await session.execute(handled.insert().values(number=command.number))


app = App("poison", handlers=[work], tables=[tables])
